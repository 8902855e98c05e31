"""Videos: bytes → frames at the times that the planner counted on → patches, and the sound track as a wave.

A video of ``video_grid`` (t, h, w) gives t · temporal_patch_size frames, each the picture that is on screen in the
middle of its share of the time, so a variable frame rate needs no special case. A video that its file says is to be
turned (a phone held upright) is seen upright.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import av
import numpy as np
import torch
import torch.nn.functional as F

from omni_train.data.contracts import MediaFacts
from omni_train.data.image import patches_of
from omni_train.data.media_tokens import (
    MIN_SAMPLES,
    SAMPLE_RATE_HZ,
    MediaGeometry,
    check_aspect_ratio,
    video_grid,
    video_seconds_per_grid,
)

_OPTIONS = {"format_whitelist": "mov,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,gif"}
"""What FFmpeg may open, whatever a member is called. Not playlists, which name other files and addresses."""
_MP4_STARTS = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")


def video_facts(member: str, data: bytes, with_sound: bool = False) -> MediaFacts:
    """Size as seen, frames, mean frame rate and length of the sound of a video file; decodes its first frame only.

    ``with_sound`` says that the sound is wanted; then a file without any is refused. Raises ValueError for what cannot
    be read.
    """
    with _open(data) as container:
        video = _video_stream(container)
        num_frames, seconds = _frames_and_seconds(container, video)
        width, height = video.width, video.height
        check_aspect_ratio(height, width)
        if _quarter_turns(container, video) % 2:
            width, height = height, width
        facts = MediaFacts(
            member=member,
            kind="video",
            width=width,
            height=height,
            num_frames=num_frames,
            fps=num_frames / seconds,
            has_audio=with_sound,
        )
        if with_sound:
            if not container.streams.audio:
                raise ValueError("the video has no sound, but its part says use_audio_in_video; set that to false")
            facts.sample_rate_hz = SAMPLE_RATE_HZ
            seconds = _seconds(container.streams.audio[0], container)
            facts.num_samples = max(MIN_SAMPLES, round(seconds * SAMPLE_RATE_HZ))
    return facts


@dataclass(slots=True)
class Video:
    """``patches`` float32 [t*h*w, patch_dim] of a ``grid`` (t, h, w) whose every t spans ``seconds_per_grid``."""

    patches: np.ndarray
    grid: tuple[int, int, int]
    seconds_per_grid: float


def decode_video(data: bytes, geometry: MediaGeometry) -> Video:
    """The frames of a video file that the planner counted on. Raises ValueError for a file that is broken."""
    facts = video_facts("", data)
    grid = video_grid(facts.width, facts.height, facts.num_frames, facts.fps, geometry)
    seconds = video_seconds_per_grid(facts.num_frames, facts.fps, geometry)
    num_wanted = grid[0] * geometry.temporal_patch_size
    times = (np.arange(num_wanted) + 0.5) * seconds / geometry.temporal_patch_size
    return Video(patchify_frames(_frames_at(data, times), grid, geometry), grid, seconds)


def decode_sound(data: bytes, num_samples: int) -> np.ndarray:
    """The sound track of a video: float32 [num_samples], mono, 16 kHz, cut or padded with silence to that length."""
    pieces: list[np.ndarray] = []
    with _open(data) as container:
        resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE_HZ)
        try:
            for frame in container.decode(container.streams.audio[0]):
                pieces += [resampled.to_ndarray()[0] for resampled in resampler.resample(frame)]
            pieces += [resampled.to_ndarray()[0] for resampled in resampler.resample(None)]
        except av.FFmpegError as error:
            raise ValueError(f"cannot decode the video's sound: {error}") from error
    wave = np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
    if not np.isfinite(wave).all():
        raise ValueError("the video's sound holds NaN or infinite samples")
    return np.pad(wave, (0, max(0, num_samples - len(wave))))[:num_samples].astype(np.float32, copy=False)


def patchify_frames(frames: np.ndarray, grid: tuple[int, int, int], geometry: MediaGeometry) -> np.ndarray:
    """``patches_of`` frames uint8 [t * temporal, height, width, 3] of any size, resized to the grid.

    The resize is torch's antialiased bicubic on bytes, which torchvision's also is.
    """
    size = (grid[1] * geometry.patch_size, grid[2] * geometry.patch_size)
    if frames.shape[1:3] != size:
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
        frames = F.interpolate(pixels, size=size, mode="bicubic", antialias=True).permute(0, 2, 3, 1).numpy()
    return patches_of(frames, grid, geometry)


def _frames_at(data: bytes, times: np.ndarray) -> np.ndarray:
    """RGB uint8 [len(times), height, width, 3]: the frame on screen at each of the ascending times (s), upright."""
    chosen: list[np.ndarray] = []
    with _open(data) as container:
        stream = _video_stream(container)
        start = (stream.start_time or 0) * stream.time_base
        shown: av.VideoFrame | None = None
        try:
            for frame in container.decode(stream):
                if frame.pts is None:
                    continue
                at = float(frame.pts * stream.time_base - start)
                while shown is not None and len(chosen) < len(times) and times[len(chosen)] < at:
                    chosen.append(_upright(shown))
                shown = frame
                if len(chosen) == len(times):
                    break
        except av.FFmpegError as error:
            raise ValueError(f"cannot decode the video: {error}") from error
        if shown is None:
            raise ValueError("the video has no frame that can be decoded")
        while len(chosen) < len(times):
            chosen.append(_upright(shown))
    return np.stack(chosen)


def _upright(frame: av.VideoFrame) -> np.ndarray:
    """RGB uint8 [height, width, 3], turned by the frame's display matrix."""
    return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))


