import math

import numpy as np
import pytest
import torch

from omni_train.data.contracts import IGNORE_INDEX, MODALITIES, Document
from omni_train.data.encode import collate
from omni_train.objectives.distillation import distillation_losses
from omni_train.objectives.next_token import counts, ctc_loss_sum, next_token_losses


def output(losses, modality, probabilities=None):
    labels = torch.zeros(len(losses), dtype=torch.long)
    values = {"losses": torch.tensor(losses), "labels": labels, "modality": torch.tensor(modality)}
    return {**values, "router_probabilities": probabilities, "router_counts": torch.ones(1, 2)}


def document(labels):
    length = len(labels)
    return Document("id", "text", np.arange(length), np.array(labels), np.tile(np.arange(length), (3, 1)))


def test_terms_are_sums_and_modalities_are_kept_apart():
    losses = [math.log(4), math.log(4 / 3), math.log(4 / 3)]
    audio, video = MODALITIES.index("audio"), MODALITIES.index("video")
    found = next_token_losses(output(losses, [audio, video, video]), "thinker", None, 0.5)
    assert [(t.engine, t.name, t.per, t.weight) for t in found.terms] == [("thinker", "next_token", "labels", 1.0)]
    assert found.terms[0].sum.item() == pytest.approx(math.log(4) + 2 * math.log(4 / 3))
    sums, labels = torch.stack([found.reported[f"loss/{name}"] for name in MODALITIES], dim=1)
    assert sums.tolist() == pytest.approx([0.0, math.log(4), 0.0, 2 * math.log(4 / 3), 0.0])
    assert labels.tolist() == [0.0, 1.0, 0.0, 2.0, 0.0]


def test_router_term_weighs_this_packs_probabilities_with_the_fractions_of_the_step_before():
    # Two layers, two experts, four tokens. 2 experts / 2 layers × (1/4·3 + 3/4·1 + 1/2·2 + 1/2·2) = 3.5.
    probabilities = torch.tensor([[3.0, 1.0], [2.0, 2.0]], requires_grad=True)
    fractions = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    found = next_token_losses(output([0.7], [0], probabilities), "llm", fractions, 0.1)
    router = found.terms[1]
    assert (router.engine, router.name, router.per, router.weight) == ("llm", "router", "tokens", 0.1)
    assert router.sum.item() == pytest.approx(3.5)
    router.sum.backward()
    assert probabilities.grad.tolist() == [[0.25, 0.75], [0.5, 0.5]]


def test_router_term_is_one_a_token_at_balance():
    found = next_token_losses(output([0.7], [0], torch.full((3, 4), 2.5)), "llm", torch.full((3, 4), 0.25), 0.1)
    assert found.terms[1].sum.item() == pytest.approx(10.0)  # 10 tokens, each 1/4 to each of 4 experts


def test_distillation_reports_divergences_by_modality_and_what_its_pack_tells():
    pack = collate([document([7, 8])])
    pack.statistics = {"rollout/tokens": torch.tensor([6.0, 2.0], dtype=torch.float64)}
    scores = output([0.7, 0.9], [0, 1]) | {"divergences": torch.tensor([0.25, 0.5])}
    found = distillation_losses(scores, pack, "thinker", None, 0.1)
    assert [(t.name, t.per, t.sum.item()) for t in found.terms] == [("distillation", "labels", 0.75)]
    reported = {name: pair.tolist() for name, pair in found.reported.items() if pair[1] > 0}
    expected = {"loss/text": [0.25, 1], "loss/audio": [0.5, 1], "rollout/tokens": [6, 2]}
    assert reported.pop("loss/next_token") == pytest.approx([1.6, 2]) and reported == expected


def test_counts_are_labels_and_tokens():
    # The label at a document's first token is nobody's target; −100 is none.
    pack = collate([document([7, 8, IGNORE_INDEX, 9]), document([IGNORE_INDEX, 5])])
    assert counts(pack) == {"labels": 3, "tokens": 6}


def test_a_pack_without_samples_counts_nothing():
    pack = collate([document([7, 8])])
    pack.sample_ids = []
    assert counts(pack) == {"labels": 0, "tokens": 0}


def test_ctc_sums_over_all_alignments_and_leaves_out_what_does_not_fit():
    """Two steps, classes a, b, blank, uniform: "a" has 3 alignments of 9, "ab" has 1, "aab" none."""
    logits = torch.zeros(3, 2, 3)
    lengths = torch.tensor([2, 2, 2])
    found = ctc_loss_sum(logits, lengths, torch.tensor([0, 0, 1, 0, 0, 1]), torch.tensor([1, 2, 3]))
    assert float(found) == pytest.approx(math.log(9 / 3) + math.log(9 / 1))
