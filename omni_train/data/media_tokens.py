"""How many tokens a medium becomes: one set of pure functions for the planner (facts only) and the encoder (real
data).

Audio: 16 kHz → 100 mel frames a second → 13 tokens a second (8× by three strided convolutions, in chunks of 1 s).
Pictures: sides rounded to multiples of patch · merge, one token for merge² patches.
Video: pairs of frames, evenly spaced so that a pair spans a whole number of audio tokens (nominally 80 ms each).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from omni_train.data.contracts import MediaFacts

SAMPLE_RATE_HZ = 16_000
CODEC_SAMPLE_RATE_HZ = 24_000
"""What the codec hears and Code2Wav speaks."""
SAMPLES_PER_CODEC_FRAME = 1920
"""80 ms: 12.5 frames of codes a second."""
HOP = 160
NUM_MELS = 128
MIN_SAMPLES = 201
"""Shortest clip at 16 kHz (12.6 ms): the spectrogram mirrors 200 samples at each end and needs one more than it
mirrors."""
MAX_ASPECT_RATIO = 200
_CHUNK_FRAMES, _CHUNK_TOKENS = 100, 13


@dataclass(kw_only=True, slots=True)
class MediaGeometry:
    """Sizes that decide how media become tokens. Defaults are those of the published preprocessor.

    ``min_pixels`` and ``max_pixels`` bound a picture after the resize, the ``video_`` pair one frame of a video.
    The temporal patches of a video share ``video_total_pixels`` (None: no bound), but each may have 1.05 times
    ``video_min_pixels``: ``total_pixels`` of qwen-omni-utils, ``max_video_tokens`` of transformers' processor.
    ``video_fps`` is the wanted frame rate, lowered for videos of more than ``video_max_frames``. The audio fields state
    what the code is built for; another value is refused.
    """

    patch_size: int = 16
    merge_size: int = 2
    temporal_patch_size: int = 2
    min_pixels: int = 3_136
    max_pixels: int = 12_845_056
    video_min_pixels: int = 128 * 32 * 32
    video_max_pixels: int = 768 * 32 * 32
    video_total_pixels: int | None = None
    video_fps: float = 2.0
    video_max_frames: int = 768
    position_id_per_seconds: int = 13
    audio_sample_rate_hz: int = SAMPLE_RATE_HZ
    mel_bins: int = NUM_MELS
    hop: int = HOP

    def __post_init__(self) -> None:
        for name, value in (("audio_sample_rate_hz", SAMPLE_RATE_HZ), ("mel_bins", NUM_MELS), ("hop", HOP)):
            if getattr(self, name) != value:
                raise ValueError(
                    f"MediaGeometry.{name} ({getattr(self, name)}) must be {value}: the audio encoder fixes it"
                )
        if self.video_total_pixels is not None and self.video_total_pixels <= 0:
            raise ValueError(f"video_total_pixels ({self.video_total_pixels:,}) must be positive, or null for no bound")
        for prefix in ("", "video_"):
            low, high = getattr(self, f"{prefix}min_pixels"), getattr(self, f"{prefix}max_pixels")
            if not 0 < low <= high:
                raise ValueError(
                    f"{prefix}min_pixels ({low:,}) must be positive and at most {prefix}max_pixels ({high:,})"
                )
            if high < self.factor**2:
                raise ValueError(
                    f"{prefix}max_pixels ({high:,}) must hold one token of {self.factor}×{self.factor} pixels"
                )

    @property
    def factor(self) -> int:
        """Side in pixels of the square that becomes one token."""
        return self.patch_size * self.merge_size

    @property
    def patch_dim(self) -> int:
        """Numbers in one row of ``patches``: RGB × temporal × patch × patch."""
        return 3 * self.temporal_patch_size * self.patch_size**2


def resampled_num_samples(num_samples: int, sample_rate_hz: int, target_hz: int = SAMPLE_RATE_HZ) -> int:
    """Length at ``target_hz`` of ``num_samples`` at ``sample_rate_hz``, rounded half up (what soxr returns)."""
    return (2 * num_samples * target_hz + sample_rate_hz) // (2 * sample_rate_hz)


def codec_num_frames(num_samples: int, sample_rate_hz: int = CODEC_SAMPLE_RATE_HZ) -> int:
    """Codec frames of a clip as stored; the last one may be part silence."""
    return -(-resampled_num_samples(num_samples, sample_rate_hz, CODEC_SAMPLE_RATE_HZ) // SAMPLES_PER_CODEC_FRAME)


def audio_num_frames(num_samples: int, sample_rate_hz: int = SAMPLE_RATE_HZ) -> int:
    """Mel frames of a clip of ``num_samples`` as stored at ``sample_rate_hz``: one a full 10 ms, the rest is
    dropped."""
    return resampled_num_samples(num_samples, sample_rate_hz) // HOP


def audio_num_tokens(num_frames: int) -> int:
    """Tokens of a clip of ``num_frames`` mel frames; `transformers`' ``_get_feat_extract_output_lengths`` with
    n_window 50."""
    num_chunks, rest = divmod(num_frames, _CHUNK_FRAMES)
    return num_chunks * _CHUNK_TOKENS + -(-rest // 8)


def smart_resize(height: int, width: int, geometry: MediaGeometry) -> tuple[int, int]:
    """(height, width) in pixels to which a picture is resized: multiples of ``factor``, within the pixel limits.

    Equal to `transformers` qwen2_vl ``smart_resize``. Raises ValueError for an aspect ratio over 200.
    """
    return _resize(height, width, geometry.factor, geometry.min_pixels, geometry.max_pixels)


def _resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    check_aspect_ratio(height, width)
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        beta = math.sqrt((height * width) / max_pixels)
        new_height = max(factor, math.floor(height / beta / factor) * factor)
        new_width = max(factor, math.floor(width / beta / factor) * factor)
    elif new_height * new_width < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * beta / factor) * factor
        new_width = math.ceil(width * beta / factor) * factor
    return new_height, new_width


def check_aspect_ratio(height: int, width: int) -> None:
    """Raises ValueError for a picture without pixels or longer than 200 times its shorter side."""
    if min(height, width) < 1:
        raise ValueError(f"a picture of {width}×{height} pixels is empty")
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(
            f"a picture of {width}×{height} pixels is too long: at most {MAX_ASPECT_RATIO} times its shorter side"
        )


def image_grid(width: int, height: int, geometry: MediaGeometry) -> tuple[int, int, int]:
    """(1, h, w) in patches of a picture of width × height pixels."""
    new_height, new_width = smart_resize(height, width, geometry)
    return 1, new_height // geometry.patch_size, new_width // geometry.patch_size


def video_seconds_per_grid(num_frames: int, fps: float, geometry: MediaGeometry) -> float:
    """Seconds that one temporal patch (a pair of frames) spans: a whole number of position ids, so positions are
    integers.

    The wanted rate is ``video_fps``, never more than the file's own, lowered until at most ``video_max_frames``
    remain.
    """
    if num_frames < 1 or fps <= 0:
        raise ValueError(f"a video of {num_frames} frames at {fps} fps has no duration")
    wanted_fps = min(geometry.video_fps, fps)
    wanted_fps = min(wanted_fps, geometry.video_max_frames * fps / num_frames)
    ids_per_grid = geometry.temporal_patch_size * geometry.position_id_per_seconds / wanted_fps
    # NOTE: up, where the limit on frames binds, so that rounding never passes it.
    is_limited = wanted_fps < min(geometry.video_fps, fps)
    num_ids = math.ceil(ids_per_grid - 1e-9) if is_limited else max(1, math.floor(ids_per_grid + 0.5))
    return num_ids / geometry.position_id_per_seconds


def video_num_grids(num_frames: int, fps: float, geometry: MediaGeometry) -> int:
    """Temporal patches of a video; the encoder samples temporal_patch_size times as many frames (an even number)."""
    seconds = video_seconds_per_grid(num_frames, fps, geometry)
    limit = max(1, geometry.video_max_frames // geometry.temporal_patch_size)
    return min(limit, max(1, math.floor(num_frames / fps / seconds + 0.5)))


def video_grid(width: int, height: int, num_frames: int, fps: float, geometry: MediaGeometry) -> tuple[int, int, int]:
    """(t, h, w) in patches of a video of ``num_frames`` at ``fps``."""
    num_grids = video_num_grids(num_frames, fps, geometry)
    least, most = geometry.video_min_pixels, geometry.video_max_pixels
    if geometry.video_total_pixels is not None:
        most = max(min(most, geometry.video_total_pixels // num_grids), int(1.05 * least))
    new_height, new_width = _resize(height, width, geometry.factor, least, most)
    return num_grids, new_height // geometry.patch_size, new_width // geometry.patch_size


def grid_num_tokens(grid: tuple[int, int, int], geometry: MediaGeometry) -> int:
    """Tokens of a picture or video of ``grid`` (t, h, w) patches."""
    return math.prod(grid) // geometry.merge_size**2


def media_num_tokens(facts: MediaFacts, geometry: MediaGeometry) -> int:
    """Tokens that take the place of one media placeholder.

    Start and end markers are text, already counted in ``num_text_tokens``; only the inner pair of a sound track
    inside a video (``<|audio_start|>`` … ``<|audio_end|>``) is counted here, because the rendered text does not show
    it.
    """
    if facts.kind in ("codes", "speech"):  # in no Thinker's sequence
        return 0
    if facts.kind == "audio":
        return audio_num_tokens(audio_num_frames(facts.num_samples, facts.sample_rate_hz))
    if facts.kind == "image":
        return grid_num_tokens(image_grid(facts.width, facts.height, geometry), geometry)
    if facts.kind == "video":
        grid = video_grid(facts.width, facts.height, facts.num_frames, facts.fps, geometry)
        sound = 0
        if facts.has_audio:
            sound = 2 + audio_num_tokens(audio_num_frames(facts.num_samples, facts.sample_rate_hz))
        return grid_num_tokens(grid, geometry) + sound
    raise ValueError(f"media kind of {facts.member} is {facts.kind!r}; it must be audio, image, video, codes or speech")
