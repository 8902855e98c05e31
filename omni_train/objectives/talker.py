"""Cross-entropy of a frame's codes with the router's balance loss: sums, to be divided by global counts.

Terms: the first code of each frame and the end of speech; the residual codes that the MTP predicts; the router.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from omni_train.data.contracts import IGNORE_INDEX, Pack
from omni_train.objectives import next_token
from omni_train.objectives.next_token import by_modality
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
    num_reported = len(losses) if pack.sample_ids else 0
    return Losses(
        [
            LossTerm(engine, "codes", losses.sum() * is_real, "codes"),
            LossTerm(engine, "residuals", output["residual_losses"].sum() * is_real, "residuals"),
            router_term(output, pack, engine, router_fractions, router_aux_coef),
        ],
        by_modality(losses[:num_reported], modality[:num_reported]),
        output["router_counts"] * is_real,
    )


def router_term(
    output: dict[str, Tensor], pack: Pack, engine: str, router_fractions: Tensor, router_aux_coef: float
) -> LossTerm:
    """The balance loss of a Talker's router on a pack; zero for a pack without samples."""
    (term,) = next_token.router_term(output, engine, router_fractions, router_aux_coef)
    return replace(term, sum=term.sum * float(bool(pack.sample_ids)))
