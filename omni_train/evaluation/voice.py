"""Whose voice a wave is in: its pitch, and its likeness to another wave of the same text.

Shapes: N samples at 24 kHz, F frames of 40 ms at hops of 10 ms.
"""

from __future__ import annotations

import numpy as np
import torch

from omni_train.data.media_tokens import CODEC_SAMPLE_RATE_HZ
from omni_train.models.codec import codec_mel

WINDOW, HOP = CODEC_SAMPLE_RATE_HZ * 40 // 1000, CODEC_SAMPLE_RATE_HZ // 100
LOWEST_HZ, HIGHEST_HZ = 60.0, 420.0
HEARD_BELOW_HZ = 900.0
OCTAVE_COST = 0.02
MIN_PERIODICITY = 0.5
"""Of a voiced frame: its normalised autocorrelation at the period."""


def pitch(wave_N: np.ndarray) -> np.ndarray:
    """F0 in Hz of the voiced frames: the highest peak of the normalised autocorrelation, less a cost for each octave
    down (Boersma 1993). Empty for silence."""
    if len(wave_N) < WINDOW:
        return np.empty(0)
    frames = np.lib.stride_tricks.sliding_window_view(wave_N.astype(np.float64), WINDOW)[::HOP]
    frames = frames - frames.mean(1, keepdims=True)
    power = (frames**2).mean(1)
    frames = frames[power > 0.02 * max(power.max(), 1e-9)]
    spectrum = np.fft.rfft(frames, 2 * WINDOW)
    spectrum[:, int(HEARD_BELOW_HZ / CODEC_SAMPLE_RATE_HZ * 2 * WINDOW) :] = 0  # formants and noise
    correlation = np.fft.irfft(np.abs(spectrum) ** 2)[:, :WINDOW]
    overlap = 1 - np.arange(WINDOW) / WINDOW
    correlation = correlation / np.maximum(correlation[:, :1], 1e-12) / np.maximum(overlap, 0.1)
    first, last = int(CODEC_SAMPLE_RATE_HZ / HIGHEST_HZ), int(CODEC_SAMPLE_RATE_HZ / LOWEST_HZ)
    searched = correlation[:, first:last]
    chosen = (searched - OCTAVE_COST * np.log2(np.arange(first, last) / first)).argmax(1)
    is_voiced = searched[np.arange(len(searched)), chosen] > MIN_PERIODICITY
    return CODEC_SAMPLE_RATE_HZ / (first + chosen[is_voiced])


def median_pitch(wave_N: np.ndarray) -> float:
    """Median F0 in Hz; NaN without a voiced frame."""
    found = pitch(wave_N)
    return float(np.median(found)) if len(found) else float("nan")


def likeness(wave_N: np.ndarray, other_N: np.ndarray) -> float:
    """Cosine between mean log-mel spectra of the louder half of frames, their common mean level taken out; −1 … 1.

    A cheap speaker similarity: it tells voices that say the same text apart. 0 for a wave shorter than a frame.
    """
    if min(len(wave_N), len(other_N)) < WINDOW:
        return 0.0
    one, two = (_timbre(wave) for wave in (wave_N, other_N))
    return float(one @ two / max(float(np.linalg.norm(one) * np.linalg.norm(two)), 1e-9))


def _timbre(wave_N: np.ndarray) -> np.ndarray:
    padded = np.pad(wave_N, (0, -len(wave_N) % (8 * HOP))).astype(np.float32)
    mel = codec_mel(torch.from_numpy(padded)[None])[0].numpy()
    level = mel.mean(0)
    spectrum = mel[:, level >= np.median(level)].mean(1)
    return spectrum - spectrum.mean()
