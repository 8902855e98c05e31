"""Speech targets: a reply's codes → the Talker's sequence, laid out as stock `transformers` generates it.

    user's turns │ <|im_start|> assistant \\n │ pad ×4      pad… bos      text_0    │ text_1   text_2   …  eos    pad …
                 │                            │ nothink think_bos think_eos speaker pad bos │ frame_0  frame_1 …

Upper row: the text side, tokens whose Thinker embedding is projected (media positions: a Thinker layer's output);
lower row: the codec side, added to it. The system turns and earlier replies are dropped; ``talker_system`` of the
sample, the Talker's own system prompt, stands before the user's turns. The position before frame t predicts its first
code, the last frame the end.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from omni_train.config.errors import nearest
from omni_train.config.talker import TalkerModelConfig
from omni_train.data.contracts import NO_CODE, Document, MediaFacts, Speech
from omni_train.data.media_tokens import MediaGeometry, audio_num_tokens
from omni_train.data.positions import tm_rope_positions
from omni_train.data.tokenizer import IM_END, IM_START, TokenIds, token_ids

CODES, REJECTED = "codes.npy", "rejected.codes.npy"
"""Members of a speech target, and of the one that a preference pair rejects: int16 [G, T]."""

NUM_OPENING = 9
"""Positions between the user's turns and the first frame."""


@dataclass(slots=True)
class SpeechTokens:
    """Ids that tell turns apart: ``head`` are the tokens that open a reply, ``user`` the first that a user's turn has.

    NOTE: stock takes the first three of a reply for its head, whatever the tokenizer. With one that cuts "assistant" in
    pieces, the rest of the head is text to speak, there and here.
    """

    ids: TokenIds
    head: tuple[int, ...]
    user: int

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerBase) -> SpeechTokens:
        head = tokenizer(f"{IM_START}assistant\n", add_special_tokens=False).input_ids
        return SpeechTokens(token_ids(tokenizer), tuple(head), tokenizer.encode("user")[0])


@dataclass(slots=True)
class SpeechFormat:
    """What a Talker's stage makes of speech targets: the sizes of its model, and whether it reads pairs."""

    talker: TalkerModelConfig
    tokens: SpeechTokens
    has_rejected: bool = False

    @property
    def members(self) -> tuple[str, ...]:
        return (CODES, REJECTED) if self.has_rejected else (CODES,)


def read_codes(data: bytes, header_only: bool = False) -> np.ndarray:
    """Codes int64 [G, T] of a member; with ``header_only`` an array of that shape without its values.

    Raises ValueError for what is no int16 array of two dimensions.
    """
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        file.seek(0)
        codes = None if header_only else np.lib.format.read_array(file, allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"it is no .npy file: {error}") from error
    if dtype != np.int16 or len(shape) != 2 or 0 in shape:
        raise ValueError(f"it is {dtype} {list(shape)}; codes must be int16 [groups, frames]")
    return np.broadcast_to(np.int64(0), shape) if codes is None else codes.astype(np.int64)


def speech_facts(members: dict[str, bytes], input_ids: np.ndarray, system: np.ndarray, tokens: SpeechTokens):
    """Facts of a sample's speech targets, for its index; [] for a sample without any.

    ``input_ids``: its tokens with one placeholder a medium. Raises ValueError naming the member.
    """
    facts = []
    for name in (CODES, REJECTED):
        if name in members:
            try:
                num_frames = read_codes(members[name], header_only=True).shape[1]
                check_text(reply_tokens(input_ids, tokens), num_frames)
                user = input_ids[user_index(input_ids, tokens)]
                num_text = len(system) + len(user) - int(_is_media(user, tokens.ids).sum())
            except ValueError as error:
                raise ValueError(f"member {name!r}: {error}") from error
            facts.append(MediaFacts(name, "codes", num_frames=num_frames, num_text_tokens=num_text))
    if REJECTED in members and CODES not in members:
        raise ValueError(f"member {REJECTED!r} is a rejected target without the chosen one, {CODES!r}")
    return facts


