"""Held-out loss and exact match by modality, teacher-forced.

A greedy answer equals its reference exactly if and only if every labelled position's argmax is its label, so exact
match needs no generation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from omni_train.data.contracts import MODALITIES, BadSample, Pack, PackPlan
from omni_train.engine.parallel import Ranks, sum_over_ranks


@torch.no_grad()
def heldout_losses(
    forward: Callable[[Pack], dict[str, Tensor]],
    plans: list[PackPlan],
    load_pack: Callable[[PackPlan], Pack],
    make_dummy: Callable[[], Pack],
    ranks: Ranks,
) -> tuple[dict[str, float], list[BadSample]]:
    """(metrics over all packs, the samples that this rank's packs had to leave out).

    Metrics: {"loss/<modality>": nats a token, "exact/<modality>": fraction of documents}.
    Collective: every rank runs equally many forwards (dummies where it has no pack).
    """
    sums = torch.zeros(4, len(MODALITIES), dtype=torch.float64, device=ranks.device)
    bad: list[BadSample] = []
    for first in range(0, len(plans), ranks.world):
        mine = first + ranks.rank
        pack = (load_pack(plans[mine]) if mine < len(plans) else make_dummy()).to(ranks.device)
        bad += pack.bad_samples
        output = forward(pack)
        if pack.sample_ids:
            sums += pack_sums(output, len(pack.cu_seqlens) - 1)
    sum_over_ranks(sums)
    metrics = {}
    for number, name in enumerate(MODALITIES):
        if sums[1, number] > 0:
            metrics[f"loss/{name}"] = float(sums[0, number] / sums[1, number])
        if sums[3, number] > 0:
            metrics[f"exact/{name}"] = float(sums[2, number] / sums[3, number])
    return metrics, bad


def pack_sums(output: dict[str, Tensor], num_documents: int) -> Tensor:
    """[4, M] by modality: loss, what it counts, documents answered exactly, documents with a label.

    Without labels (waves), the last two stay 0.
    """
    losses, modality = output["losses"].double(), output["modality"]
    sums = torch.zeros(4, len(MODALITIES), dtype=torch.float64, device=losses.device)
    sums[0].index_add_(0, modality, losses)
    sums[1].index_add_(0, modality, torch.ones_like(losses))
    if "labels" not in output:
        return sums
    labels, document = output["labels"], output["document"]
    wrong = torch.zeros(num_documents, dtype=torch.float64, device=labels.device)
    wrong.index_add_(0, document, (output["predictions"] != labels).double())
    labelled = torch.zeros(num_documents, dtype=torch.bool, device=labels.device)
    labelled[document] = True
    kind = torch.zeros(num_documents, dtype=torch.long, device=labels.device)
    kind[document] = modality
    sums[2].index_add_(0, kind[labelled], (wrong[labelled] == 0).double())
    sums[3].index_add_(0, kind[labelled], torch.ones_like(wrong[labelled]))
    return sums
