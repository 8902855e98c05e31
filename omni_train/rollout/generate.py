"""Generation with the training modules: continuations of the Thinker, transcripts of AuT; greedy unless told else.

Both run in lockstep over ranks when asked to (``is_open_anywhere``): all ranks then take equally many decoder steps, so
expert parallelism never waits for a rank that has finished.

Shapes: B documents, L tokens of the longest prompt, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from omni_train.data.contracts import Pack
from omni_train.models.encoder_decoder import EncoderDecoder
from omni_train.models.thinker import LanguageModel
from omni_train.models.towers import MediaEmbeds

IsOpen = Callable[[bool], bool]
"""Whether any rank still has an unfinished answer, given whether this one has; ``bool`` for a rank on its own."""

Step = Callable[[Tensor, int, Tensor], Tensor]
"""``step(tokens [B], number, mask [B, 1, 1, past + 1])``: logits [B, V] after token ``number`` (from 1) of answers."""

Choose = Callable[[Tensor, Tensor], Tensor]
"""``choose(logits [B, V], rows [B])``: the next tokens [B] of the answers numbered ``rows``."""


def most_likely(logits_BV: Tensor, rows_B: Tensor) -> Tensor:
    """The greedy choice, [B]."""
    return logits_BV.argmax(-1)


def left_pad(values: Tensor, starts: list[int], width: int) -> Tensor:
    """Rows cut from values [T, ...] at ``starts`` (one more than rows), right-aligned in [B, width, ...]."""
    out = values.new_zeros(len(starts) - 1, width, *values.shape[1:])
    for row, (a, b) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        out[row, width - (b - a) :] = values[a:b]
    return out


def prompt_masks(lengths_B: Tensor) -> tuple[Tensor, Tensor]:
    """(is_real [B, L], mask [B, 1, L, L]) of left-padded prompts: causal, without looking at padding.

    A padding slot sees itself: a row without any key would be NaN and spread through the experts.
    """
    width = int(lengths_B.max())
    slots = torch.arange(width, device=lengths_B.device)
    is_real = slots >= (width - lengths_B)[:, None]
    itself = torch.eye(width, dtype=torch.bool, device=lengths_B.device)
    return is_real, ((slots[None, :] <= slots[:, None]) & is_real[:, None, :] | itself)[:, None]


def extend(
    logits_BV: Tensor,
    is_real_BL: Tensor,
    step: Step,
    *,
    stop_id: int,
    max_new_tokens: int,
    is_open_anywhere: IsOpen,
    choose: Choose = most_likely,
    keep: Callable[[Tensor], None] | None = None,
) -> list[list[int]]:
    """Answers without the stop token, from the logits after the prompts; ``choose`` takes a token of each row.

    ``keep(index)`` drops all other rows from what ``step`` remembers; with it, once half of the rows have ended, these
    are written no further (at least one row stays, for ranks that others still wait for).
    """
    answers: list[list[int]] = [[] for _ in logits_BV]
    rows = torch.arange(len(answers), device=logits_BV.device)
    is_open = torch.ones(len(answers), dtype=torch.bool, device=logits_BV.device)
    for number in range(1, max_new_tokens + 1):
        token = choose(logits_BV, rows)
        is_open &= token != stop_id
        for row, value, still in zip(rows.tolist(), token.tolist(), is_open.tolist(), strict=True):
            if still:
                answers[row].append(value)
        if number == max_new_tokens or not is_open_anywhere(bool(is_open.any())):
            break
        if keep is not None and len(rows) > 1 and 2 * int(is_open.sum()) <= len(rows):
            index = is_open.nonzero()[:, 0] if is_open.any() else rows.new_zeros(1)
            keep(index)
            rows, is_open, token, is_real_BL = rows[index], is_open[index], token[index], is_real_BL[index]
        is_real_BL = torch.cat([is_real_BL, torch.ones_like(is_real_BL[:, :1])], dim=1)
        logits_BV = step(token, number, is_real_BL[:, None, None, :])
    return answers


def prefill(
    llm: LanguageModel, pack: Pack, media: MediaEmbeds | None, copies: int = 1
) -> tuple[Tensor, Tensor, Step, Callable[[Tensor], None]]:
    """(logits [B, V] after each prompt, is_real [B, L], step, keep) to ``extend`` from; B = documents × ``copies``.

    Each prompt is read once; its copies stand next to each other.
    """
    starts = pack.cu_seqlens.tolist()
    lengths = (pack.cu_seqlens[1:] - pack.cu_seqlens[:-1]).long()
    width = int(lengths.max())
    embeds, is_visual, deepstack = llm.merge(pack.input_ids, media)
    positions = left_pad(pack.position_ids.T, starts, width).permute(2, 0, 1)  # [4, D, L]
    is_real, mask = prompt_masks(lengths)
    cache = DynamicCache(config=llm.config)
    is_visual = None if is_visual is None else left_pad(is_visual, starts, width)
    logits = llm.step(left_pad(embeds, starts, width), positions, mask, cache, is_visual, deepstack)
    last = torch.stack([lengths - 1, *[positions[1:].amax(dim=(0, 2))] * 3])  # [4, D], the last position used
    if copies > 1:
        cache.batch_repeat_interleave(copies)
        logits, is_real = (values.repeat_interleave(copies, dim=0) for values in (logits, is_real))
        last = last.repeat_interleave(copies, dim=1)

    def step(token: Tensor, number: int, mask: Tensor) -> Tensor:
        return llm.step(llm.model.embed_tokens(token)[:, None], (last + number)[:, :, None], mask, cache)

    def keep(index: Tensor) -> None:
        nonlocal last
        cache.batch_select_indices(index)
        last = last[:, index]

    return logits, is_real, step, keep


@torch.no_grad()
def greedy(
    llm: LanguageModel,
    pack: Pack,
    media: MediaEmbeds | None,
    *,
    stop_id: int,
    max_new_tokens: int,
    is_open_anywhere: IsOpen = bool,
) -> list[list[int]]:
    """Most likely continuation of each document of ``pack``: token ids, without the stop token."""
    logits, is_real, step, keep = prefill(llm, pack, media)
    return extend(
        logits,
        is_real,
        step,
        stop_id=stop_id,
        max_new_tokens=max_new_tokens,
        is_open_anywhere=is_open_anywhere,
        keep=keep,
    )


@torch.no_grad()
def transcribe(
    model: EncoderDecoder, pack: Pack, *, stop_id: int, max_new_tokens: int, is_open_anywhere: IsOpen = bool
) -> list[list[int]]:
    """Greedy answer to each document of ``pack`` (a prompt with its medium): token ids, without the stop token."""
    memory, memory_mask = model.encode(pack)
    prompts, lengths_list = model.text_tokens(pack)
    lengths = torch.tensor(lengths_list, device=memory.device)
    width = int(lengths.max())
    starts = [0, *lengths.cumsum(0).tolist()]
    is_real, mask = prompt_masks(lengths)
    decoder = model.text_decoder
    config = decoder.decoder.config
    cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))

    def logits_after(ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        hidden = decoder.decoder(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            encoder_hidden_states=memory,
            encoder_attention_mask=memory_mask,
        ).last_hidden_state
        return decoder.head(hidden[:, -1])

    def step(token: Tensor, number: int, mask: Tensor) -> Tensor:
        return logits_after(token[:, None], (lengths - 1 + number)[:, None], mask)

    positions = (is_real.cumsum(1) - 1).clamp(min=0)
    logits = logits_after(left_pad(prompts, starts, width), positions, mask)
    return extend(
        logits, is_real, step, stop_id=stop_id, max_new_tokens=max_new_tokens, is_open_anywhere=is_open_anywhere
    )
