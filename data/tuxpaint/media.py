"""Media of the samples: a stamp's picture over white, a person's recording, several recordings in a row.

Every random choice comes from the picture's own seed. Drawings (SVG) need the optional package resvg_py.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
from PIL import Image

SAMPLE_RATE_HZ = 16_000
SIZE_PX, MASTER_PX = 64, 96
PEAK = 0.7
SILENT_PEAK = 0.02
MIN_SEC = 0.15
PAUSE_SEC = 0.35
HAS_SVG = importlib.util.find_spec("resvg_py") is not None


@dataclass(frozen=True, slots=True)
class Picture:
    """A stamp's picture. Without ``seed`` it stands in the middle as large as fits; with one it is moved and scaled."""

    path: Path
    seed: str = ""


@dataclass(frozen=True, slots=True)
class Recordings:
    """One recording, or several of one speaker with pauses between, played ``speed`` times as fast (pitch too)."""

    paths: tuple[Path, ...]
    speed: float = 1.0


def make_media(spec: Picture | Recordings) -> tuple[bytes, float]:
    """Encoded bytes and seconds (0 for pictures)."""
    return (render_picture(spec), 0.0) if isinstance(spec, Picture) else encode_recordings(spec)


def is_readable(picture: Path) -> bool:
    """Whether this installation can draw it."""
    return picture.suffix == ".png" or HAS_SVG


@functools.cache
def master(path: Path) -> Image.Image:
    """A stamp cut to its ink, RGBA, its longest side at most MASTER_PX."""
    if path.suffix == ".svg":
        import resvg_py

        # NOTE: without a resolution resvg refuses drawings whose size is given in points.
        image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_path=str(path), dpi=96.0))))
    else:
        image = Image.open(path)
    image = image.convert("RGBA")
    ink = image.crop(image.getchannel("A").getbbox() or (0, 0, *image.size))
    ink.thumbnail((MASTER_PX, MASTER_PX), Image.Resampling.LANCZOS)
    return ink


def render_picture(picture: Picture) -> bytes:
    """PNG bytes, 64×64 RGB, the stamp over white; a seed scales it to 70–100 % and moves it within the frame."""
    rng = random.Random(picture.seed)
    ink = master(picture.path)
    share = rng.uniform(0.7, 1.0) if picture.seed else 1.0
    factor = SIZE_PX * share / max(ink.size)
    width, height = (max(1, round(side * factor)) for side in ink.size)
    spare = SIZE_PX - width, SIZE_PX - height
    corner = tuple(rng.randint(0, side) if picture.seed else side // 2 for side in spare)
    ink = ink.resize((width, height), Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (SIZE_PX, SIZE_PX), "white")
    canvas.paste(ink, corner, ink)
    file = io.BytesIO()
    canvas.save(file, "PNG", compress_level=6)
    return file.getvalue()


def wave_of(path: Path, speed: float = 1.0) -> np.ndarray:
    """float32 [samples] at 16 kHz, one channel, peak 1, cut to what is louder than 2 % of the peak but for 40 ms.

    Empty where the file holds silence alone.
    """
    wave, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
    wave = wave.mean(axis=1)
    peak = np.abs(wave).max(initial=0.0)
    if peak < SILENT_PEAK:
        return wave[:0]
    loud = np.flatnonzero(np.abs(wave) > 0.02 * peak)
    margin = rate_hz // 25
    wave = soxr.resample(wave[max(0, loud[0] - margin) : loud[-1] + margin], rate_hz * speed, SAMPLE_RATE_HZ)
    return wave / np.abs(wave).max(initial=1e-6)


def seconds_of(path: Path) -> float:
    """Seconds of a recording without the silence around it; 0 for silence alone."""
    return wave_of(path).size / SAMPLE_RATE_HZ


def encode_recordings(recordings: Recordings) -> tuple[bytes, float]:
    """FLAC bytes, 16 kHz, one channel, 16 bit; and seconds."""
    pause = np.zeros(int(PAUSE_SEC * SAMPLE_RATE_HZ), np.float32)
    waves = [wave_of(path, recordings.speed) for path in recordings.paths]
    wave = PEAK * np.concatenate([piece for wave in waves for piece in (wave, pause)][:-1])
    file = io.BytesIO()
    soundfile.write(file, wave, SAMPLE_RATE_HZ, format="FLAC", subtype="PCM_16")
    return file.getvalue(), wave.size / SAMPLE_RATE_HZ
