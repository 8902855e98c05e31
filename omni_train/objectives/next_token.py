"""Cross-entropy at labelled positions with the router's balance loss: sums, to be divided by global counts.

Used by the Thinker (next token) and by the encoder–decoders (next token given media).
K labelled positions, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from omni_train.data.contracts import IGNORE_INDEX, MODALITIES, Pack
from omni_train.models.moe import balance_loss_sum
from omni_train.objectives.terms import Losses, LossTerm


def counts(pack: Pack) -> dict[str, int]:
    """Counts that a pack adds to the global divisors. A pack without samples adds nothing."""
    if not pack.sample_ids:
        return {"labels": 0, "tokens": 0}
    return {"labels": int((pack.shift_labels != IGNORE_INDEX).sum()), "tokens": pack.num_tokens}


def by_modality(values_K: Tensor, modality_K: Tensor) -> dict[str, Tensor]:
    """Reports {"loss/<modality>": (sum, count)} of values at labelled positions."""
    pairs = torch.zeros(2, len(MODALITIES), dtype=torch.float64, device=values_K.device)
    if len(modality_K):
        pairs[0].index_add_(0, modality_K, values_K.detach().double())
        pairs[1].index_add_(0, modality_K, torch.ones_like(values_K, dtype=torch.float64))
    return {f"loss/{name}": pairs[:, number] for number, name in enumerate(MODALITIES)}


def router_term(output: dict[str, Tensor], engine: str, fractions: Tensor | None, coefficient: float) -> list[LossTerm]:
    """The balance loss of a model's output, given the previous step's global expert fractions; [] without a router."""
    if fractions is None:
        return []
    return [
        LossTerm(engine, "router", balance_loss_sum(output["router_probabilities"], fractions), "tokens", coefficient)
    ]


def ctc_loss_sum(logits_DSU: Tensor, lengths_D: Tensor, targets_N: Tensor, target_lengths_D: Tensor) -> Tensor:
    """Σ over documents of the CTC loss in nats (Graves et al. 2006) of the targets, concatenated over documents.

    U classes, the blank last. A document whose targets do not fit into its steps counts zero.
    """
    log_probabilities_SDU = logits_DSU.float().log_softmax(-1).transpose(0, 1)
    return F.ctc_loss(
        log_probabilities_SDU,
        targets_N,
        lengths_D,
        target_lengths_D,
        blank=logits_DSU.shape[-1] - 1,
        reduction="sum",
        zero_infinity=True,
    )


def next_token_losses(
    output: dict[str, Tensor],
    engine: str,
    router_fractions: Tensor | None,
    router_aux_coef: float,
    ctc_weight: float = 0.0,
) -> Losses:
    """Loss terms of a model's output (see LanguageModel.forward and EncoderDecoder.forward).

    ``router_fractions`` [L, E] are the previous step's global expert fractions; None where there is no router.
    """
    losses = output["losses"]
    terms = [LossTerm(engine, "next_token", losses.sum(), "labels")]
    terms += router_term(output, engine, router_fractions, router_aux_coef)
    if ctc_weight > 0:
        targets = output["ctc_targets"], output["ctc_target_lengths"]
        if len(targets[0]):
            ctc = ctc_loss_sum(output["ctc_logits"], output["ctc_lengths"], *targets)
        else:
            ctc = output["ctc_logits"].sum() * 0.0
        terms.append(LossTerm(engine, "ctc", ctc, "labels", ctc_weight))
    return Losses(terms, by_modality(losses, output["modality"]), output.get("router_counts"))