def _quarter_turns(container: av.container.InputContainer, stream: av.VideoStream) -> int:
    """Quarter turns counter-clockwise from a frame as stored to as seen: only frames tell.

    Raises ValueError if there is no frame that can be decoded.
    """
    try:
        container.seek(0)
        first = next(iter(container.decode(stream)), None)
    except av.FFmpegError as error:
        raise ValueError(f"cannot decode the video: {error}") from error
    if first is None:
        raise ValueError("the video has no frame that can be decoded")
    return round(first.rotation / 90)


@contextmanager
def _open(data: bytes) -> Iterator[av.container.InputContainer]:
    if not data:
        raise ValueError("video is empty (0 bytes)")
    _check_mp4_is_whole(data)
    try:
        container = av.open(io.BytesIO(data), options=_OPTIONS)
    except (av.FFmpegError, ValueError) as error:
        raise ValueError(f"cannot read video of {len(data):,} bytes: {error}; use mp4 or webm") from error
    with container:
        yield container


def _check_mp4_is_whole(data: bytes) -> None:
    """Raises ValueError for an mp4 that ends inside one of its boxes. FFmpeg would show its last frame to the end."""
    at = 0
    while data[4:8] in _MP4_STARTS and at + 8 <= len(data):
        size, name = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        if at + size > len(data) and name in (b"mdat", b"moov", b"moof"):
            what = f"its box {name.decode()!r} says {size:,} bytes, {len(data) - at:,} are left"
            raise ValueError(f"video is cut short: {what}")
        if size < 8:  # 0: to the end of the file
            return
        at += size


def _video_stream(container: av.container.InputContainer) -> av.VideoStream:
    if not container.streams.video:
        raise ValueError("the file has no video stream")
    stream = container.streams.video[0]
    stream.thread_count = 1  # ranks and workers are the parallelism
    return stream


def _frames_and_seconds(container: av.container.InputContainer, stream: av.VideoStream) -> tuple[int, float]:
    num_frames = stream.frames
    if not num_frames:  # no table in the container (webm, mkv): count packets
        num_frames = sum(1 for packet in container.demux(stream) if packet.size)
        container.seek(0)
    seconds = _seconds(stream, container)
    if num_frames < 1 or not math.isfinite(seconds) or seconds <= 0:
        raise ValueError(f"the video has {num_frames} frames in {seconds} s; it has no duration")
    return num_frames, seconds


def _seconds(stream: av.VideoStream | av.AudioStream, container: av.container.InputContainer) -> float:
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return float(container.duration / av.time_base) if container.duration is not None else math.nan