def _is_media(ids_L: np.ndarray, ids: TokenIds) -> np.ndarray:
    return (ids_L == ids.audio_pad) | (ids_L == ids.image_pad) | (ids_L == ids.video_pad)


def user_index(input_ids: np.ndarray, tokens: SpeechTokens) -> np.ndarray:
    """Positions of the user's turns (tools answer in them), int64. Raises ValueError for media in other turns."""
    starts = np.flatnonzero(input_ids == tokens.ids.im_start)
    turn = np.searchsorted(starts, np.arange(len(input_ids)), side="right") - 1
    is_user = (input_ids[starts + 1] == tokens.user)[turn]
    if (_is_media(input_ids, tokens.ids) & ~is_user).any():
        raise ValueError("a medium stands outside the user's turns, where a Talker does not see it; move it there")
    return np.flatnonzero(is_user)


def media_index(document: Document, tokens: SpeechTokens) -> np.ndarray:
    """Positions of the media in the user's turns, int64 [M]."""
    user = user_index(document.input_ids, tokens)
    return user[_is_media(document.input_ids[user], tokens.ids)]


def reply_tokens(input_ids: np.ndarray, tokens: SpeechTokens) -> np.ndarray:
    """The text of the last turn, which is spoken: from its fourth token to its end.

    Raises ValueError when that turn is not the assistant's, or has no text.
    """
    reply = input_ids[np.flatnonzero(input_ids == tokens.ids.im_start)[-1] :]
    reply = reply[: np.flatnonzero(reply == tokens.ids.im_end)[0]]
    num_head = len(tokens.head)
    if tuple(reply[: num_head - 1]) != tokens.head[:-1]:
        raise ValueError("the last message is not the assistant's; a speech target says the last reply")
    if reply[num_head - 1] != tokens.head[-1]:
        raise ValueError("the last reply begins with a line break, which cannot be spoken; strip it")
    if len(reply) == num_head:
        raise ValueError("the last reply has no text to speak")
    return reply[3:]


def check_text(text: np.ndarray, num_frames: int) -> None:
    """Raises ValueError where a reply has more tokens than its speech has frames: a frame reads one token."""
    if len(text) > num_frames:
        raise ValueError(
            f"its {num_frames} frames are fewer than the {len(text)} tokens of the reply, of which a frame reads one; "
            "the end would stay unread: use longer speech, a shorter reply or a larger vocabulary"
        )


def checked_codes(codes: np.ndarray, talker: TalkerModelConfig) -> np.ndarray:
    """``codes`` [G, T] if they are this model's. Raises ValueError otherwise."""
    if len(codes) != talker.num_code_groups:
        raise ValueError(
            f"it has {len(codes)} codes a frame, the model {talker.num_code_groups} (model.talker.num_code_groups); "
            "make the codes with this model's codec"
        )
    outside = codes[(codes < 0) | (codes >= talker.codebook_size)]
    if len(outside):
        raise ValueError(
            f"it has the code {outside[0]}; codes lie in 0 … {talker.codebook_size - 1} (model.talker.codebook_size)"
        )
    return codes


def speaker_row(name: object, talker: TalkerModelConfig) -> int:
    """The codec id of a speaker. Raises ValueError for one that the model does not have."""
    if not isinstance(name, str) or name.lower() not in talker.speakers:
        known = ", ".join(sorted(talker.speakers))
        hint = nearest(name.lower(), talker.speakers) if isinstance(name, str) else f"valid: {known}"
        raise ValueError(f"the model has no speaker {name!r} (model.talker.speakers); {hint}")
    return talker.speakers[name.lower()]


