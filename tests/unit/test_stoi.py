"""STOI against figures of the authors' method in an independent implementation (pystoi 0.4.1, run once)."""

from __future__ import annotations

import numpy as np
import pytest

from omni_train.evaluation.stoi import RATE_HZ, stoi

REFERENCE = 0.197085202693782


def speechlike(seconds: float = 1.0) -> np.ndarray:
    """A tone that rises and comes and goes three times a second, over a little noise."""
    time = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
    wave = np.sin(2 * np.pi * 300 * time * (1 + time)) * np.sin(2 * np.pi * 3 * time) ** 2
    return wave + 0.01 * np.random.default_rng(0).standard_normal(len(time))


def test_it_equals_the_reference_implementation():
    clean = speechlike()
    noisy = clean + 0.3 * np.random.default_rng(1).standard_normal(len(clean))
    assert stoi(clean, noisy, RATE_HZ) == pytest.approx(REFERENCE, abs=1e-6)


def test_a_wave_is_wholly_intelligible_beside_itself_at_any_loudness():
    assert stoi(speechlike(), 0.1 * speechlike(), RATE_HZ) == pytest.approx(1.0, abs=1e-6)


def test_more_noise_is_less_intelligible():
    clean, noise = speechlike(), np.random.default_rng(1).standard_normal(RATE_HZ)
    figures = [stoi(clean, clean + level * noise, RATE_HZ) for level in (0.03, 0.1, 0.3, 1.0)]
    assert figures == sorted(figures, reverse=True)


def test_too_short_or_misaligned_waves_are_refused():
    with pytest.raises(ValueError, match=r"0\.4 s of speech"):
        stoi(speechlike(0.3), speechlike(0.3), RATE_HZ)
    with pytest.raises(ValueError, match="align them first"):
        stoi(speechlike(), speechlike()[:-1], RATE_HZ)
