"""Greedy generation with the training modules, in lockstep over ranks: all of them run equally many decoder steps, so expert
parallelism never waits for a rank that has finished.

Shapes: B documents, L tokens of the longest prompt, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from omni_train.data.contracts import Pack
from omni_train.engine.parallel import any_rank
from omni_train.models.thinker import LanguageModel
from omni_train.models.towers import MediaEmbeds


def left_pad(values: Tensor, starts: list[int], width: int) -> Tensor:
    """Rows cut from values [T, ...] at ``starts`` (one more than rows), right-aligned in [B, width, ...], zeros before."""
    out = values.new_zeros(len(starts) - 1, width, *values.shape[1:])
    for row, (a, b) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        out[row, width - (b - a) :] = values[a:b]
    return out


@torch.no_grad()
def greedy(
    llm: LanguageModel, pack: Pack, media: MediaEmbeds | None, *, stop_id: int, max_new_tokens: int
) -> list[list[int]]:
    """Most likely continuation of each document of ``pack``: token ids, without the stop token. Collective."""
    device = pack.input_ids.device
    starts = pack.cu_seqlens.tolist()
    lengths = torch.tensor([b - a for a, b in zip(starts[:-1], starts[1:], strict=True)], device=device)
    width = int(lengths.max())
    embeds, is_visual, deepstack = llm.merge(pack.input_ids, media)
    embeds = left_pad(embeds, starts, width)
    positions = left_pad(pack.position_ids.T, starts, width).permute(2, 0, 1)  # [4, B, L]
    is_visual = None if is_visual is None else left_pad(is_visual, starts, width)
    slots = torch.arange(width, device=device)
    is_real = slots >= (width - lengths)[:, None]  # [B, L]
    # A padding slot sees itself: a row without any key would be NaN and spread through the experts.
    mask = (slots[None, :] <= slots[:, None]) & (is_real[:, None, :] | torch.eye(width, dtype=torch.bool, device=device))
    cache = DynamicCache(config=llm.config)
    logits = llm.step(embeds, positions, mask[:, None], cache, is_visual, deepstack)

    position = torch.stack([lengths - 1, *[positions[1:].amax(dim=(0, 2))] * 3])  # [4, B], the last one used
    answers: list[list[int]] = [[] for _ in lengths]
    is_open = torch.ones(len(lengths), dtype=torch.bool, device=device)
    for number in range(max_new_tokens):
        token = logits.argmax(-1)
        is_open &= token != stop_id
        for row in is_open.nonzero().flatten().tolist():
            answers[row].append(int(token[row]))
        if number + 1 == max_new_tokens or not any_rank(bool(is_open.any()), device):
            break
        position = position + 1
        is_real = torch.cat([is_real, torch.ones_like(is_real[:, :1])], dim=1)
        embeds = llm.model.embed_tokens(token)[:, None]
        logits = llm.step(embeds, position[:, :, None], is_real[:, None, None, :], cache)
    return answers
