"""``KEY.codes.npy`` for samples of speech: shards → new shards with one member more.

What a codec makes of the speech of a reply is what the Talker learns to predict: int16 [G, T], G codebooks, 12.5 frames
a second. The old shards stay as they are.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

from omni_train.config import LayoutConfig
from omni_train.data.audio import decode_audio
from omni_train.data.layouts import read_content
from omni_train.data.media_tokens import CODEC_SAMPLE_RATE_HZ
from omni_train.data.shard import DataError, SampleScan
from omni_train.data.talker_sequence import CODES


def add_codes(shard: Path, out: Path, encode: Callable[[np.ndarray], np.ndarray], layout: LayoutConfig) -> int:
    """Write ``out``: the samples of ``shard`` in their order, with the codes of those that have speech; how many have.

    ``encode`` maps a 24 kHz wave [n] to codes [G, T]. ``out`` appears when it is whole. Raises DataError naming the
    sample that cannot be read, FileExistsError where ``out`` is there.
    """
    num_coded = 0
    with new_shard(out) as write:
        for sample in SampleScan(shard):
            if sample.error:
                raise DataError.at(shard, sample.offset, sample.error, key=sample.key)
            members = {name: data for name, data in sample.members.items() if name != CODES}
            try:
                name = speech_member(read_content(members, layout))
                if name is not None:
                    codes = encode(decode_audio(members[name], CODEC_SAMPLE_RATE_HZ))
                    members[CODES], num_coded = to_npy(codes), num_coded + 1
            except (ValueError, KeyError) as error:
                raise DataError.at(shard, sample.offset, str(error), key=sample.key) from error
            write({"__key__": sample.key, **members})
    return num_coded


@contextmanager
def new_shard(out: Path) -> Iterator[Callable[[dict[str, Any]], object]]:
    """A function that writes a sample ({"__key__": key, extension: bytes}) into the shard ``out``, which appears when
    the block ends well. Raises FileExistsError where it is there."""
    if out.exists():
        raise FileExistsError(f"'{out}' exists; codes go into new shards: give another folder, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f"{out.name}.tmp{os.getpid()}")
    try:
        with webdataset.TarWriter(str(temporary), encoder=False, mtime=0.0) as writer:
            yield writer.write
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)


def speech_member(content: dict[str, Any]) -> str | None:
    """The clip whose codes a sample is to have: that of its last reply with one, else its only clip; None without.

    Raises ValueError where several clips leave it open.
    """
    clips: dict[str, list[str]] = {"assistant": [], "user": []}
    for message in content.get("messages", []):
        for part in message["content"] if isinstance(message.get("content"), list) else []:
            if part["type"] == "audio":
                clips.setdefault(message["role"], []).append(part["audio"])
    if clips["assistant"]:
        return clips["assistant"][-1]
    others = [name for names in clips.values() for name in names]
    if len(others) > 1:
        raise ValueError(f"its clips {', '.join(others)} are all prompts; name the reply's speech in its message")
    return others[0] if others else None


def to_npy(codes_GT: np.ndarray) -> bytes:
    """The bytes of KEY.codes.npy."""
    file = io.BytesIO()
    np.save(file, codes_GT.astype(np.int16))
    return file.getvalue()
