"""Conversations as text: the content of a sample → pieces of ChatML, each with or without loss, each with at most one
medium.

    content ──render──▶ [Piece] ──tokenize──▶ ids and loss, piece by piece, media placeholders not yet expanded

The text of all pieces joined is what Qwen3-Omni's chat template gives for the messages (no default system prompt),
and the tokens of all pieces joined are the tokens of that text: pieces are cut only where the tokenizer cuts as well.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from omni_train.config import LayoutConfig
from omni_train.data.audio import audio_facts
from omni_train.data.contracts import MediaFacts
from omni_train.data.image import image_facts
from omni_train.data.layouts import MESSAGES, read_content
from omni_train.data.talker_sequence import CODES, REJECTED, SpeechTokens, speech_facts, system_tokens
from omni_train.data.tokenizer import (
    AUDIO_END,
    AUDIO_PAD,
    AUDIO_START,
    ENDOFTEXT,
    IM_END,
    IM_START,
    IMAGE_PAD,
    STRUCTURE_TOKENS,
    TOOLS_END,
    TOOLS_HEAD,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    load_tokenizer,
)
from omni_train.data.video import video_facts

ROLES = ("system", "user", "assistant", "tool")
PART_TYPES = ("text", "image", "audio", "video")
SPEECH = "speech"
"""The kind of an assistant's clip."""
LOSS_ON = ("assistant", "last_turn", "all_text")
ASSISTANT_PROMPT = f"{IM_START}assistant\n"

_MEDIA_TEXT = {
    "audio": AUDIO_START + AUDIO_PAD + AUDIO_END,
    "image": VISION_START + IMAGE_PAD + VISION_END,
    "video": VISION_START + VIDEO_PAD + VISION_END,
    "video_audio": VISION_START + VIDEO_PAD + VISION_END,
}
_STRUCTURE = re.compile("|".join(re.escape(token) for token in STRUCTURE_TOKENS))
# White space up to its last line break: what Qwen's pre-tokenisation joins to the line break of "assistant\n".
_LEADING_BREAKS = re.compile(r"[ \t\n\v\f\r\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]*[\r\n]")


@dataclass(slots=True)
class Piece:
    """A stretch of the rendered text. ``media`` names the member whose one placeholder the text holds, ``kind`` its
    type: audio, image, video, or video_audio for a video whose sound is heard too."""

    text: str
    has_loss: bool
    media: str | None = None
    kind: str | None = None


