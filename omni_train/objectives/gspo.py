"""GSPO, Group Sequence Policy Optimization (Zheng et al. 2025, arXiv 2507.18071).

    rewards of a prompt's N answers → advantages → Σ over answers of −min(s A, clip(s) A)

with s = exp(mean over the answer's tokens of log π(token) − log π_sampled(token)): one ratio an answer, not one a
token, which is what keeps a mixture of experts stable, whose routing changes between sampling and training.

Shapes: K answer tokens of a pack, D answers, G groups of N answers to one prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from omni_train.data.contracts import IGNORE_INDEX, Pack
from omni_train.objectives.next_token import counts as token_counts
from omni_train.objectives.next_token import router_term
from omni_train.objectives.terms import Losses, LossTerm

ADVANTAGE_EPSILON = 1e-4  # TRL's
SIGNAL_EPSILON = 1e-8


@dataclass(slots=True)
class AnswerLosses:
    """Per answer [D]: the loss with gradient; the ratio s, whether clipping binds, and the mean KL, without."""

    loss: Tensor
    ratio: Tensor
    is_clipped: Tensor
    kl: Tensor


def group_advantages(rewards_GN: Tensor, scale: bool = True) -> Tensor:
    """Rewards less their group's mean, over its standard deviation (N − 1 in its denominator) if ``scale``: [G, N]."""
    centred = rewards_GN - rewards_GN.mean(-1, keepdim=True)
    if not scale:
        return centred
    return centred / (rewards_GN.std(-1, keepdim=True) + ADVANTAGE_EPSILON)


def has_signal(rewards_GN: Tensor) -> Tensor:
    """Whether a group's rewards differ, bool [G]: where they do not, every advantage is zero."""
    return rewards_GN.amax(-1) - rewards_GN.amin(-1) > SIGNAL_EPSILON


def answer_means(values_K: Tensor, document_K: Tensor, num_documents: int) -> Tensor:
    """Mean of ``values`` over each document's positions [D]; 0 for a document without any."""
    zeros = values_K.new_zeros(num_documents)
    lengths = zeros.index_add(0, document_K, torch.ones_like(values_K)).clamp(min=1)
    return zeros.index_add(0, document_K, values_K) / lengths


def gspo_loss(
    log_probabilities_K: Tensor,
    sampled_K: Tensor,
    document_K: Tensor,
    advantages_D: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    reference_K: Tensor | None = None,
    kl_weight: float = 0.0,
) -> AnswerLosses:
    """The loss of each answer, eq. 5 of arXiv 2507.18071 without its means over answers and groups.

    Log-probabilities in nats of the answers' tokens: the policy's with gradient, those they were sampled with, and the
    ``reference``'s. ``document`` [K] says whose token it is. With ``kl_weight`` the mean over an answer's tokens of
    Schulman's estimate of KL(policy ‖ reference), exp(r − p) − (r − p) − 1, is added.
    """
    num_documents = len(advantages_D)
    ratio = answer_means(log_probabilities_K - sampled_K, document_K, num_documents).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantages_D, clipped * advantages_D)
    kl = torch.zeros_like(loss)
    if reference_K is not None:
        gap = reference_K - log_probabilities_K
        kl = answer_means(gap.exp() - gap - 1, document_K, num_documents)
        loss = loss + kl_weight * kl
    binds = ((ratio < 1 - clip_low) & (advantages_D < 0)) | ((ratio > 1 + clip_high) & (advantages_D > 0))
    return AnswerLosses(loss, ratio.detach(), binds, kl.detach())


def counts(pack: Pack) -> dict[str, int]:
    """Counts that a pack adds to the global divisors: answers beside labels and tokens."""
    return {"answers": len(pack.advantages) if pack.sample_ids else 0, **token_counts(pack)}


def gspo_losses(
    output: dict[str, Tensor],
    pack: Pack,
    engine: str,
    router_fractions: Tensor | None,
    router_aux_coef: float,
    *,
    clip_low: float,
    clip_high: float,
    reference_K: Tensor | None = None,
    kl_weight: float = 0.0,
) -> Losses:
    """Loss terms of the policy's output on a pack of rollouts, a mean over the answers of all ranks.

    Reports the ratio, the share of answers where clipping binds, the KL, and the pack's own statistics.
    """
    if pack.sample_ids:
        found = gspo_loss(
            -output["losses"],
            pack.sampled_log_probabilities[pack.shift_labels != IGNORE_INDEX],
            output["document"],
            pack.advantages,
            clip_low=clip_low,
            clip_high=clip_high,
            reference_K=reference_K,
            kl_weight=kl_weight,
        )
        means = {"gspo/ratio": found.ratio, "gspo/clipped": found.is_clipped}
        if reference_K is not None:
            means["gspo/kl"] = found.kl
        total = found.loss.sum()
    else:  # a dummy: the same terms and reports as on every rank
        total = output["losses"].sum() * 0.0
        means = dict.fromkeys(["gspo/ratio", "gspo/clipped", *(["gspo/kl"] if kl_weight else [])], total.new_zeros(0))
    terms = [LossTerm(engine, "gspo", total, "answers")]
    terms += router_term(output, engine, router_fractions, router_aux_coef)
    reported = {name: torch.stack([v.double().sum(), v.double().new_tensor(len(v))]) for name, v in means.items()}
    reported |= {name: pair.to(total.device) for name, pair in pack.statistics.items()}
    return Losses(terms, reported, output.get("router_counts"))
