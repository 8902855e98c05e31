"""Tokenizers: train one, load one, name its special tokens.

A tokenizer is a `transformers` folder. One made by ``train_tokenizer`` and one published with Qwen3-Omni answer to
the same names, so nothing downstream knows which of the two it holds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

ENDOFTEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
AUDIO_START, AUDIO_END, AUDIO_PAD = "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>"
VISION_START, VISION_END, VISION_PAD = "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
TTS_PAD, TTS_BOS, TTS_EOD, TTS_BOS_SINGLE = "<tts_pad>", "<tts_text_bos>", "<tts_text_eod>", "<tts_text_bos_single>"

STRUCTURE_TOKENS = (
    ENDOFTEXT,
    IM_START,
    IM_END,
    AUDIO_START,
    AUDIO_END,
    AUDIO_PAD,
    VISION_START,
    VISION_END,
    VISION_PAD,
    IMAGE_PAD,
    VIDEO_PAD,
)
"""Tokens that mean something to the encoder or to the model's media merge: never allowed inside the text of a
sample."""

REQUIRED_TOKENS = (*STRUCTURE_TOKENS, TTS_PAD, TTS_BOS, TTS_EOD, TTS_BOS_SINGLE)

# In the order of the published vocabulary (151643 …), so that files of both kinds read alike.
_ADDED_TOKENS = (
    *(ENDOFTEXT, IM_START, IM_END),
    *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *(VISION_START, VISION_END, VISION_PAD, IMAGE_PAD, VIDEO_PAD),
    *("<tool_call>", "</tool_call>"),
    *("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
    *("<tool_response>", "</tool_response>", "<think>", "</think>"),
    *(AUDIO_START, AUDIO_END, TTS_PAD, TTS_BOS, TTS_EOD, TTS_BOS_SINGLE, AUDIO_PAD),
)
# Single tokens of the vocabulary that are text all the same: they stay when special tokens are skipped in decoding.
_TEXT_TOKENS = frozenset(
    ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
    + ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")
)
_NAMED_TOKENS = {
    "image_token": IMAGE_PAD,
    "audio_token": AUDIO_PAD,
    "video_token": VIDEO_PAD,
    "vision_bos_token": VISION_START,
    "vision_eos_token": VISION_END,
    "audio_bos_token": AUDIO_START,
    "audio_eos_token": AUDIO_END,
}

# How Qwen3's template tells a model of tools, before and after the list of them.
TOOLS_HEAD = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>"""
TOOLS_END = """
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""

CHAT_TEMPLATE = """\
{%- macro part(p) -%}
    {%- if p.type == 'text' -%}{{- p.text -}}
    {%- elif p.type == 'audio' -%}<|audio_start|><|audio_pad|><|audio_end|>
    {%- elif p.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
    {%- elif p.type == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>
    {%- else -%}{{- raise_exception('unknown part type: ' ~ p.type) -}}
    {%- endif -%}
{%- endmacro -%}
{%- macro body(content) -%}
    {%- if content is string -%}{{- content -}}
    {%- elif content -%}{%- for p in content -%}{{- part(p) -}}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(last_question=messages|length - 1) -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {%- set text = body(message.content) -%}
        {%- if not (text.startswith('<tool_response>') and text.endswith('</tool_response>')) -%}
            {%- set ns.last_question = loop.index0 -%}
        {%- endif -%}
    {%- endif -%}
{%- endfor -%}
{%- if tools -%}
    {{- '<|im_start|>system\\n' -}}
    {%- if messages[0].role == 'system' -%}{{- body(messages[0].content) + '\\n\\n' -}}{%- endif -%}
    {{- TOOLS_HEAD -}}
    {%- for tool in tools -%}{{- '\\n' + (tool | tojson) -}}{%- endfor -%}
    {{- TOOLS_END + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if tools and loop.first and message.role == 'system' -%}
    {%- elif message.role == 'assistant' -%}
        {%- set content = message.content -%}
        {%- if content and content is not string -%}
            {%- set content = content | rejectattr('type', 'equalto', 'audio') | list -%}
        {%- endif -%}
        {%- set text = body(content) -%}
        {%- set reasoning = '' -%}
        {%- if message.reasoning_content is string -%}
            {%- set reasoning = message.reasoning_content -%}
        {%- elif '</think>' in text and (content is string or
                 content | rejectattr('type', 'equalto', 'text') | list | length == 0) -%}
            {%- set reasoning = text.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}
            {%- set text = text.split('</think>')[-1].lstrip('\\n') -%}
        {%- endif -%}
        {{- '<|im_start|>assistant\\n' -}}
        {%- if reasoning and loop.index0 > ns.last_question -%}
            {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + text.lstrip('\\n') -}}
        {%- else -%}{{- text -}}
        {%- endif -%}
        {%- for call in message.tool_calls or [] -%}
            {%- if text or not loop.first -%}{{- '\\n' -}}{%- endif -%}
            {%- if call.function -%}{%- set call = call.function -%}{%- endif -%}
            {{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' -}}
            {{- call.arguments if call.arguments is string else call.arguments | tojson -}}
            {{- '}\\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\\n' -}}
    {%- elif message.role == 'tool' -%}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
        {{- '\\n<tool_response>\\n' + body(message.content) + '\\n</tool_response>' -}}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
    {%- else -%}
        {{- '<|im_start|>' + message.role + '\\n' + body(message.content) + '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
""".replace("TOOLS_HEAD", repr(TOOLS_HEAD)).replace("TOOLS_END", repr(TOOLS_END))


@dataclass(slots=True)
class TokenIds:
    """Ids of the special tokens that encoding and generation use.

    ``endoftext`` ends a plain-text document and pads; ``eos`` is the tokenizer's own end token, ``<|im_end|>`` here
    and in the published model: a reply ends with it.
    """

    endoftext: int
    im_start: int
    im_end: int
    audio_start: int
    audio_end: int
    audio_pad: int
    vision_start: int
    vision_end: int
    vision_pad: int
    image_pad: int
    video_pad: int
    tts_pad: int
    tts_bos: int
    tts_eos: int
    eos: int


def media_token_ids(tokenizer: PreTrainedTokenizerBase, kind: str) -> tuple[int, ...]:
    """Ids of the placeholders of what a tower of ``kind`` reads: audio, or pictures and videos."""
    ids = token_ids(tokenizer)
    return (ids.audio_pad,) if kind == "audio" else (ids.image_pad, ids.video_pad)


def train_tokenizer(texts: Iterable[str], vocab_size: int, out: Path) -> Qwen2Tokenizer:
    """A byte-level BPE over ``texts`` with Qwen's pre-tokenisation, saved as a `transformers` folder at ``out``.

    ``vocab_size`` counts everything: 256 bytes, merges and special tokens; little text may give fewer merges than
    asked. The same texts give the same tokenizer. Raises ValueError if the size leaves no room for the bytes.
    """
    num_merges = vocab_size - 256 - len(_ADDED_TOKENS)
    if num_merges < 0:
        raise ValueError(
            f"vocab_size ({vocab_size:,}) must hold 256 bytes and {len(_ADDED_TOKENS)} special tokens; "
            f"use at least {256 + len(_ADDED_TOKENS)}"
        )
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + num_merges,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    model = json.loads(bpe.to_str())["model"]
    tokenizer = _with_special_tokens(model["vocab"], [tuple(pair) for pair in model["merges"]])
    tokenizer.save_pretrained(str(out))
    return tokenizer


def _with_special_tokens(vocab: dict[str, int], merges: list[Any]) -> Qwen2Tokenizer:
    vocab = {**vocab, **{token: len(vocab) + i for i, token in enumerate(_ADDED_TOKENS)}}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        eos_token=IM_END,
        pad_token=ENDOFTEXT,
        extra_special_tokens=_NAMED_TOKENS,
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=t not in _TEXT_TOKENS) for t in _ADDED_TOKENS])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a local folder, checked to hold every special token of Qwen3-Omni as one token.

    Never asks the network. Raises ValueError naming what is missing and how to get it.
    """
    folder = Path(folder)
    has_files = (folder / "tokenizer.json").is_file() or (
        (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    )
    if not has_files:
        raise ValueError(
            f"no tokenizer in {folder}: tokenizer.json (or vocab.json and merges.txt) is missing; point to a "
            "Qwen3-Omni folder, or make one with omni_train.data.tokenizer.train_tokenizer"
        )
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    vocab = tokenizer.get_vocab()
    missing = [token for token in REQUIRED_TOKENS if token not in vocab]
    if missing:
        raise ValueError(
            f"the tokenizer in {folder} lacks the special tokens {', '.join(missing)}; use the tokenizer of a "
            "Qwen3-Omni folder (Qwen3 and Qwen3-VL have no audio tokens), or make one with "
            "omni_train.data.tokenizer.train_tokenizer"
        )
    return tokenizer


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits of a hash over vocabulary, merges and special ids; the same after save and load.

    Two tokenizers with one fingerprint give the same token counts, so an index made with one serves the other.
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    parts = (sorted(tokenizer.get_vocab().items()), merges, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return hashlib.sha256(json.dumps(parts, ensure_ascii=True).encode()).hexdigest()[:16]


def token_ids(tokenizer: PreTrainedTokenizerBase) -> TokenIds:
    """The ids of the special tokens. Raises ValueError naming a token that the vocabulary lacks."""
    vocab = tokenizer.get_vocab()
    missing = [token for token in REQUIRED_TOKENS if token not in vocab]
    if missing:
        raise ValueError(f"the tokenizer lacks the special tokens {', '.join(missing)}; load it with load_tokenizer")
    return TokenIds(
        endoftext=vocab[ENDOFTEXT],
        im_start=vocab[IM_START],
        im_end=vocab[IM_END],
        audio_start=vocab[AUDIO_START],
        audio_end=vocab[AUDIO_END],
        audio_pad=vocab[AUDIO_PAD],
        vision_start=vocab[VISION_START],
        vision_end=vocab[VISION_END],
        vision_pad=vocab[VISION_PAD],
        image_pad=vocab[IMAGE_PAD],
        video_pad=vocab[VIDEO_PAD],
        tts_pad=vocab[TTS_PAD],
        tts_bos=vocab[TTS_BOS],
        tts_eos=vocab[TTS_EOD],
        eos=tokenizer.eos_token_id if tokenizer.eos_token_id is not None else vocab[IM_END],
    )


def token_spelling(tokenizer: PreTrainedTokenizerBase, size: int) -> list[bytes]:
    """The UTF-8 bytes that each token id below ``size`` stands for; none for control tokens and ids without a token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [n for n in range(256) if chr(n) in letters]
    # Byte-level BPE writes a byte that is no letter as the next character from U+0100 on (GPT-2's table).
    byte_of = {chr(n): n for n in printable}
    byte_of |= {chr(256 + k): n for k, n in enumerate(n for n in range(256) if n not in set(printable))}
    spelling = [b""] * size
    for token, number in tokenizer.get_vocab().items():
        if number < size and number not in tokenizer.added_tokens_decoder:
            spelling[number] = bytes(byte_of[character] for character in token)
    return spelling
