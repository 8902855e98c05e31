"""Videos: one concept that moves, grows, shrinks or turns for a second and a half, as MP4 bytes, with a voice or not;
and films of several such scenes.

Every random choice comes from the video's own seed, as for pictures; the voice is a clip of ``voices``.
"""

from __future__ import annotations

import io
import random
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from PIL import Image

from data.tiny.pictures import SIZE_PX, placed
from data.tiny.voices import SAMPLE_RATE_HZ, Clip, wave_of

FPS = 6
NUM_FRAMES = 9
AUDIO_BITS = 48_000

STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MOTIONS = (*STEPS, "grows", "shrinks", "turns")


@dataclass(frozen=True, slots=True)
class Video:
    """``concept`` in one of MOTIONS; ``clip`` is what a voice says meanwhile (None: the file has no sound)."""

    concept: str
    motion: str
    seed: int
    clip: Clip | None = None


@dataclass(frozen=True, slots=True)
class Film:
    """Silent videos one after the other."""

    scenes: tuple[Video, ...]


def render_video(video: Video | Film) -> tuple[bytes, float]:
    """MP4 bytes (64×64, 6 frames a second, 1.5 s a scene) and the seconds of its sound, which may be longer."""
    scenes = video.scenes if isinstance(video, Film) else (video,)
    frames = [np.asarray(frame) for scene in scenes for frame in _frames(scene)]
    clip = scenes[0].clip
    wave = wave_of(clip) if clip else np.zeros(0, np.float32)
    file, to_yuv = io.BytesIO(), av.video.reformatter.VideoReformatter()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=FPS)
        stream.width = stream.height = SIZE_PX
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1  # threads for frames this small cost more than they save
        stream.codec_context.qmin = stream.codec_context.qmax = 2
        sound = container.add_stream("aac", rate=SAMPLE_RATE_HZ, layout="mono") if wave.size else None
        if sound is not None:
            sound.bit_rate = AUDIO_BITS
        for number, frame in enumerate(frames):
            picture = to_yuv.reformat(av.VideoFrame.from_ndarray(frame, "rgb24"), format="yuv420p", threads=1)
            picture.pts, picture.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
        if sound is not None:
            samples = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
            samples.sample_rate, samples.pts = SAMPLE_RATE_HZ, 0
            container.mux(sound.encode(samples))
            container.mux(sound.encode(None))
    return file.getvalue(), wave.size / SAMPLE_RATE_HZ


def _frames(video: Video) -> list[Image.Image]:
    """The pictures of a video. Place, size and angle at the start do not hang on the motion: a frame tells nothing."""
    rng = random.Random(f"video/{video.seed}")
    colour = tuple(rng.randint(200, 255) for _ in range(3))  # light, so that the sign of a change tells its edge
    side_px = SIZE_PX * rng.uniform(0.4, 0.55)
    x, y = (SIZE_PX * rng.uniform(0.38, 0.62) for _ in range(2))
    degrees, way = rng.uniform(-20, 20), rng.choice((-1, 1))
    span_px, growth = rng.uniform(27, 35), rng.uniform(1.9, 2.5)
    still = placed(video.concept, side_px, degrees)
    largest = placed(video.concept, side_px * growth, degrees) if video.motion == "grows" else still
    frames = []
    for number in range(NUM_FRAMES):
        share = number / (NUM_FRAMES - 1)
        image, dx, dy = still, *STEPS.get(video.motion, (0, 0))
        if video.motion == "turns":
            image = placed(video.concept, side_px, degrees + way * 150 * share)
        elif video.motion not in STEPS:
            factor = growth ** (share if video.motion == "grows" else -share)
            size = [max(1, round(length * factor)) for length in still.size]
            image = largest.resize(size, Image.Resampling.LANCZOS)
        left, top = x + dx * share * span_px - image.width / 2, y + dy * share * span_px - image.height / 2
        canvas = Image.new("RGB", (SIZE_PX, SIZE_PX), colour)
        canvas.paste(image, (round(left), round(top)), image)
        frames.append(canvas)
    return frames
