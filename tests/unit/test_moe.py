"""Router sums, the balance loss and expert health by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from omni_train.models.moe import RouterTap, balance_loss_sum, expert_health, router_of, router_sums

# Softmax of these rows: (1/2, 1/4, 1/4), (1/8, 1/8, 3/4).
TWO_TOKENS = torch.tensor([[math.log(2), 0.0, 0.0], [0.0, 0.0, math.log(6)]])


def test_router_sums_by_hand():
    probabilities, counts = router_sums([TWO_TOKENS, TWO_TOKENS[:1]], top_k=1)
    expected = torch.tensor([[5 / 8, 3 / 8, 1.0], [1 / 2, 1 / 4, 1 / 4]])
    assert torch.allclose(probabilities, expected, atol=1e-7)
    assert counts.tolist() == [[1, 0, 1], [1, 0, 0]]
    _, pairs = router_sums([torch.tensor([[3.0, 1.0, 2.0], [0.0, 2.0, 1.0]])], top_k=2)
    assert pairs.tolist() == [[1, 1, 2]]


def test_balance_loss_by_hand():
    """E · mean over layers of Σ_e f_e Σ_t p_te: 3 · ½ · ((½ · 5/8 + ½ · 1) + (1 · ¼))."""
    probabilities = torch.tensor([[5 / 8, 3 / 8, 1.0], [1 / 2, 1 / 4, 1 / 4]])
    fractions = torch.tensor([[0.5, 0.0, 0.5], [0.0, 0.0, 1.0]])
    assert float(balance_loss_sum(probabilities, fractions)) == pytest.approx(3 / 2 * (13 / 16 + 1 / 4))


@pytest.mark.parametrize("num_experts, top_k", [(4, 1), (8, 2), (128, 8)])
def test_one_a_token_at_balance(num_experts, top_k):
    """Even fractions give 1 a token whatever the router says; so do even probabilities whatever the fractions."""
    logits = [torch.randn(50, num_experts) for _ in range(3)]
    even = torch.full((3, num_experts), 1 / num_experts)
    probabilities, counts = router_sums(logits, top_k)
    assert float(balance_loss_sum(probabilities, even)) == pytest.approx(50, rel=1e-5)
    flat, _ = router_sums([torch.zeros(50, num_experts)] * 3, top_k)
    fractions = counts / counts.sum(-1, keepdim=True)
    assert float(balance_loss_sum(flat, fractions)) == pytest.approx(50, rel=1e-5)
    assert counts.sum(-1).tolist() == [50 * top_k] * 3


def test_all_on_one_expert_costs_the_number_of_experts():
    logits = torch.full((10, 8), -100.0)
    logits[:, 3] = 100.0
    probabilities, _ = router_sums([logits], top_k=1)
    fractions = torch.zeros(1, 8)
    fractions[0, 3] = 1.0
    assert float(balance_loss_sum(probabilities, fractions)) == pytest.approx(80)


@pytest.mark.parametrize("cuts", [[37], [1, 36], [12, 13, 12]])
def test_the_loss_is_linear_over_splits(cuts):
    logits = torch.randn(2, 37, 6, dtype=torch.float64, requires_grad=True)
    fractions = torch.rand(2, 6)
    whole = balance_loss_sum(router_sums(list(logits), 2)[0], fractions)
    (gradient,) = torch.autograd.grad(whole, logits)
    parts = [list(part) for part in logits.split(cuts, dim=1)]
    total = sum(balance_loss_sum(router_sums(part, 2)[0], fractions) for part in parts)
    (gradient_of_parts,) = torch.autograd.grad(total, logits)
    assert total.item() == pytest.approx(whole.item(), rel=1e-6)
    assert torch.allclose(gradient_of_parts, gradient, atol=1e-6)
    assert torch.equal(sum(router_sums(part, 2)[1] for part in parts), router_sums(list(logits), 2)[1])


def test_counts_carry_no_gradient_and_half_precision_is_summed_in_float32():
    logits = torch.randn(300, 4, requires_grad=True)
    probabilities, counts = router_sums([logits.bfloat16()], 2)
    assert probabilities.requires_grad and not counts.requires_grad
    assert probabilities.dtype == torch.float32
    assert float(probabilities.sum()) == pytest.approx(300, rel=1e-5)


def test_health_by_hand():
    """Loads 6 2 0 0 (mean 2) and 1 1 1 1: the worst is three times its mean, two experts are dead."""
    health = expert_health(torch.tensor([[6.0, 2.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]))
    assert health == {"moe/max_violation": 2.0, "moe/dead_experts": 2.0}


class _Layer(nn.Module):
    """A decoder layer with a router as transformers has it (``gate``) or as under AutoEP (``router.gate``)."""

    def __init__(self, is_sharded: bool) -> None:
        super().__init__()
        self.mlp, gate = nn.Module(), nn.Linear(3, 4, bias=False)
        if is_sharded:
            self.mlp.router = nn.Module()
            self.mlp.router.gate = gate
        else:
            self.mlp.gate = gate


@pytest.mark.parametrize("is_sharded", [False, True])
def test_the_tap_records_each_layer_once_and_only_while_open(is_sharded):
    layers = nn.ModuleList(_Layer(is_sharded) for _ in range(2))
    hidden = torch.randn(5, 3)
    with RouterTap(layers) as tap:
        outputs = [router_of(layer.mlp)(hidden) for layer in layers]
    router_of(layers[0].mlp)(hidden)
    assert len(tap.logits) == 2 and all(a is b for a, b in zip(tap.logits, outputs, strict=True))
