"""Distillation: how far the student's next-token distribution is from a teacher's, position by position.

    frozen teacher(pack) → hidden states ─┐
    student(pack) ────────────────────────┴→ divergences [K] in nats at the labelled positions

Off policy the pack's replies are the data's or the teacher's own; on policy they are the student's rollouts (Agarwal et
al. 2023, arXiv 2306.13649). The logits of both models exist only for a chunk of positions at a time.

Shapes: K labelled positions, V vocabulary, Hs and Ht hidden widths, C positions of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from omni_train.data.contracts import Pack
from omni_train.models import head
from omni_train.models.head import Scores
from omni_train.objectives.next_token import by_modality, router_term
from omni_train.objectives.terms import Losses, LossTerm


@dataclass(slots=True)
class TeacherStates:
    """What a teacher says of a pack: its last hidden states at the labelled positions [K, Ht], its head [V, Ht]."""

    hidden: Tensor
    weight: Tensor


@torch.no_grad()
def states_of(teacher: Any, pack: Pack) -> TeacherStates:
    """What a Thinker says of a pack."""
    hidden = teacher(pack, lambda hidden, weight, labels: {"hidden": hidden})["hidden"]
    return TeacherStates(hidden, teacher.llm.lm_head.weight)


def generalized_jsd(student_KV: Tensor, teacher_KV: Tensor, beta: float, temperature: float = 1.0) -> Tensor:
    """Divergence [K] in nats of softmax(student / temperature) from softmax(teacher / temperature), summed over V.

    ``beta`` 0: forward KL(teacher ‖ student); 1: reverse KL(student ‖ teacher); between: β KL(t ‖ m) + (1 − β)
    KL(s ‖ m) with m = β t + (1 − β) s (arXiv 2306.13649, eq. 1). Raises ValueError for a β outside 0 … 1 or a
    temperature ≤ 0.
    """
    check(beta, temperature)
    log_s = (student_KV / temperature).log_softmax(-1)
    log_t = (teacher_KV / temperature).log_softmax(-1)
    return _divergence(log_s, log_t, beta)


def check(beta: float, temperature: float) -> None:
    """Raises ValueError for a β outside 0 … 1 or a temperature that is not positive."""
    if not 0 <= beta <= 1:
        raise ValueError(f"beta ({beta}) must lie within 0 (forward KL) and 1 (reverse KL)")
    if temperature <= 0:
        raise ValueError(f"temperature ({temperature}) must be positive")


def _mixture(log_s: Tensor, log_t: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(log_s + math.log1p(-beta), log_t + math.log(beta))


def _divergence(log_s: Tensor, log_t: Tensor, beta: float) -> Tensor:
    if beta == 0:
        return (log_t.exp() * (log_t - log_s)).sum(-1)
    if beta == 1:
        return (log_s.exp() * (log_s - log_t)).sum(-1)
    log_m = _mixture(log_s, log_t, beta)
    return (beta * log_t.exp() * (log_t - log_m) + (1 - beta) * log_s.exp() * (log_s - log_m)).sum(-1)


def _gradient(log_s: Tensor, log_t: Tensor, beta: float) -> Tensor:
    """∂ divergence / ∂ (student logits / temperature), [C, V]."""
    s = log_s.exp()
    if beta == 0:
        return s - log_t.exp()
    gap = log_s - (log_t if beta == 1 else _mixture(log_s, log_t, beta))
    return (1.0 if beta == 1 else 1 - beta) * s * (gap - (s * gap).sum(-1, keepdim=True))


class _ChunkedDivergence(torch.autograd.Function):
    """Divergences, the student's cross-entropies and predictions chunk by chunk; the backward makes logits again.

    Only the divergences have a gradient, and only to the student's hidden states and head.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, teacher_hidden, teacher_weight, beta, temperature, chunk):
        divergences = torch.empty(len(labels), device=hidden.device)
        losses, predictions = torch.empty_like(divergences), torch.empty_like(labels)
        for start in range(0, len(labels), chunk):
            part = slice(start, start + chunk)
            student = F.linear(hidden[part], weight).float()
            teacher = F.linear(teacher_hidden[part], teacher_weight).float()
            losses[part] = F.cross_entropy(student, labels[part], reduction="none")
            predictions[part] = student.argmax(-1)
            log_s, log_t = ((logits / temperature).log_softmax(-1) for logits in (student, teacher))
            divergences[part] = _divergence(log_s, log_t, beta)
        ctx.save_for_backward(hidden, weight, teacher_hidden, teacher_weight)
        ctx.settings = beta, temperature, chunk
        ctx.mark_non_differentiable(losses, predictions)
        return divergences, losses, predictions

    @staticmethod
    def backward(ctx, grad_divergences, *_):
        hidden, weight, teacher_hidden, teacher_weight = ctx.saved_tensors
        beta, temperature, chunk = ctx.settings
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            log_s = (F.linear(hidden[part], weight).float() / temperature).log_softmax(-1)
            log_t = (F.linear(teacher_hidden[part], teacher_weight).float() / temperature).log_softmax(-1)
            grad = _gradient(log_s, log_t, beta) * (grad_divergences[part, None] / temperature)
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.T @ hidden[part]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), *[None] * 6


def divergence_from(teacher: TeacherStates, beta: float, temperature: float) -> Callable[..., Scores]:
    """A student's head: ``divergences`` [K] from the teacher, and its ``losses`` and ``predictions`` for reports."""
    check(beta, temperature)

    def scores(hidden: Tensor, weight: Tensor, labels: Tensor) -> Scores:
        if len(labels) == 0:  # still a function of the weight: ZeRO-3 needs every rank to call the head once
            nothing = head.nothing_of(hidden, weight)
            return {"divergences": nothing, "losses": nothing.detach(), "predictions": labels}
        if weight.shape[0] != teacher.weight.shape[0]:
            raise ValueError(
                f"the teacher's vocabulary has {teacher.weight.shape[0]:,} tokens, the student's {weight.shape[0]:,}; "
                "distillation compares token by token: take a teacher with this tokenizer"
            )
        chunk = max(1, head.CHUNK_NUMBERS // (2 * weight.shape[0]))
        divergences, losses, predictions = _ChunkedDivergence.apply(
            hidden, weight, labels, teacher.hidden, teacher.weight, beta, temperature, chunk
        )
        return {"divergences": divergences, "losses": losses, "predictions": predictions}

    return scores


def distillation_losses(
    output: dict[str, Tensor], pack: Pack, engine: str, router_fractions: Tensor | None, router_aux_coef: float
) -> Losses:
    """Loss terms of a student's output on a pack, its head being ``divergence_from`` a teacher.

    Reports the divergence by modality, ``loss/next_token``, the student's cross-entropy on the same tokens, and the
    statistics of a pack of rollouts.
    """
    terms = [LossTerm(engine, "distillation", output["divergences"].sum(), "labels")]
    terms += router_term(output, engine, router_fractions, router_aux_coef)
    losses = output["losses"].double()
    reported = by_modality(output["divergences"], output["modality"])
    reported["loss/next_token"] = torch.stack([losses.sum(), torch.ones_like(losses).sum()])
    reported |= {name: pair.to(losses.device) for name, pair in pack.statistics.items()}
    return Losses(terms, reported, output.get("router_counts"))
