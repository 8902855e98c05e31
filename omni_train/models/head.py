"""The vocabulary head with its loss: a long pack's logits are never held whole.

Shapes: K labelled positions, H hidden, V vocabulary, C positions of a chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK_NUMBERS = 1 << 26
"""Logits held at once: 256 MB in fp32, 442 positions of Qwen3-Omni's vocabulary."""


class VocabularyHead(nn.Module):
    """A linear layer without bias onto the vocabulary, [V, H]."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [..., V] of hidden [..., H]; with ``labels`` [K] of hidden [K, H] instead (losses, predictions).

        Losses: cross-entropy in nats, [K] float32; predictions: the most likely tokens, [K]. No labels give no losses,
        still a function of the weight: ZeRO-3 needs every rank to call the head once.
        """
        if labels is None:
            return F.linear(hidden, self.weight)
        return vocabulary_losses(hidden, self.weight, labels)


def vocabulary_losses(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(losses, predictions) of hidden [K, H] under a head of weight [V, H], see VocabularyHead.forward."""
    if len(labels) == 0:
        return (0.0 * (weight.sum() + hidden.sum())).float().expand(0), labels
    if len(labels) * weight.shape[0] > CHUNK_NUMBERS:
        return _ChunkedLosses.apply(hidden, weight, labels, max(1, CHUNK_NUMBERS // weight.shape[0]))
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits.float(), labels, reduction="none"), logits.detach().argmax(-1)


class _ChunkedLosses(torch.autograd.Function):
    """Losses and predictions chunk by chunk; the backward makes each chunk's logits again."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        losses = torch.empty(len(labels), device=hidden.device)
        norms = torch.empty_like(losses)
        predictions = torch.empty_like(labels)
        for start in range(0, len(labels), chunk):
            part = slice(start, start + chunk)
            logits = F.linear(hidden[part], weight).float()
            norms[part] = logits.logsumexp(-1)
            losses[part] = norms[part] - logits.gather(-1, labels[part, None])[:, 0]
            predictions[part] = logits.argmax(-1)
        ctx.save_for_backward(hidden, weight, labels, norms)
        ctx.chunk = chunk
        ctx.mark_non_differentiable(predictions)
        return losses, predictions

    @staticmethod
    def backward(ctx, grad_losses: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, norms = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, len(labels), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            grad = (F.linear(hidden[part], weight).float() - norms[part, None]).exp()
            grad.scatter_add_(-1, labels[part, None], torch.full_like(norms[part, None], -1.0))
            grad = (grad * grad_losses[part, None]).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.T @ hidden[part]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None
