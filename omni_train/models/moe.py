"""Router load balance of the global batch, and the health of the experts.

Qwen3's balance loss is taken over the global batch. Written with the *previous step's* global expert fractions it is
linear in the tokens, so it is the same for every split of a step into ranks and micro-batches:

    aux = E · mean over layers of Σ_e f_e · (Σ_t p_te) / tokens        (1 at perfect balance)

with f_e the fraction of all assignments that went to expert e in the step before, p_te the softmax of the router.

Shapes: L layers, E experts, T tokens.
"""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor, nn


def router_of(mlp: nn.Module) -> nn.Module:
    """The module whose output is a MoE block's router logits [T, E], in stock form and under AutoEP."""
    return mlp.router.gate if hasattr(mlp, "router") else mlp.gate


class RouterTap:
    """Records router logits of a decoder's layers while active: ``with RouterTap(layers) as tap: ...; tap.logits``.

    NOTE: upstream's recorder finds nothing under AutoEP (class names change), hence plain hooks. They are taken off
    before backward, so recomputed layers do not record twice.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        self.layers = layers
        self.logits: list[Tensor] = []

    def __enter__(self) -> RouterTap:
        def record(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
            self.logits.append(output[0] if isinstance(output, tuple) else output)

        self.handles = [router_of(layer.mlp).register_forward_hook(record) for layer in self.layers]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self.handles:
            handle.remove()


def router_sums(logits: list[Tensor], top_k: int) -> tuple[Tensor, Tensor]:
    """(Σ_t p_te [L, E] with gradient, assignments per expert [L, E] without) of router logits, one [T, E] a layer."""
    rows = [layer.reshape(-1, layer.shape[-1]) for layer in logits]
    probabilities = torch.stack([row.float().softmax(-1).sum(0) for row in rows])
    with torch.no_grad():
        counts = torch.zeros_like(probabilities)
        for own, row in zip(counts, rows, strict=True):  # NOTE: bincount would wait for the device
            chosen = row.topk(top_k).indices.flatten()
            own.scatter_add_(0, chosen, torch.ones_like(chosen, dtype=own.dtype))
    return probabilities, counts


def balance_loss_sum(probability_sums_LE: Tensor, fractions_LE: Tensor) -> Tensor:
    """Σ over tokens of the balance loss, mean over layers: 1 a token at perfect balance."""
    num_layers, num_experts = probability_sums_LE.shape
    return num_experts * (fractions_LE * probability_sums_LE).sum() / num_layers


def expert_health(counts_LE: Tensor) -> dict[str, float]:
    """Load balance of a step's assignments: max_violation = largest load / mean load − 1; experts without any."""
    load = counts_LE / counts_LE.mean(-1, keepdim=True).clamp(min=1e-9)
    return {
        "moe/max_violation": float(load.max() - 1.0),
        "moe/dead_experts": float((counts_LE == 0).sum()),
    }
