"""Speaking: the Thinker's text, token by token, through Talker and MTP to frames of codes, as both are made.

    Thinker ──stream_text──▶ tokens ──change──▶ tokens ──speak──▶ frames [G] ──▶ Code2Wav

A frame of 80 ms reads one token, so that speech begins with the first token; ``change`` is where the text can be
altered, delayed or cut before it is spoken (a filter, a reading of numbers, another text altogether).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from omni_train.data.contracts import Document, Pack
from omni_train.data.encode import collate
from omni_train.data.media_tokens import MediaGeometry
from omni_train.data.talker_sequence import SpeechFormat, context, media_index, opening, speaker_row, talker_positions
from omni_train.models.talker import Talker, ThinkerStates
from omni_train.models.thinker import LanguageModel, Thinker
from omni_train.models.towers import MediaEmbeds
from omni_train.rollout.generate import left_pad, prompt_masks

ChangeText = Callable[[Iterator[int]], Iterable[int]]
"""The tokens to speak, given those of the Thinker; pulled one by one as frames need them."""


@dataclass(slots=True)
class Sampling:
    """How codes are drawn; temperature 0 takes the most likely. The defaults are stock's for the Talker.

    ``repetition_penalty`` (Keskar et al. 2019) acts on codes drawn before; ``top_p`` 1 keeps all.
    """

    temperature: float = 0.9
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.05


GREEDY = Sampling(temperature=0.0, repetition_penalty=1.0)
MTP_SAMPLING = Sampling(temperature=1.0, top_p=0.8, repetition_penalty=1.0)


def draw(
    logits_BV: Tensor, sampling: Sampling, generator: torch.Generator | None = None, before_BN: Tensor | None = None
) -> Tensor:
    """Indices [B] drawn from logits; ``before_BN``: those drawn earlier, which the repetition penalty makes rarer."""
    scores = logits_BV.float()
    if before_BN is not None and sampling.repetition_penalty != 1.0:
        seen = scores.gather(1, before_BN)
        penalised = torch.where(seen < 0, seen * sampling.repetition_penalty, seen / sampling.repetition_penalty)
        scores = scores.scatter(1, before_BN, penalised)
    if sampling.temperature == 0:
        return scores.argmax(-1)
    best, index = (scores / sampling.temperature).topk(min(sampling.top_k, scores.shape[1]), dim=-1)
    probabilities = best.softmax(-1)
    is_kept = probabilities.cumsum(-1) - probabilities < sampling.top_p
    return index.gather(1, torch.multinomial(probabilities * is_kept, 1, generator=generator))[:, 0]


@torch.no_grad()
def stream_text(
    llm: LanguageModel, pack: Pack, media: MediaEmbeds, *, stop_id: int, max_new_tokens: int
) -> Iterator[int]:
    """The greedy answer to the one document of ``pack``, token by token, without the stop token."""
    embeds, is_visual, deepstack = llm.merge(pack.input_ids, media)
    length = len(embeds)
    _, mask = prompt_masks(torch.tensor([length], device=embeds.device))
    cache = DynamicCache(config=llm.config)
    is_visual = None if is_visual is None else is_visual[None]
    logits = llm.step(embeds[None], pack.position_ids[:, None], mask, cache, is_visual, deepstack)
    last = torch.stack([pack.position_ids[0].amax(), *[pack.position_ids[1:].amax()] * 3])[:, None, None]
    for number in range(1, max_new_tokens + 1):
        token = logits.argmax(-1)
        if int(token) == stop_id:
            return
        yield int(token)
        mask = torch.ones(1, 1, 1, length + number, dtype=torch.bool, device=embeds.device)
        logits = llm.step(llm.model.embed_tokens(token)[:, None], last + number, mask, cache)


@dataclass(slots=True)
class Utterance:
    """What is to be said: ``text`` (tokens, pulled when a frame needs them) in the voice of ``speaker``, as reply to
    the prompt ``document``, of whose user's turns ``media_states`` [M, H'] are the Thinker's states of media.
    ``system``: the tokens of the Talker's own system prompt."""

    document: Document
    media_states: Tensor
    text: Iterable[int]
    speaker: str
    system: Iterable[int] = ()


