"""The vocabulary head with its loss: a long pack's logits are never held whole.

Shapes: K labelled positions, H hidden, V vocabulary, C positions of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK_NUMBERS = 1 << 26
"""Logits held at once: 256 MB in fp32, 442 positions of Qwen3-Omni's vocabulary."""


Scores = dict[str, Tensor]
"""What is made of hidden states at labelled positions, [K] each: ``losses`` and ``predictions`` unless asked else."""


def nothing_of(hidden: Tensor, weight: Tensor) -> Tensor:
    """No values [0], still a function of the weight: ZeRO-3 needs every rank to call the head once."""
    return (0.0 * (weight.sum() + hidden.sum())).float().expand(0)


def token_losses(hidden: Tensor, weight: Tensor, labels: Tensor) -> Scores:
    """Cross-entropy ``losses`` in nats, [K] float32, of labels [K], and the most likely tokens, ``predictions`` [K]."""
    if len(labels) == 0:
        return {"losses": nothing_of(hidden, weight), "predictions": labels}
    if len(labels) * weight.shape[0] > CHUNK_NUMBERS:
        chunk = max(1, CHUNK_NUMBERS // weight.shape[0])
        losses, predictions = _ChunkedLosses.apply(hidden, weight, labels, chunk)
    else:
        logits = F.linear(hidden, weight)
        losses = F.cross_entropy(logits.float(), labels, reduction="none")
        predictions = logits.detach().argmax(-1)
    return {"losses": losses, "predictions": predictions}


def token_losses_at(temperature: float) -> Callable[[Tensor, Tensor, Tensor], Scores]:
    """``token_losses`` of softmax(logits / temperature), which is what tokens are sampled from."""

    def scores(hidden: Tensor, weight: Tensor, labels: Tensor) -> Scores:
        return token_losses(hidden / temperature, weight, labels)

    return scores


class VocabularyHead(nn.Module):
    """A linear layer without bias onto the vocabulary, [V, H]."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        score: Callable[[Tensor, Tensor, Tensor], Scores] = token_losses,
    ) -> Tensor | Scores:
        """Logits [..., V] of hidden [..., H]; with ``labels`` [K] of hidden [K, H] what ``score`` makes of them."""
        if labels is None:
            return F.linear(hidden, self.weight)
        return score(hidden, self.weight, labels)


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