def render(content: dict[str, Any], loss_on: str = "assistant", add_generation_prompt: bool = False) -> list[Piece]:
    """The pieces of a sample's text, in order.

    ``messages`` become ChatML turns; plain ``text`` gets ``<|endoftext|>`` and carries loss everywhere. ``loss_on``
    "assistant": assistant text and its ``<|im_end|>``; "last_turn": that of the replies to the last question only;
    "all_text": everything but media. As in Qwen3's template, the reasoning of a reply (``reasoning_content``, or what
    stands in ``<think>``) is kept after the last question and left out before it; ``tools`` and ``tool_calls`` are
    written out. A clip of the assistant is no part of the text. Line breaks at the start of a reply are joined to the
    turn's head by the tokenizer and carry no loss of a reply. Raises ValueError for a content that breaks the contract.
    """
    if loss_on not in LOSS_ON:
        raise ValueError(f"loss_on is {loss_on!r}; {_choices(loss_on, LOSS_ON)}")
    if ("messages" in content) == ("text" in content):
        raise ValueError(
            f"content must hold either 'messages' or 'text'; it has {', '.join(sorted(content)) or 'nothing'}"
        )
    builder = _Builder(all_text=loss_on == "all_text")
    if "text" in content:
        builder.text(_checked_text(content["text"], "'text'") + ENDOFTEXT, has_loss=True)
        return builder.pieces
    messages = content["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError("'messages' must be a list of at least one message")
    roles = [_role(message, number) for number, message in enumerate(messages)]
    last_question = _last_question(roles, messages)
    first = 0
    if content.get("tools"):
        first = int(roles[0] == "system")
        builder.text(f"{IM_START}system\n")
        if first:
            builder.parts(_parts(messages[0], 0), has_loss=False)
            builder.text("\n\n")
        builder.text(_tools_text(content["tools"]) + f"{IM_END}\n")
    for number in range(first, len(messages)):
        role, message = roles[number], messages[number]
        if role == "tool":
            is_first = number == 0 or roles[number - 1] != "tool"
            is_last = number == len(roles) - 1 or roles[number + 1] != "tool"
            builder.text((f"{IM_START}user" if is_first else "") + "\n<tool_response>\n")
            builder.parts(_parts(message, number), has_loss=False)
            builder.text("\n</tool_response>" + (f"{IM_END}\n" if is_last else ""))
        else:
            is_last = number > last_question
            is_reply = role == "assistant"
            has_loss = is_reply and (is_last or loss_on != "last_turn")
            builder.text(f"{IM_START}{role}\n")
            builder.parts(_reply(message, number, is_last) if is_reply else _parts(message, number), has_loss)
            builder.text(IM_END, has_loss)
            builder.text("\n")
    if add_generation_prompt:
        builder.text(ASSISTANT_PROMPT)
    return builder.pieces


def final_answer(text: str) -> str:
    """What a reply says after its reasoning; all of it where it has none."""
    return text.rpartition("</think>")[2].lstrip("\n")


def _last_question(roles: Sequence[str], messages: Sequence[dict[str, Any]]) -> int:
    """Number of the last message of a user that is no tool's answer; the last message's where there is none."""
    for number in reversed(range(len(messages))):
        if roles[number] == "user":
            parts = _parts(messages[number], number)
            text = parts[0][1] if len(parts) == 1 and parts[0][0] == "text" else ""
            if not (text.startswith("<tool_response>") and text.endswith("</tool_response>")):
                return number
    return len(messages) - 1


def _tools_text(tools: Any) -> str:
    """The functions that a model may call, as Qwen3's template describes them."""
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("'tools' must be a list of objects")
    listed = "".join(f"\n{json.dumps(tool, ensure_ascii=False)}" for tool in tools)
    return _checked_text(TOOLS_HEAD + listed + TOOLS_END, "'tools'")


def _reply(message: dict[str, Any], number: int, keeps_reasoning: bool) -> list[tuple[str, str]]:
    """The parts of an assistant's message: reasoning if it is kept, the text of what is said, calls of tools."""
    parts = [part for part in _parts(message, number) if part[0] != SPEECH]
    is_text = all(kind == "text" for kind, _ in parts)
    text = "".join(value for _, value in parts) if is_text else ""
    reasoning = message.get("reasoning_content")
    if reasoning is not None:
        reasoning = _checked_text(reasoning, f"message {number}: reasoning_content")
    elif "</think>" in text:
        reasoning = text.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
        parts = [("text", text.split("</think>")[-1].lstrip("\n"))]
    calls = _calls_text(message.get("tool_calls"), number, any(kind != "text" or value for kind, value in parts))
    if reasoning and keeps_reasoning:
        first = parts[0][1].lstrip("\n") if parts and parts[0][0] == "text" else ""
        rest = parts[1:] if parts and parts[0][0] == "text" else parts
        parts = [("text", "<think>\n" + reasoning.strip("\n") + "\n</think>\n\n" + first), *rest]
    if calls and parts and parts[-1][0] == "text":
        return [*parts[:-1], ("text", parts[-1][1] + calls)]
    return [*parts, ("text", calls)] if calls else parts


def _calls_text(calls: Any, number: int, is_said: bool) -> str:
    """The calls of tools, as they stand after what is said."""
    text = ""
    if not isinstance(calls or [], list):
        raise ValueError(f"message {number}: tool_calls must be a list")
    for n, call in enumerate(calls or []):
        function = call.get("function") or call if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"message {number}: tool_calls must be objects with 'name' and 'arguments'")
        arguments = function.get("arguments")
        arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        text += "\n" if n or is_said else ""
        text += f'<tool_call>\n{{"name": "{function["name"]}", "arguments": {arguments}}}\n</tool_call>'
    return _checked_text(text, f"message {number}: tool_calls")


