"""Videos: bytes → frames at the times that the planner counted on → patches, and the sound track as a wave.

A video of ``video_grid`` (t, h, w) gives t · temporal_patch_size frames, each the picture that is on screen in the
middle of its share of the time, so a variable frame rate needs no special case. A video that its file says is to be
turned (a phone held upright) is seen upright.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import VideoReformatter

from omni_train.data.contracts import MediaFacts
from omni_train.data.image import patches_of
from omni_train.data.media_tokens import (
    MIN_SAMPLES,
    SAMPLE_RATE_HZ,
    MediaGeometry,
    check_aspect_ratio,
    video_grid,
    video_num_grids,
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
        facts = _stored_facts(member, data, container, with_sound)
        return _seen(facts, _first_quarter_turns(container))


def _stored_facts(member: str, data: bytes, container: av.container.InputContainer, with_sound: bool) -> MediaFacts:
    """``video_facts`` of frames as stored, from the header of an open container, whose place in the file stays."""
    video = _video_stream(container)
    num_frames, seconds = _frames_and_seconds(data, container, video)
    check_aspect_ratio(video.height, video.width)
    facts = MediaFacts(
        member=member,
        kind="video",
        width=video.width,
        height=video.height,
        num_frames=num_frames,
        fps=num_frames / seconds,
        has_audio=with_sound,
    )
    if with_sound:
        if not container.streams.audio:
            raise ValueError("the video has no sound, but its part says use_audio_in_video; set that to false")
        facts.sample_rate_hz = SAMPLE_RATE_HZ
        sound = container.streams.audio[0]
        lead = _sound_lead(container)
        if sound.duration is None:  # webm, mkv: the container's, which counts from the first of all to the end
            lead = min(lead, 0)
        facts.num_samples = max(MIN_SAMPLES, round(_seconds(sound, container) * SAMPLE_RATE_HZ) + lead)
    return facts


def _sound_lead(container: av.container.InputContainer) -> int:
    """Samples at 16 kHz from the first picture to the first sound, negative where the sound begins before.

    0 for less than a fifth of a second: headers tell a codec's own delay, which its decoder takes out, in the same way.
    """
    video, audio = (
        float((stream.start_time or 0) * stream.time_base)
        for stream in (_video_stream(container), container.streams.audio[0])
    )
    lead = round((audio - video) * SAMPLE_RATE_HZ)
    return lead if abs(lead) >= SAMPLE_RATE_HZ // 5 else 0


def _seen(stored: MediaFacts, quarter_turns: int) -> MediaFacts:
    """The facts with the size that frames have after that many quarter turns."""
    return replace(stored, width=stored.height, height=stored.width) if quarter_turns % 2 else stored


def _first_quarter_turns(container: av.container.InputContainer) -> int:
    """``_quarter_turns`` of the first frame. Raises ValueError if there is none that can be decoded."""
    try:
        first = next(iter(container.decode(_video_stream(container))), None)
    except av.FFmpegError as error:
        raise ValueError(f"cannot decode the video: {error}") from error
    if first is None:
        raise ValueError("the video has no frame that can be decoded")
    return _quarter_turns(first)


def _quarter_turns(frame: av.VideoFrame) -> int:
    """Quarter turns counter-clockwise from a frame as stored to as seen: its display matrix, which no header tells."""
    return round(frame.rotation / 90)


@dataclass(slots=True)
class Video:
    """``patches`` float32 [t*h*w, patch_dim] of a ``grid`` (t, h, w) whose every t spans ``seconds_per_grid``.

    ``wave`` is the sound track, float32 [num_samples], mono, 16 kHz, or None where it is not heard.
    """

    patches: np.ndarray
    grid: tuple[int, int, int]
    seconds_per_grid: float
    wave: np.ndarray | None = None


def decode_video(data: bytes, geometry: MediaGeometry, with_sound: bool = False) -> Video:
    """The frames of a video file that the planner counted on, and its sound if wanted, from one pass over the file.

    The sound begins with the first picture (by silence or a cut where its track begins elsewhere) and has the length
    that the header says. Raises ValueError for a file that is broken.
    """
    with _open(data) as container:
        stored = _stored_facts("", data, container, with_sound)
        seconds = video_seconds_per_grid(stored.num_frames, stored.fps, geometry)
        num_wanted = video_num_grids(stored.num_frames, stored.fps, geometry) * geometry.temporal_patch_size
        times = (np.arange(num_wanted) + 0.5) * seconds / geometry.temporal_patch_size

        def grid_of(quarter_turns: int) -> tuple[int, int, int]:
            facts = _seen(stored, quarter_turns)
            return video_grid(facts.width, facts.height, facts.num_frames, facts.fps, geometry)

        screen = _Screen(_video_stream(container), times, lambda turns: size_px(grid_of(turns), geometry))
        wave = _decode(container, screen, stored.num_samples if with_sound else None)
        frames, grid = screen.frames(), grid_of(screen.quarter_turns)
    return Video(patches_of(frames, grid, geometry), grid, seconds, wave)


def size_px(grid: tuple[int, int, int], geometry: MediaGeometry) -> tuple[int, int]:
    """(height, width) of the frames of a grid."""
    return grid[1] * geometry.patch_size, grid[2] * geometry.patch_size


def resized(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Frames uint8 [n, ., ., 3] in another size: torch's antialiased bicubic on bytes, which torchvision's also is."""
    if frames.shape[1:3] == size:
        return frames
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
    return F.interpolate(pixels, size=size, mode="bicubic", antialias=True).permute(0, 2, 3, 1).numpy()


