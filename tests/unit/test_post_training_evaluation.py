"""How near students are to a teacher, by hand."""

from types import SimpleNamespace

import pytest
import torch

from omni_train.data.contracts import BadSample
from omni_train.data.shard import DataError
from omni_train.engine import parallel
from omni_train.engine.parallel import Ranks
from omni_train.evaluation import heldout, post_training

RANKS = Ranks(rank=0, world=1, local_rank=0, device=torch.device("cpu"))


def test_every_student_meets_what_the_teacher_said_of_the_same_pack_once(monkeypatch, caplog):
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
        found = SimpleNamespace(value=value, bad_samples=bad[value], sample_ids=["a"], cu_seqlens=[0, 1])
        found.to = lambda device: found
        return found

    values = {"pictures": [1.0, 3.0], "speech": [4.0]}
    bad = {1.0: [], 3.0: [BadSample("x.tar", "k", 512, "broken")], 4.0: []}
    monkeypatch.setattr(parallel, "lists_of_ranks", lambda own: [own])
    data = SimpleNamespace(
        config=SimpleNamespace(data=SimpleNamespace(max_bad_samples=1)),
        indexed=lambda shards: [],
        validation_packs=lambda source, shards, tokens: values[source],
        validation_builder=lambda source, shards: pack,
        dummy=None,
    )
    tasks = {"name": "pictures", "count": "pictures", "word": "speech"}
    found = post_training.divergences([student(1.0), student(0.5)], None, data, tasks, "heldout", RANKS)
    assert found == pytest.approx([3.0, 1.5])  # the mean over sources, not over tasks or packs
    assert said == [1.0, 3.0, 4.0]
    assert [record.getMessage() for record in caplog.records] == ["left out, not measured: x.tar, sample 'k': broken"]
    data.config.data.max_bad_samples = 0
    with pytest.raises(DataError, match="x.tar: sample 'k': byte 512: broken.*1 bad sample, 0 allowed"):
        post_training.divergences([student(1.0)], None, data, tasks, "heldout", RANKS)
