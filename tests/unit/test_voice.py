"""Pitch and likeness of voices, on tones whose pitch and timbre are known."""

from __future__ import annotations

import numpy as np
import pytest

from omni_train.evaluation.speaking import bootstrap_interval
from omni_train.evaluation.voice import likeness, median_pitch, pitch

RATE = 24_000


def voice(f0_hz: float, slope: float = 1.0, seconds: float = 0.6, noise: float = 0.005) -> np.ndarray:
    """Harmonics that fall with ``slope``: a voice without words."""
    time = np.arange(int(seconds * RATE)) / RATE
    harmonics = np.arange(1, int(5000 / f0_hz))
    wave = (np.sin(2 * np.pi * f0_hz * harmonics[:, None] * time) / harmonics[:, None] ** slope).sum(0)
    wave = wave + noise * np.random.default_rng(0).standard_normal(len(wave))
    return (0.3 * wave / np.abs(wave).max()).astype(np.float32)


@pytest.mark.parametrize("f0_hz", [85.0, 120.0, 180.0, 247.0, 310.0])
@pytest.mark.parametrize("slope", [0.5, 1.5])
def test_the_pitch_of_a_voice_is_found(f0_hz, slope):
    assert median_pitch(voice(f0_hz, slope)) == pytest.approx(f0_hz, rel=0.02)


def test_noise_and_silence_have_no_pitch():
    rng = np.random.default_rng(0)
    noise = (0.3 * rng.standard_normal(RATE)).astype(np.float32)
    assert len(pitch(noise)) < 0.1 * 96
    for wave in (np.zeros(RATE, np.float32), np.zeros(0, np.float32), np.zeros(100, np.float32)):
        assert np.isnan(median_pitch(wave))


def test_a_glide_has_the_pitch_of_its_middle():
    time = np.arange(RATE) / RATE
    f0_hz = 120 + 80 * time
    phase = 2 * np.pi * np.cumsum(f0_hz) / RATE
    wave = sum(np.sin(n * phase) / n for n in range(1, 12)).astype(np.float32)
    assert median_pitch(wave) == pytest.approx(160, rel=0.03)


def test_likeness_tells_voices_apart():
    one, again, other = voice(120, 1.0), voice(122, 1.0, seconds=0.8), voice(240, 2.0)
    assert likeness(one, one) == pytest.approx(1.0)
    assert likeness(one, again) > 0.9 > likeness(one, other)
    assert likeness(one, np.zeros(10, np.float32)) == 0.0


def test_the_interval_holds_the_mean_and_narrows_with_more_values():
    rng = np.random.default_rng(1)
    values = rng.normal(0.5, 1.0, 400)
    low, high = bootstrap_interval(values)
    assert low < values.mean() < high and high - low == pytest.approx(4 * 1.0 / 20, rel=0.15)
    few_low, few_high = bootstrap_interval(values[:40])
    assert few_high - few_low > 2 * (high - low)
    assert bootstrap_interval(np.full(10, 0.25)) == (0.25, 0.25)
