"""Speaking: the Thinker's text, token by token, through Talker and MTP to frames of codes, as both are made.

    Thinker ──stream_text──▶ tokens ──change──▶ tokens ──speak──▶ frames [G] ──▶ Code2Wav

A frame of 80 ms reads one token, so that speech begins with the first token; ``change`` is where the text can be
altered, delayed or cut before it is spoken (a filter, a reading of numbers, another text altogether).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from omni_train.data.contracts import Document, Pack
from omni_train.data.encode import collate
from omni_train.data.media_tokens import MediaGeometry
from omni_train.data.talker_sequence import SpeechFormat, context, opening, speaker_row, talker_positions, user_index
from omni_train.models.talker import Talker, ThinkerStates
from omni_train.models.thinker import LanguageModel, Thinker
from omni_train.models.towers import MediaEmbeds
from omni_train.rollout.generate import prompt_masks

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


MTP_SAMPLING = Sampling(temperature=1.0, top_p=0.8, repetition_penalty=1.0)


def draw(logits_V: Tensor, sampling: Sampling, generator: torch.Generator | None = None, before: Tensor | None = None):
    """An index drawn from logits [V]; ``before``: indices drawn earlier, which the repetition penalty makes rarer."""
    scores = logits_V.float()
    if before is not None and sampling.repetition_penalty != 1.0:
        seen = scores[before]
        penalised = torch.where(seen < 0, seen * sampling.repetition_penalty, seen / sampling.repetition_penalty)
        scores = scores.index_put((before,), penalised)
    if sampling.temperature == 0:
        return int(scores.argmax())
    best, index = (scores / sampling.temperature).topk(min(sampling.top_k, len(scores)))
    probabilities = best.softmax(-1)
    is_kept = probabilities.cumsum(0) - probabilities < sampling.top_p
    choice = torch.multinomial(probabilities * is_kept, 1, generator=generator)
    return int(index[choice])


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


@torch.no_grad()
def speak(
    llm: LanguageModel,
    talker: Talker,
    document: Document,
    media_states: Tensor,
    text: Iterable[int],
    speaker: str,
    format: SpeechFormat,
    geometry: MediaGeometry,
    *,
    system: Iterable[int] = (),
    sampling: Sampling | None = None,
    mtp_sampling: Sampling = MTP_SAMPLING,
    max_frames: int = 4096,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Frames of codes, int64 [G] each, that say ``text`` in the voice of ``speaker``, until the Talker ends.

    ``document``: the prompt, up to the opening of the reply; ``media_states`` [M, H']: the Thinker's states of the
    media in its user's turns. A token of ``text`` is pulled when a frame needs it. Raises ValueError for an unknown
    speaker.
    """
    sampling, ids = sampling or Sampling(), format.tokens.ids
    tokens = chain(format.tokens.head[3:], text)
    first = next(tokens, None)
    if first is None:
        return
    spoken = chain(tokens, [ids.tts_eos])
    before, no_codes = context(document, list(system), format.tokens)
    opening_text, opening_codes = opening(first, speaker_row(speaker, format.talker), format)
    text_ids = np.concatenate([before, opening_text]).astype(np.int64)
    positions = torch.from_numpy(talker_positions(document, text_ids, len(before), ids, geometry))
    device = media_states.device
    text_T = torch.from_numpy(text_ids).to(device)
    codec_T = torch.from_numpy(np.concatenate([no_codes, opening_codes]).astype(np.int64)).to(device)
    embeds = talker.embed_context(text_T, codec_T, ThinkerStates(llm.model.embed_tokens(text_T), media_states))
    length = len(text_ids)
    position_ids = torch.cat([torch.arange(length)[None], positions]).to(device)
    last = torch.stack([position_ids[0].amax(), *[position_ids[1:].amax()] * 3])[:, None, None]
    _, mask = prompt_masks(torch.tensor([length], device=device))
    cache = DynamicCache(config=talker.config)
    hidden = talker.step(embeds[None], position_ids[:, None], mask, cache)
    drawn = torch.empty(0, dtype=torch.long, device=device)
    may_speak = torch.arange(talker.config.vocab_size, device=device) < format.talker.codebook_size
    may_speak[format.talker.tokens.eos] = True
    for number in range(1, max_frames + 1):
        logits = talker.talker.codec_head(hidden)[0].masked_fill(~may_speak, -torch.inf)
        code = draw(logits, sampling, generator, drawn)
        if code == format.talker.tokens.eos:
            return
        frame = residual_codes(talker, hidden, code, mtp_sampling, generator)
        yield frame
        drawn = torch.cat([drawn, frame[:1]])
        token = torch.tensor([next(spoken, ids.tts_pad)], device=device)
        embeds = talker.embed_frame(frame[:, None], llm.model.embed_tokens(token))
        mask = torch.ones(1, 1, 1, length + number, dtype=torch.bool, device=device)
        hidden = talker.step(embeds[None], last + number, mask, cache)


def residual_codes(
    talker: Talker, hidden: Tensor, code: int, sampling: Sampling, generator: torch.Generator | None
) -> Tensor:
    """A frame's codes [G] from its first one and the Talker's output [1, H] that it was drawn from, by the MTP."""
    predictor = talker.talker.code_predictor
    codes = torch.tensor([code], device=hidden.device)
    cache = DynamicCache(config=predictor.config)
    embeds = torch.stack([hidden, talker.talker.model.codec_embedding(codes)], dim=1)
    tables = [*predictor.model.codec_embedding]
    for head, table in zip(predictor.lm_head, tables, strict=True):
        output = predictor.model(inputs_embeds=embeds, past_key_values=cache, use_cache=True).last_hidden_state
        drawn = torch.tensor([draw(head(output[0, -1]), sampling, generator)], device=hidden.device)
        codes, embeds = torch.cat([codes, drawn]), table(drawn)[:, None]
    return codes


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
    max_new_tokens: int = 1024,
    **options,
) -> Iterator[Tensor]:
    """Frames [G] of the Thinker's answer to ``prompt``, spoken while it is still being written; see ``speak``."""
    pack = collate([prompt], patch_dim=geometry.patch_dim).to(thinker.llm.lm_head.weight.device)
    media = thinker.towers(pack)
    hidden = thinker.llm.hidden_states(pack, media, format.talker.accept_hidden_layer)
    user = user_index(prompt.input_ids, format.tokens)
    is_media = np.isin(prompt.input_ids[user], talker.media_token_ids)
    states = hidden[torch.from_numpy(user[is_media]).to(hidden.device)]
    stop_id = format.tokens.ids.im_end
    text = change(stream_text(thinker.llm, pack, media, stop_id=stop_id, max_new_tokens=max_new_tokens))
    yield from speak(thinker.llm, talker, prompt, states, text, speaker, format, geometry, **options)
