"""Cross-entropy of a frame's codes with the router's balance loss: sums, to be divided by global counts.

Terms: the first code of each frame and the end of speech; the residual codes that the MTP predicts; the router.
"""

from __future__ import annotations

import torch
from torch import Tensor

from omni_train.data.contracts import IGNORE_INDEX, MODALITIES, Pack
from omni_train.models.moe import balance_loss_sum
from omni_train.objectives.terms import Losses, LossTerm


def counts(pack: Pack) -> dict[str, int]:
    """Counts that a pack adds to the global divisors. A pack without samples adds nothing."""
    if not pack.sample_ids:
        return {"codes": 0, "residuals": 0, "tokens": 0}
    speech = pack.speech
    assert speech is not None
    return {
        "codes": int((speech.shift_labels != IGNORE_INDEX).sum()),
        "residuals": int(speech.codes[1:].numel()),
        "tokens": speech.num_tokens,
    }


def talker_losses(
    output: dict[str, Tensor], pack: Pack, engine: str, router_fractions: Tensor, router_aux_coef: float
) -> Losses:
    """Loss terms of a Talker's output (see Talker.forward) on a pack; zero for a pack without samples.

    ``router_fractions`` [L, E] are the previous step's global expert fractions.
    """
    is_real = float(bool(pack.sample_ids))
    losses = output["losses"]
    assert pack.speech is not None
    modality = pack.doc_modality[pack.speech.document[output["sequence"]]]
    by_modality = torch.zeros(2, len(MODALITIES), dtype=torch.float64, device=losses.device)
    by_modality[0].index_add_(0, modality, losses.detach().double() * is_real)
    by_modality[1].index_add_(0, modality, torch.full_like(losses, is_real, dtype=torch.float64))
    return Losses(
        [
            LossTerm(engine, "codes", losses.sum() * is_real, "codes"),
            LossTerm(engine, "residuals", output["residual_losses"].sum() * is_real, "residuals"),
            router_term(output, pack, engine, router_fractions, router_aux_coef),
        ],
        {f"loss/{name}": by_modality[:, number] for number, name in enumerate(MODALITIES)},
        output["router_counts"] * is_real,
    )


def router_term(
    output: dict[str, Tensor], pack: Pack, engine: str, router_fractions: Tensor, router_aux_coef: float
) -> LossTerm:
    """The balance loss of a Talker's router on a pack."""
    aux = balance_loss_sum(output["router_probabilities"], router_fractions) * float(bool(pack.sample_ids))
    return LossTerm(engine, "router", aux, "tokens", router_aux_coef)
