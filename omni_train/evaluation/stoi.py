"""Short-time objective intelligibility (Taal et al. 2011, IEEE TASLP 19:7): how well a wave keeps the envelopes of a
clean one, about 0 … 1. Settings and details are those of the authors' reference code."""

from __future__ import annotations

import numpy as np
import soxr

RATE_HZ, FRAME, FFT_SIZE = 10_000, 256, 512
NUM_BANDS, LOWEST_HZ, SEGMENT_FRAMES = 15, 150.0, 30
RANGE_DB, CLIP_DB = 40.0, 15.0
TINY = np.finfo(np.float64).eps


def stoi(clean: np.ndarray, other: np.ndarray, sample_rate_hz: int) -> float:
    """STOI of ``other`` against ``clean``, waves [n] of equal length. Raises ValueError for under 0.4 s of speech."""
    if len(clean) != len(other):
        raise ValueError(f"waves of {len(clean):,} and {len(other):,} samples cannot be compared; align them first")
    clean, other = (soxr.resample(x.astype(np.float64), sample_rate_hz, RATE_HZ) for x in (clean, other))
    clean, other = without_silence(clean, other)
    bands = third_octave_bands()
    envelopes = [np.sqrt(bands @ np.abs(spectrum(x)) ** 2) for x in (clean, other)]
    num_segments = envelopes[0].shape[1] - SEGMENT_FRAMES + 1
    if num_segments < 1:
        raise ValueError("STOI needs at least 0.4 s of speech")
    x, y = (np.stack([e[:, m : m + SEGMENT_FRAMES] for m in range(num_segments)]) for e in envelopes)
    y = y * norm(x) / (norm(y) + TINY)
    y = np.minimum(y, x * (1 + 10 ** (CLIP_DB / 20)))
    x, y = (s - s.mean(-1, keepdims=True) for s in (x, y))
    x, y = (s / (norm(s) + TINY) for s in (x, y))
    return float((x * y).sum() / (num_segments * NUM_BANDS))


def norm(x: np.ndarray) -> np.ndarray:
    return np.linalg.norm(x, axis=-1, keepdims=True)


def frames_of(x: np.ndarray) -> np.ndarray:
    """Windowed frames [F, 256] at half overlap."""
    window = np.hanning(FRAME + 2)[1:-1]
    return np.stack([window * x[i : i + FRAME] for i in range(0, len(x) - FRAME, FRAME // 2)])


def without_silence(clean: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both waves without the frames in which ``clean`` is more than 40 dB under its loudest frame.

    Raises ValueError where nothing is left to frame.
    """
    if len(clean) <= FRAME:
        raise ValueError("STOI needs at least 0.4 s of speech")
    pieces = [frames_of(clean), frames_of(other)]
    energy_db = 20 * np.log10(np.linalg.norm(pieces[0], axis=1) + TINY)
    is_loud = energy_db > energy_db.max() - RANGE_DB
    joined = []
    for frames in (piece[is_loud] for piece in pieces):
        wave = np.zeros((len(frames) - 1) * FRAME // 2 + FRAME)
        for number, frame in enumerate(frames):
            wave[number * FRAME // 2 :][:FRAME] += frame
        joined.append(wave)
    return joined[0], joined[1]


def spectrum(x: np.ndarray) -> np.ndarray:
    """[257, F]."""
    return np.fft.rfft(frames_of(x), FFT_SIZE).T


def third_octave_bands() -> np.ndarray:
    """Which of the 257 frequencies belong to each of the 15 bands, 0 or 1."""
    frequencies = np.linspace(0, RATE_HZ, FFT_SIZE + 1)[: FFT_SIZE // 2 + 1]
    bands = np.zeros((NUM_BANDS, len(frequencies)))
    for number in range(NUM_BANDS):
        edges = LOWEST_HZ * 2.0 ** ((2 * number + np.array([-1, 1])) / 6)
        low, high = (int(np.argmin((frequencies - edge) ** 2)) for edge in edges)
        bands[number, low:high] = 1
    return bands