def opening(text_0: int, speaker: int, format: SpeechFormat) -> tuple[list[int], list[int]]:
    """(text side, codec side) of the nine positions that open a reply whose first token is ``text_0``."""
    ids, codec = format.tokens.ids, format.talker.tokens
    text = [*format.tokens.head[:3], *[ids.tts_pad] * 4, ids.tts_bos, text_0]
    codes = [codec.nothink, codec.think_bos, codec.think_eos, speaker, codec.pad, codec.bos]
    return text, [NO_CODE] * 3 + codes


def context(
    document: Document, system: Sequence[int] | np.ndarray, tokens: SpeechTokens
) -> tuple[np.ndarray, np.ndarray]:
    """(text side, codec side) of what stands before the opening: the Talker's system prompt and the user's turns."""
    user = document.input_ids[user_index(document.input_ids, tokens)]
    text = np.concatenate([np.asarray(system, dtype=np.int64), user])
    return text, np.full(len(text), NO_CODE)


def talker_positions(
    document: Document, text_ids: np.ndarray, num_context: int, ids: TokenIds, geometry: MediaGeometry
):
    """TM-RoPE positions int64 [3, S] of a Talker's sequence: as the Thinker's, of what stands in the context."""
    positions_of = text_ids.copy()
    positions_of[num_context:] = ids.tts_pad
    return tm_rope_positions(
        positions_of,
        ids,
        audio_num_tokens=[audio_num_tokens(mel.shape[1]) for mel in document.mels],
        image_grids=document.image_grids,
        video_grids=document.video_grids,
        seconds_per_grid=document.video_seconds_per_grid,
        use_audio_in_video=document.video_has_sound,
        geometry=geometry,
    )


def talker_sequence(
    document: Document,
    system: Sequence[int] | np.ndarray,
    codes: np.ndarray,
    speaker: object,
    format: SpeechFormat,
    geometry: MediaGeometry,
) -> Speech:
    """The Talker's sequence of a document whose last reply is spoken by ``speaker`` as ``codes`` [G, T].

    ``system``: the tokens of the Talker's own system prompt, none for the stock layout. Raises ValueError for codes,
    speaker or reply that do not fit.
    """
    tokens, num_frames = format.tokens, codes.shape[1]
    reply = reply_tokens(document.input_ids, tokens)
    check_text(reply, num_frames)
    codes = checked_codes(codes, format.talker)
    before, no_codes = context(document, system, tokens)
    opening_text, opening_codes = opening(int(reply[0]), speaker_row(speaker, format.talker), format)
    spoken = np.full(num_frames, tokens.ids.tts_pad)
    spoken[: len(reply)] = [*reply[1:], tokens.ids.tts_eos]
    text_ids = np.concatenate([before, opening_text, spoken]).astype(np.int64)
    return Speech(
        text_ids=text_ids,
        codec_ids=np.concatenate([no_codes, opening_codes]).astype(np.int64),
        position_ids=talker_positions(document, text_ids, len(before), tokens.ids, geometry),
        media_index=media_index(document, tokens),
        codes=codes,
        input_codes=codes,
        end_label=format.talker.tokens.eos,
    )


def system_tokens(text: object, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Tokens int64 of the Talker's own system prompt, none for "". Raises ValueError for what is no string."""
    if not isinstance(text, str):
        raise ValueError(f"'talker_system' is {type(text).__name__}; it must be a string")
    ids = tokenizer(f"{IM_START}system\n{text}{IM_END}\n", add_special_tokens=False).input_ids if text else []
    return np.array(ids, dtype=np.int64)


def with_noise(speech: Speech, share: float, codebook_size: int, rng: np.random.Generator) -> Speech:
    """``speech`` whose ``input_codes`` are random in this share of places; what is to be predicted stays."""
    is_noise = rng.random(speech.codes.shape) < share
    noise = rng.integers(0, codebook_size, speech.codes.shape)
    return dataclasses.replace(speech, input_codes=np.where(is_noise, noise, speech.codes))
