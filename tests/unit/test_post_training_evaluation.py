"""How near students are to a teacher, by hand."""

from types import SimpleNamespace

import pytest
import torch

from omni_train.engine.parallel import Ranks
from omni_train.evaluation import heldout, post_training

RANKS = Ranks(rank=0, world=1, local_rank=0, device=torch.device("cpu"))


def test_every_student_meets_what_the_teacher_said_of_the_same_pack_once(monkeypatch):
    said: list[float] = []
    monkeypatch.setattr(post_training, "states_of", lambda teacher, pack: said.append(pack.value) or pack.value)
    monkeypatch.setattr(heldout, "sum_over_ranks", lambda values: values)

    def divergence_from(states, beta, temperature):
        assert (beta, temperature) == (0.0, 1.0), "forward KL"
        return states

    monkeypatch.setattr(post_training, "divergence_from", divergence_from)

    def student(scale):
        def forward(pack, states):
            assert states == pack.value
            return {"divergences": torch.tensor([scale * states]), "modality": torch.tensor([0])}

        return forward

    def pack(value):
        found = SimpleNamespace(value=value, bad_samples=[], sample_ids=["a"], cu_seqlens=[0, 1])
        found.to = lambda device: found
        return found

    values = {"pictures": [1.0, 3.0], "speech": [4.0]}
    data = SimpleNamespace(
        validation_packs=lambda source, shards, tokens: values[source],
        validation_builder=lambda source, shards: pack,
        dummy=None,
    )
    tasks = {"name": "pictures", "count": "pictures", "word": "speech"}
    found = post_training.divergences([student(1.0), student(0.5)], None, data, tasks, "heldout", RANKS)
    assert found == pytest.approx([3.0, 1.5])  # the mean over sources, not over tasks or packs
    assert said == [1.0, 3.0, 4.0]