def _decode(container: av.container.InputContainer, screen: _Screen, num_samples: int | None) -> np.ndarray | None:
    """Fills the screen; ``_Sound`` of that length or None. Reads no further than needed."""
    sound = _Sound(_sound_lead(container) if num_samples is not None else 0)
    streams: list[av.VideoStream | av.AudioStream] = [_video_stream(container)]
    if num_samples is not None:
        streams.append(container.streams.audio[0])
    what = "video"
    try:
        for packet in container.demux(streams):
            if packet.stream.type == "audio":
                what = "video's sound"
                for samples in packet.decode():
                    sound.add(samples)
            elif not screen.is_full:
                what = "video"
                for frame in packet.decode():
                    if frame.is_corrupt:  # what FFmpeg makes up for a damaged part of H.264
                        raise ValueError(f"cannot decode the video: its frame at {frame.time} s is damaged")
                    screen.add(frame)
            elif num_samples is None:
                break
        what = "video"
        screen.finish()
        what = "video's sound"
        return None if num_samples is None else sound.wave(num_samples)
    except av.FFmpegError as error:
        raise ValueError(f"cannot decode the {what}: {error}") from error


class _Screen:
    """The frame on screen at each of ascending ``times`` (seconds from the first), of frames added in order.

    Each is made as small as it is wanted at once: a minute of full frames would be gigabytes. ``quarter_turns``: those
    of the first frame, as ``video_facts`` counts them; ``size_of`` them is (height, width) in pixels.
    """

    def __init__(self, stream: av.VideoStream, times: np.ndarray, size_of: Callable[[int], tuple[int, int]]) -> None:
        self._times, self._time_base = times, stream.time_base
        self._start = (stream.start_time or 0) * stream.time_base
        self._size_of = size_of
        self._size_px: tuple[int, int] | None = None
        self._shown: av.VideoFrame | None = None
        self._chosen: list[np.ndarray] = []
        self._reformatter = VideoReformatter()
        self.quarter_turns = 0

    @property
    def is_full(self) -> bool:
        return len(self._chosen) == len(self._times)

    def add(self, frame: av.VideoFrame) -> None:
        """Takes note that ``frame`` is shown from its time on."""
        if self._size_px is None:
            self.quarter_turns = _quarter_turns(frame)
            self._size_px = self._size_of(self.quarter_turns)
        if frame.pts is not None:
            self._fill(float(frame.pts * self._time_base - self._start))
            self._shown = frame

    def finish(self) -> None:
        """The last frame stays. Raises ValueError without any."""
        if self._shown is None:
            raise ValueError("the video has no frame that can be decoded")
        self._fill(math.inf)

    def frames(self) -> np.ndarray:
        """RGB uint8 [len(times), height, width, 3], upright, once the last frame is there."""
        return np.concatenate(self._chosen)

    def _fill(self, until: float) -> None:
        """Chooses the frame that is shown for all times before ``until``."""
        if self._shown is None or self._size_px is None or self.is_full or self._times[len(self._chosen)] >= until:
            return
        # NOTE: one thread; swscale's own count is the machine's, and each frame would wait for all of them.
        pixels = self._reformatter.reformat(self._shown, format="rgb24", threads=1).to_ndarray()
        upright = np.ascontiguousarray(np.rot90(pixels, _quarter_turns(self._shown)))
        fitted = resized(upright[None], self._size_px)
        while not self.is_full and self._times[len(self._chosen)] < until:
            self._chosen.append(fitted)


class _Sound:
    """Audio frames added in order, as one wave: mono, 16 kHz; ``lead`` samples of silence come first, or where it is
    negative as many of its own are left out."""

    def __init__(self, lead: int) -> None:
        self._lead = lead
        self._resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE_HZ)
        self._pieces: list[np.ndarray] = []

    def add(self, samples: av.AudioFrame | None) -> None:
        """Appends the samples; None appends what the resampler still holds."""
        self._pieces += [resampled.to_ndarray()[0] for resampled in self._resampler.resample(samples)]

    def wave(self, num_samples: int) -> np.ndarray:
        """Float32 [num_samples], cut or padded with silence. Raises ValueError for samples that are no numbers."""
        self.add(None)
        wave = np.concatenate(self._pieces) if self._pieces else np.zeros(0, np.float32)
        wave = np.pad(wave, (self._lead, 0)) if self._lead > 0 else wave[-self._lead :]
        if not np.isfinite(wave).all():
            raise ValueError("the video's sound holds NaN or infinite samples")
        return np.pad(wave, (0, max(0, num_samples - len(wave))))[:num_samples].astype(np.float32, copy=False)


@contextmanager
def _open(data: bytes) -> Iterator[av.container.InputContainer]:
    if not data:
        raise ValueError("video is empty (0 bytes)")
    _check_mp4_is_whole(data)
    try:
        container = av.open(io.BytesIO(data), options=_OPTIONS, metadata_errors="replace")  # a Latin-1 title
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
    if stream.codec_context is None:
        raise ValueError("FFmpeg does not know the video's codec, or it is encrypted; use H.264, VP9 or AV1")
    stream.thread_count = 1  # ranks and workers are the parallelism
    return stream


def _frames_and_seconds(
    data: bytes, container: av.container.InputContainer, stream: av.VideoStream
) -> tuple[int, float]:
    num_frames = stream.frames
    if not num_frames:  # no table in the container (webm, mkv): count packets
        with _open(data) as again:  # its own, so that nobody has to seek back
            num_frames = sum(1 for packet in again.demux(_video_stream(again)) if packet.size)
    seconds = _seconds(stream, container)
    if num_frames < 1 or not math.isfinite(seconds) or seconds <= 0:
        raise ValueError(f"the video has {num_frames} frames in {seconds} s; it has no duration")
    return num_frames, seconds


def _seconds(stream: av.VideoStream | av.AudioStream, container: av.container.InputContainer) -> float:
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return float(container.duration / av.time_base) if container.duration is not None else math.nan