class _Builder:
    """Joins neighbouring stretches of text that agree on loss."""

    def __init__(self, all_text: bool) -> None:
        self.pieces: list[Piece] = []
        self._all_text = all_text

    def text(self, text: str, has_loss: bool = False) -> None:
        has_loss = has_loss or self._all_text
        if not text:
            return
        last = self.pieces[-1] if self.pieces else None
        if last is not None and last.media is None and last.has_loss == has_loss:
            last.text += text
        else:
            self.pieces.append(Piece(text, has_loss))

    def parts(self, parts: Sequence[tuple[str, str]], has_loss: bool) -> None:
        """Adds (type, text or member) parts of one message; the turn's head stands before them."""
        is_start = True
        for kind, value in parts:
            if kind != "text":
                self.pieces.append(Piece(_MEDIA_TEXT[kind], False, media=value, kind=kind))
            elif is_start and (breaks := _LEADING_BREAKS.match(value)):
                self.text(value[: breaks.end()])
                self.text(value[breaks.end() :], has_loss)
            else:
                self.text(value, has_loss)
            is_start = False


def _role(message: Any, number: int) -> str:
    if not isinstance(message, dict):
        raise ValueError(
            f"message {number} is {type(message).__name__}; it must be an object with 'role' and 'content'"
        )
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"message {number} has role {role!r}; {_choices(role, ROLES)}")
    return role


def _parts(message: dict[str, Any], number: int) -> list[tuple[str, str]]:
    """(kind, text or member name) of each part of a message, neighbouring texts joined.

    A clip of the assistant is of kind ``speech``: how its text was said, which the Thinker does not hear.
    """
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return []
    if isinstance(content, str):
        return [("text", _checked_text(content, f"message {number}"))]
    if not isinstance(content, list):
        raise ValueError(
            f"message {number} has content of type {type(content).__name__}; use a string or a list of parts"
        )
    parts: list[tuple[str, str]] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in PART_TYPES:
            raise ValueError(f"message {number} has a part of type {kind!r}; {_choices(kind, PART_TYPES)}")
        value = part.get(kind)
        if not isinstance(value, str):
            raise ValueError(
                f"message {number} has a part of type {kind!r} without {kind!r}: "
                + ("its text" if kind == "text" else "the name of its member")
            )
        if kind == "text":
            value = _checked_text(value, f"message {number}")
            if parts and parts[-1][0] == "text":
                value = parts.pop()[1] + value
        use_sound = part.get("use_audio_in_video", False)
        if not isinstance(use_sound, bool):
            raise ValueError(f"message {number} has use_audio_in_video {use_sound!r}; it must be true or false")
        if kind == "video" and use_sound:
            kind = "video_audio"
        if kind == "audio" and message.get("role") == "assistant":
            kind = SPEECH
        parts.append((kind, value))
    return parts


