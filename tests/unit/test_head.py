"""The vocabulary head: losses by hand, in chunks as at once, and nothing for nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from omni_train.models import head as head_module
from omni_train.models.head import VocabularyHead, token_losses_at


def head(rows: list[list[float]], dtype: torch.dtype = torch.float32) -> VocabularyHead:
    return VocabularyHead(nn.Parameter(torch.tensor(rows, dtype=dtype)))


def test_losses_are_cross_entropies_in_nats_and_predictions_the_most_likely():
    # Logits (0, ln 3 · x): the softmax at x = 1 is (1/4, 3/4).
    hidden, labels = torch.tensor([[1.0], [1.0], [-1.0]]), torch.tensor([0, 1, 1])
    losses, predictions = head([[0.0], [math.log(3)]])(hidden, labels).values()
    assert losses.tolist() == pytest.approx([math.log(4), math.log(4 / 3), math.log(4)])
    assert predictions.tolist() == [1, 1, 0]


def test_without_labels_it_gives_logits():
    assert head([[2.0, 0.0], [0.0, 3.0]])(torch.tensor([[[1.0, 1.0]]])).tolist() == [[[2.0, 3.0]]]


def test_a_temperature_divides_the_logits():
    # Logits (0, 2 ln 3) at temperature 2: the softmax is (1/4, 3/4).
    layer = head([[0.0], [2 * math.log(3)]])
    losses = layer(torch.tensor([[1.0], [1.0]]), torch.tensor([0, 1]), token_losses_at(2.0))["losses"]
    assert losses.tolist() == pytest.approx([math.log(4), math.log(4 / 3)])


def test_half_precision_is_summed_in_float32():
    hidden = torch.tensor([[1.0]], dtype=torch.bfloat16)
    losses = head([[0.0], [1.0]], torch.bfloat16)(hidden, torch.tensor([0]))["losses"]
    assert losses.dtype == torch.float32
    assert losses.item() == pytest.approx(math.log(1 + math.e), rel=1e-6)


def test_no_position_gives_a_zero_that_reaches_weight_and_hidden_states():
    layer, states = head([[1.0, 2.0], [3.0, 4.0]]), torch.ones(3, 2, requires_grad=True)
    losses, predictions = layer(states[:0], torch.zeros(0, dtype=torch.long)).values()
    losses.sum().backward()
    assert losses.shape == predictions.shape == (0,)
    assert layer.weight.grad.abs().sum() == 0 and states.grad.abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_chunks_give_the_same_losses_predictions_and_gradients(dtype, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    weight, states = (torch.randn(n, 16, generator=generator).to(dtype) for n in (50, 23))
    labels = torch.randint(0, 50, (23,), generator=generator)
    weights_of_losses = torch.rand(23, generator=generator)
    found = []
    for numbers in (1 << 20, 50 * 5):  # at once; five positions at a time, three in the last chunk
        monkeypatch.setattr(head_module, "CHUNK_NUMBERS", numbers)
        layer = VocabularyHead(nn.Parameter(weight.clone()))
        hidden = states.clone().requires_grad_()
        losses, predictions = layer(hidden, labels).values()
        (losses * weights_of_losses).sum().backward()
        found.append((losses.detach(), predictions, hidden.grad, layer.weight.grad))
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    for whole, chunked in zip(*found, strict=True):
        assert chunked.dtype == whole.dtype
        assert torch.allclose(chunked.double(), whole.double(), **tolerance)


def test_a_frozen_head_makes_no_gradient_of_its_weight(monkeypatch):
    monkeypatch.setattr(head_module, "CHUNK_NUMBERS", 4)
    layer, hidden = head([[1.0, 0.0], [0.0, 1.0]]).requires_grad_(False), torch.ones(5, 2, requires_grad=True)
    losses = layer(hidden, torch.zeros(5, dtype=torch.long))["losses"]
    losses.sum().backward()
    assert layer.weight.grad is None
    assert torch.allclose(hidden.grad, torch.tensor([[-0.5, 0.5]]).expand(5, 2))
