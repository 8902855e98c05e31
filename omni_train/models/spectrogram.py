"""Differentiable spectrograms of 24 kHz speech, for the codec's analysis and for its losses.

Shapes: B clips, N samples, F frames, M mel bands. A clip followed by zeros has the frames that it has alone.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from transformers.audio_utils import mel_filter_bank

from omni_train.data.media_tokens import CODEC_SAMPLE_RATE_HZ

FLOOR = 1e-5
"""Least magnitude before a logarithm."""


@lru_cache(maxsize=32)
def mel_filters(fft_size: int, num_mels: int, device: torch.device) -> Tensor:
    """Slaney mel filters up to 12 kHz, float32 [M, fft_size // 2 + 1]."""
    filters = mel_filter_bank(
        num_frequency_bins=1 + fft_size // 2,
        num_mel_filters=num_mels,
        min_frequency=0.0,
        max_frequency=CODEC_SAMPLE_RATE_HZ / 2,
        sampling_rate=CODEC_SAMPLE_RATE_HZ,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(filters).float().T.contiguous().to(device)


def magnitudes(wave_BN: Tensor, fft_size: int, hop: int) -> Tensor:
    """|STFT|, Hann window, [B, fft_size // 2 + 1, N // hop]: frame f is centred on sample f × hop, zeros outside."""
    window = torch.hann_window(fft_size, device=wave_BN.device, dtype=wave_BN.dtype)
    spectrum = torch.stft(wave_BN, fft_size, hop, window=window, pad_mode="constant", return_complex=True)
    spectrum = spectrum[..., : wave_BN.shape[-1] // hop]
    return (spectrum.real.square() + spectrum.imag.square() + 1e-12).sqrt()


def log_mel(wave_BN: Tensor, fft_size: int, hop: int, num_mels: int) -> Tensor:
    """Natural log of the mel magnitudes, [B, M, N // hop], at least log(1e-5)."""
    mel = mel_filters(fft_size, num_mels, wave_BN.device).to(wave_BN.dtype) @ magnitudes(wave_BN, fft_size, hop)
    return mel.clamp(min=FLOOR).log()