@torch.no_grad()
def speak(
    llm: LanguageModel,
    talker: Talker,
    utterances: Sequence[Utterance],
    format: SpeechFormat,
    geometry: MediaGeometry,
    *,
    sampling: Sampling | None = None,
    mtp_sampling: Sampling = MTP_SAMPLING,
    max_frames: int = 4096,
    generator: torch.Generator | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Frames of codes, int64 [B, G], of all utterances side by side, and which of them still speak, bool [B].

    Ends when every one has. An utterance without text says nothing. Raises ValueError for an unknown speaker.
    """
    sampling, ids = sampling or Sampling(), format.tokens.ids
    device = llm.lm_head.weight.device
    texts = [chain(format.tokens.head[3:], utterance.text) for utterance in utterances]
    firsts = [next(text, None) for text in texts]
    texts = [chain(text, [ids.tts_eos]) for text in texts]
    is_open = torch.tensor([first is not None for first in firsts], device=device)
    if not is_open.any():
        return
    rows = [
        _opened(llm, talker, utterance, ids.tts_pad if first is None else first, format, geometry)
        for utterance, first in zip(utterances, firsts, strict=True)
    ]
    lengths = torch.tensor([len(embeds) for embeds, _ in rows], device=device)
    starts, width = [0, *lengths.cumsum(0).tolist()], int(lengths.max())
    embeds = left_pad(torch.cat([embeds for embeds, _ in rows]), starts, width)
    positions = left_pad(torch.cat([position_ids for _, position_ids in rows], dim=1).T, starts, width).permute(2, 0, 1)
    last = torch.stack([lengths - 1, *[positions[1:].amax(dim=(0, 2))] * 3])[:, :, None]
    is_real, mask = prompt_masks(lengths)
    cache = DynamicCache(config=talker.config)
    hidden = talker.step(embeds, positions, mask, cache)
    drawn = torch.empty(len(rows), 0, dtype=torch.long, device=device)
    may_speak = torch.arange(talker.config.vocab_size, device=device) < format.talker.codebook_size
    may_speak[format.talker.tokens.eos] = True
    for number in range(1, max_frames + 1):
        logits = talker.talker.codec_head(hidden).masked_fill(~may_speak, -torch.inf)
        codes = draw(logits, sampling, generator, drawn)
        is_open = is_open & (codes != format.talker.tokens.eos)
        if not is_open.any():
            return
        codes = codes * is_open  # what has ended goes on with code 0, unheard
        frames = residual_codes(talker, hidden, codes, mtp_sampling, generator)
        yield frames, is_open
        drawn = torch.cat([drawn, codes[:, None]], dim=1)
        tokens = torch.tensor([next(text, ids.tts_pad) for text in texts], device=device)
        embeds = talker.embed_frame(frames.T, llm.model.embed_tokens(tokens))
        is_real = torch.cat([is_real, torch.ones_like(is_real[:, :1])], dim=1)
        hidden = talker.step(embeds[:, None], last + number, is_real[:, None, None, :], cache)


def _opened(
    llm: LanguageModel,
    talker: Talker,
    utterance: Utterance,
    first: int,
    format: SpeechFormat,
    geometry: MediaGeometry,
) -> tuple[Tensor, Tensor]:
    """(inputs [S, H], positions [4, S]) of all that stands before an utterance's first frame."""
    ids, device = format.tokens.ids, utterance.media_states.device
    before, no_codes = context(utterance.document, list(utterance.system), format.tokens)
    opening_text, opening_codes = opening(first, speaker_row(utterance.speaker, format.talker), format)
    text_ids = np.concatenate([before, opening_text]).astype(np.int64)
    positions = torch.from_numpy(talker_positions(utterance.document, text_ids, len(before), ids, geometry))
    text = torch.from_numpy(text_ids).to(device)
    codec = torch.from_numpy(np.concatenate([no_codes, opening_codes]).astype(np.int64)).to(device)
    states = ThinkerStates(llm.model.embed_tokens(text), utterance.media_states)
    position_ids = torch.cat([torch.arange(len(text_ids))[None], positions]).to(device)
    return talker.embed_context(text, codec, states), position_ids


def residual_codes(
    talker: Talker, hidden_BH: Tensor, codes_B: Tensor, sampling: Sampling, generator: torch.Generator | None
) -> Tensor:
    """All codes [B, G] of frames from their first ones and the Talker's outputs that those were drawn from, by the
    MTP."""
    predictor = talker.talker.code_predictor
    codes = [codes_B]
    cache = DynamicCache(config=predictor.config)
    embeds = torch.stack([hidden_BH, talker.talker.model.codec_embedding(codes_B)], dim=1)
    for head, table in zip(predictor.lm_head, [*predictor.model.codec_embedding], strict=True):
        output = predictor.model(inputs_embeds=embeds, past_key_values=cache, use_cache=True).last_hidden_state
        codes.append(draw(head(output[:, -1]), sampling, generator))
        embeds = table(codes[-1])[:, None]
    return torch.stack(codes, dim=1)


@torch.no_grad()
def media_states(
    thinker: Thinker, prompts: Sequence[Document], format: SpeechFormat, geometry: MediaGeometry
) -> list[Tensor]:
    """What the Talker reads of the media in the user's turns of each prompt, [M, H'] of a prompt."""
    pack = collate(prompts, patch_dim=geometry.patch_dim).to(thinker.llm.lm_head.weight.device)
    media = [media_index(prompt, format.tokens) for prompt in prompts]
    index = np.concatenate([own + start for own, start in zip(media, pack.cu_seqlens.tolist(), strict=False)])
    where = torch.from_numpy(index).to(pack.input_ids.device)
    states = thinker.llm.states_at(pack, thinker.towers(pack), where, format.talker.accept_hidden_layer)
    return list(states.split([len(own) for own in media]))


@torch.no_grad()
def answer_in_speech(
    thinker: Thinker,
    talker: Talker,
    prompt: Document,
    speaker: str,
    format: SpeechFormat,
    geometry: MediaGeometry,
    *,
    change: ChangeText = iter,
    system: Iterable[int] = (),
    max_new_tokens: int = 1024,
    **options,
) -> Iterator[Tensor]:
    """Frames [G] of the Thinker's answer to ``prompt``, spoken while it is still being written; see ``speak``."""
    pack = collate([prompt], patch_dim=geometry.patch_dim).to(thinker.llm.lm_head.weight.device)
    media = thinker.towers(pack)
    where = torch.from_numpy(media_index(prompt, format.tokens)).to(pack.input_ids.device)
    states = thinker.llm.states_at(pack, media, where, format.talker.accept_hidden_layer)
    stop_id = format.tokens.ids.im_end
    text = change(stream_text(thinker.llm, pack, media, stop_id=stop_id, max_new_tokens=max_new_tokens))
    utterance = Utterance(prompt, states, text, speaker, system)
    for frames, _ in speak(thinker.llm, talker, [utterance], format, geometry, **options):
        yield frames[0]
