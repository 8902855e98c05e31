"""Held-out sums by hand, and over ranks of which one runs out of packs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support import Ranks, run_ranks

from omni_train.data.contracts import IGNORE_INDEX, MODALITIES, BadSample, Document, PackPlan
from omni_train.data.encode import collate
from omni_train.evaluation.heldout import heldout_losses, pack_sums

TEXT, AUDIO = MODALITIES.index("text"), MODALITIES.index("audio")


def output(rows, labels, document, modality):
    logits = torch.tensor(rows).view(-1, 2)
    return {
        "losses": torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="none"),
        "predictions": logits.argmax(-1),
        "labels": torch.tensor(labels),
        "document": torch.tensor(document),
        "modality": torch.tensor(modality),
    }


def test_sums_by_hand():
    """Document 0 is right twice, 1 right and wrong, 3 right once; 2 has no label. Logits (ln 3, 0): p = 3/4, 1/4."""
    right, wrong = [math.log(3), 0.0], [0.0, math.log(3)]
    found = pack_sums(
        output([right, right, right, wrong, right], [0] * 5, [0, 0, 1, 1, 3], [TEXT, TEXT, AUDIO, AUDIO, AUDIO]), 4
    )
    good, bad = math.log(4 / 3), math.log(4)
    expected = torch.zeros(4, len(MODALITIES), dtype=torch.float64)
    expected[:, TEXT] = torch.tensor([2 * good, 2, 1, 1])
    expected[:, AUDIO] = torch.tensor([2 * good + bad, 3, 1, 2])
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_tie_counts_as_the_first_token_as_greedy_takes_it():
    tie = pack_sums(output([[1.0, 1.0], [1.0, 1.0]], [0, 1], [0, 1], [TEXT, TEXT]), 2)
    assert tie[2, TEXT] == 1 and tie[3, TEXT] == 2


def pack(number: int, answer: int):
    """Two tokens, the second labelled ``answer``."""
    document = Document(
        f"d{number}", "text", np.array([0, answer]), np.array([IGNORE_INDEX, answer]), np.zeros((3, 2), int)
    )
    return collate([document])


def forward(pack):
    """p(0) = 3/4, p(1) = 1/4 everywhere."""
    has_label = pack.shift_labels != IGNORE_INDEX
    logits = torch.tensor([[math.log(3), 0.0]]).expand(len(pack.shift_labels), 2)[has_label]
    count = len(logits)
    return output(logits.tolist(), pack.shift_labels[has_label].tolist(), [0] * count, [TEXT] * count)


def evaluate(ranks: Ranks) -> tuple[dict[str, float], int, list[str]]:
    """Three packs, labels 0, 1, 0; the metrics, how many forwards this rank ran, and the keys its packs left out."""
    answers, ran = [0, 1, 0], []

    def counted(found):
        ran.append(found)
        return forward(found)

    def dummy():
        silent = pack(9, 0)
        silent.sample_ids = []
        return silent

    plans = [PackPlan(step, 0, 0, []) for step in range(3)]

    def load(plan):
        loaded = pack(plan.step, answers[plan.step])
        loaded.bad_samples = [BadSample("s", f"k{plan.step}", 0, "bad")]
        return loaded

    metrics, bad = heldout_losses(counted, plans, load, dummy, ranks)
    return metrics, len(ran), [sample.key for sample in bad]


@pytest.mark.parametrize("world", [1, 2])
def test_every_pack_counts_once_and_ranks_run_equally_many_forwards(world):
    results = run_ranks(world, evaluate)
    assert [keys for _, _, keys in results] == {1: [["k0", "k1", "k2"]], 2: [["k0", "k2"], ["k1"]]}[world]
    for metrics, forwards, _ in results:
        assert metrics == {
            "loss/text": pytest.approx((2 * math.log(4 / 3) + math.log(4)) / 3),
            "exact/text": pytest.approx(2 / 3),
        }
        assert forwards == {1: 3, 2: 2}[world]
