"""Spectrograms of 24 kHz speech against transformers' own analysis and against sums by hand."""

from __future__ import annotations

import numpy as np
import torch
from transformers.audio_utils import mel_filter_bank, spectrogram

from omni_train.models.spectrogram import FLOOR, log_mel, magnitudes

FFT, HOP, MELS = 512, 128, 40


def wave(num_samples: int = 4096) -> torch.Tensor:
    return torch.randn(2, num_samples, generator=torch.Generator().manual_seed(0))


def test_log_mel_is_that_of_transformers():
    filters = mel_filter_bank(257, MELS, 0.0, 12_000.0, 24_000, norm="slaney", mel_scale="slaney")
    expected = np.stack(
        [
            spectrogram(
                row.numpy().astype(np.float64),
                np.hanning(FFT + 1)[:-1],
                FFT,
                HOP,
                power=1.0,
                center=True,
                pad_mode="constant",
                mel_filters=filters,
                mel_floor=FLOOR,
                log_mel="log",
            )[:, :-1]
            for row in wave()
        ]
    )
    found = log_mel(wave(), FFT, HOP, MELS)
    assert found.shape == (2, MELS, 4096 // HOP)
    assert np.abs(found.numpy() - expected).max() < 1e-3


def test_a_frame_is_the_fourier_sum_of_its_windowed_samples():
    samples = wave()[0].double()
    frame, bin_ = 5, 17
    window = 0.5 - 0.5 * torch.cos(2 * np.pi * torch.arange(FFT, dtype=torch.float64) / FFT)
    part = samples[frame * HOP - FFT // 2 : frame * HOP + FFT // 2] * window
    angle = -2 * np.pi * bin_ * torch.arange(FFT, dtype=torch.float64) / FFT
    expected = torch.hypot((part * angle.cos()).sum(), (part * angle.sin()).sum())
    assert torch.allclose(magnitudes(wave().double(), FFT, HOP)[0, bin_, frame], expected, rtol=1e-6)


def test_zeros_behind_a_clip_change_none_of_its_frames():
    clip = wave(1024)
    longer = torch.nn.functional.pad(clip, (0, 3000))
    assert torch.allclose(log_mel(longer, FFT, HOP, MELS)[..., :8], log_mel(clip, FFT, HOP, MELS), atol=1e-5)


def test_silence_has_a_gradient():
    silence = torch.zeros(1, 1024, requires_grad=True)
    log_mel(silence, FFT, HOP, MELS).sum().backward()
    assert silence.grad.isfinite().all()
