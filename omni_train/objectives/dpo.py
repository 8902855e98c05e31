"""Direct preference optimisation of a Talker: pairs of replies against a frozen reference.

A reply's log-probability is that of all its codes: the first code of each frame, its residual codes given those before
them, and the end of speech.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from omni_train.data.contracts import Pack
from omni_train.objectives.talker import router_term
from omni_train.objectives.terms import Losses, LossTerm


def counts(pack: Pack) -> dict[str, int]:
    """Counts that a pack adds to the global divisors. A pack without samples adds nothing."""
    if not pack.sample_ids:
        return {"pairs": 0, "chosen_codes": 0, "tokens": 0}
    speech = pack.speech
    assert speech is not None
    num_pairs, num_frames = len(speech.document) // 2, int(speech.code_lengths[::2].sum())
    chosen_codes = num_frames * speech.codes.shape[0] + num_pairs  # each reply ends with one
    return {"pairs": num_pairs, "chosen_codes": chosen_codes, "tokens": speech.num_tokens}


def sequence_log_probs(output: dict[str, Tensor], num_sequences: int) -> Tensor:
    """Log-probability in nats of all codes of each sequence, [Q] float32, from a Talker's output (Talker.forward)."""
    total = output["losses"].new_zeros(num_sequences)
    total = total.index_add(0, output["sequence"], -output["losses"])
    return total.index_add(0, output["frame_sequence"], -output["residual_losses"].sum(1))


def dpo_losses(
    chosen_B: Tensor, rejected_B: Tensor, reference_chosen_B: Tensor, reference_rejected_B: Tensor, *, beta: float
) -> tuple[Tensor, Tensor]:
    """(losses [B], margins [B]) of B pairs (Rafailov et al. 2023, eq. 7); a margin is β × the difference of log-ratios.

    Log-probabilities: [B] in nats, summed over the reply's codes, the context excluded.
    """
    margins = beta * ((chosen_B - rejected_B) - (reference_chosen_B - reference_rejected_B))
    return -F.logsigmoid(margins), margins


def talker_dpo_losses(
    output: dict[str, Tensor],
    reference: dict[str, Tensor],
    pack: Pack,
    engine: str,
    router_fractions: Tensor,
    router_aux_coef: float,
    beta: float,
    sft_weight: float = 0.0,
) -> Losses:
    """Loss terms of a Talker's output on a pack whose sequences are chosen, rejected, chosen, … and the reference's.

    With ``sft_weight`` the chosen replies are also learned code by code, as by TRL's loss "sft".
    Reported: the mean margin, and how often the chosen reply has the larger one.
    """
    assert pack.speech is not None
    is_real, num_sequences = float(bool(pack.sample_ids)), len(pack.speech.document)
    chosen, rejected = sequence_log_probs(output, num_sequences).view(-1, 2).unbind(1)
    with torch.no_grad():
        reference_chosen, reference_rejected = sequence_log_probs(reference, num_sequences).view(-1, 2).unbind(1)
    losses, margins = dpo_losses(chosen, rejected, reference_chosen, reference_rejected, beta=beta)
    margins = margins.detach().double()
    count = torch.tensor(len(margins) * is_real, dtype=torch.float64, device=margins.device)
    terms = [LossTerm(engine, "dpo", losses.sum() * is_real, "pairs")]
    if sft_weight:
        terms.append(LossTerm(engine, "sft", -chosen.sum() * is_real, "chosen_codes", sft_weight))
    return Losses(
        [*terms, router_term(output, pack, engine, router_fractions, router_aux_coef)],
        {
            "dpo/margin": torch.stack([margins.sum() * is_real, count]),
            "dpo/accuracy": torch.stack([(margins > 0).double().sum() * is_real, count]),
        },
        output["router_counts"] * is_real,
    )
