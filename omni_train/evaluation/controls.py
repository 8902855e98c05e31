"""Controls: the same questions and references with something taken away, so that a right answer is no longer there.

samples ──changed──▶ samples with the media of others, or no system turn ──encode──▶ documents ──without_motion──▶ still
"""

from __future__ import annotations

import copy
import dataclasses
import io
import zlib
from collections import Counter

import av
import numpy as np

from omni_train.config import Control
from omni_train.data.contracts import Document, Sample
from omni_train.data.media_tokens import MediaGeometry

SWAPS = (Control.media_swapped, Control.sound_swapped)


def changeable(samples: list[Sample], control: Control) -> list[Sample]:
    """Those of the samples that a control can change: to swap media takes another one of equal kinds."""
    if control not in SWAPS:
        return samples
    numbers = Counter(kinds_of(sample) for sample in samples)
    return [sample for sample in samples if numbers[kinds_of(sample)] > 1]


def kinds_of(sample: Sample) -> tuple[str, ...]:
    """The names of a sample's members: media are swapped among those of equal names."""
    return tuple(sorted(sample.members))


def changed(samples: list[Sample], control: Control, seed: int = 0) -> list[Sample]:
    """The samples without their system turns, or with the media (all, or the sound) of another one, drawn by a random
    rotation among equal kinds.

    Controls that change nothing but frames leave the samples as they are. See ``changeable``: a sample without its like
    would keep its own media.
    """
    if control is Control.system_left_out:
        kept = [[turn for turn in sample.content["messages"] if turn["role"] != "system"] for sample in samples]
        contents = [{**sample.content, "messages": own} for sample, own in zip(samples, kept, strict=True)]
        return [dataclasses.replace(sample, content=own) for sample, own in zip(samples, contents, strict=True)]
    if control not in SWAPS:
        return samples
    partner: dict[int, int] = {}
    rng = np.random.default_rng(seed)
    for kinds in sorted({kinds_of(sample) for sample in samples}):
        alike = np.array([n for n, sample in enumerate(samples) if kinds_of(sample) == kinds])
        order = rng.permutation(alike)
        partner |= dict(zip(order, np.roll(order, 1), strict=True))
    swapped = []
    for number, sample in enumerate(samples):
        other = copy.copy(sample)
        taken = samples[partner[number]].members
        if control is Control.media_swapped:
            other.members = {**taken, "json": sample.members.get("json", b"")}
        else:
            other.members = {name: _with_sound(name, data, taken[name]) for name, data in sample.members.items()}
        swapped.append(other)
    return swapped


def _with_sound(name: str, data: bytes, other: bytes) -> bytes:
    """The member with the sound of ``other``: another recording as it is, a video's pictures with the other's sound."""
    match name.rpartition(".")[2]:
        case "flac" | "wav" | "mp3" | "ogg":
            return other
        case "mp4" | "mkv" | "webm" | "mov":
            return join_streams(data, other)
    return data


def join_streams(pictures: bytes, sound: bytes) -> bytes:
    """An mp4 of the pictures of one video and the sound of another, copied without decoding.

    Raises ValueError where the other has no sound.
    """
    file = io.BytesIO()
    with (
        av.open(io.BytesIO(pictures), metadata_errors="replace") as seen,
        av.open(io.BytesIO(sound), metadata_errors="replace") as heard,
        av.open(file, "w", format="mp4") as out,
    ):
        if not heard.streams.audio:
            raise ValueError("a video without sound has none to swap; measure its task with another control")
        inputs = (seen, seen.streams.video[0]), (heard, heard.streams.audio[0])
        streams = [out.add_stream_from_template(stream) for _, stream in inputs]
        for (container, stream), target in zip(inputs, streams, strict=True):
            for packet in container.demux(stream):
                if packet.dts is not None:
                    packet.stream = target
                    out.mux(packet)
    return file.getvalue()


def without_motion(document: Document, control: Control, geometry: MediaGeometry) -> Document:
    """The document with the frames of its videos frozen or shuffled; any other control leaves it as it is."""
    if control not in (Control.frames_frozen, Control.frames_shuffled):
        return document
    rng = np.random.default_rng(zlib.crc32(document.sample_id.encode("utf-8", "surrogateescape")))
    still = []
    for patches, (t, h, w) in zip(document.video_patches, document.video_grids, strict=True):
        times = geometry.temporal_patch_size
        frames = patches.reshape(t, h * w, 3, times, -1).swapaxes(1, 3)  # [t, times, 3, h*w, pixels of a patch]
        frames = frames.reshape(t * times, *frames.shape[2:])
        order = rng.permutation(len(frames)) if control is Control.frames_shuffled else np.zeros(len(frames), int)
        frames = frames[order].reshape(t, times, *frames.shape[1:]).swapaxes(1, 3)
        still.append(np.ascontiguousarray(frames.reshape(patches.shape)))
    return dataclasses.replace(document, video_patches=still)