def _checked_text(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{where} is {type(text).__name__}; it must be a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON may spell half of a pair: "\\ud83d"
        raise ValueError(
            f"{where} holds half a surrogate pair at character {error.start}; write the character"
        ) from error
    if found := _STRUCTURE.search(text):
        raise ValueError(f"{where} holds the control token {found.group()!r} as text; remove or rewrite it in the data")
    return text


def _choices(value: object, valid: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(value), valid, n=1)
    return f"use one of {', '.join(valid)}" + (f" (did you mean {near[0]!r}?)" if near else "")


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of a rendered text, special tokens in it recognised, nothing added."""
    backend = tokenizer.backend_tokenizer
    # NOTE: a call of the tokenizer with truncation or padding elsewhere leaves both switched on in its backend.
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    return backend.encode(text, add_special_tokens=False).ids


def count_text_tokens(pieces: Sequence[Piece], tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of the rendered pieces that are no media placeholder (markers around placeholders count)."""
    return sum(len(tokenize(piece.text, tokenizer)) - (piece.media is not None) for piece in pieces)


def modality_of(content: dict[str, Any]) -> str:
    """The richest media of a sample: video_audio > video > image > audio > text; a picture with audio counts as image.

    A video counts as video_audio if its part says ``"use_audio_in_video": true``.
    """
    messages = content.get("messages", ())
    found = {kind for number, message in enumerate(messages) for kind, _ in _parts(message, number)}
    return next((kind for kind in ("video_audio", "video", "image", "audio") if kind in found), "text")


def question_of(content: dict[str, Any]) -> str:
    """The text of the last message before the last reply, without its media; "" where nothing stands before it."""
    messages = content.get("messages", [])
    replies = [number for number, message in enumerate(messages) if message.get("role") == "assistant"]
    before = replies[-1] - 1 if replies else len(messages) - 1
    return "".join(value for kind, value in _parts(messages[before], before) if kind == "text") if before >= 0 else ""


_READERS: dict[str, Callable[[str, bytes], MediaFacts]] = {
    "audio": audio_facts,
    "image": image_facts,
    "video": video_facts,
    "video_audio": partial(video_facts, with_sound=True),
}


def describe(
    content: dict[str, Any], members: dict[str, bytes], tokenizer: PreTrainedTokenizerBase
) -> tuple[int, list[MediaFacts], bool]:
    """(number of text tokens, facts of each medium in order of the text, whether it is plain text) of a sample, for its
    index; opens headers only.

    Raises ValueError naming a member that is missing, unreadable or of a kind that cannot be read.
    """
    pieces = render(content)
    if content.get("text") == "":
        raise ValueError("'text' is empty: nothing to learn from")
    check_members(content, members)
    facts = [_facts(str(piece.kind), piece.media, members) for piece in pieces if piece.media is not None]
    for number, message in enumerate(content.get("messages", ())):
        spoken = [name for kind, name in _parts(message, number) if kind == SPEECH]
        facts += [dataclasses.replace(_facts("audio", name, members), kind=SPEECH) for name in spoken]
    if CODES in members or REJECTED in members:
        ids = np.array([token for piece in pieces for token in tokenize(piece.text, tokenizer)], dtype=np.int64)
        system = system_tokens(content.get("talker_system", ""), tokenizer)
        facts += speech_facts(members, ids, system, SpeechTokens.of(tokenizer))
    return count_text_tokens(pieces, tokenizer), facts, "text" in content and not facts


def _facts(kind: str, name: str, members: dict[str, bytes]) -> MediaFacts:
    try:
        return _READERS[kind](name, members[name])
    except ValueError as error:
        raise ValueError(f"member {name!r}: {error}") from error


def check_members(content: dict[str, Any], members: dict[str, bytes]) -> None:
    """Raises ValueError naming the first message that names a member which the sample lacks."""
    for number, message in enumerate(content.get("messages", ())):
        for kind, name in _parts(message, number):
            if kind != "text" and name not in members:
                kind, has = kind.removesuffix("_audio"), ", ".join(sorted(members)) or "none"
                raise ValueError(
                    f"message {number} names {kind} member {name!r}, which is missing; the sample has {has}"
                )


class Describe:
    """``describe`` with its tokenizer and layout, as the indexer's worker processes need it: picklable, loads the
    tokenizer on first use."""

    def __init__(self, tokenizer_folder: str | Path, layout: LayoutConfig = MESSAGES) -> None:
        self.tokenizer_folder = str(tokenizer_folder)
        self.layout = layout
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def __reduce__(self) -> tuple[type[Describe], tuple[str, LayoutConfig]]:
        return Describe, (self.tokenizer_folder, self.layout)

    def __call__(self, key: str, members: dict[str, bytes]) -> tuple[int, list[MediaFacts], bool]:
        """(number of text tokens, media facts, whether it is plain text) of sample ``key``. Raises ValueError naming
        the key."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.tokenizer_folder)
        try:
            return describe(read_content(members, self.layout), members, self._tokenizer)
        except ValueError as error:
            raise ValueError(f"sample {key}: {error}") from error
