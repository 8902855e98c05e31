"""Discriminators of waves, for adversarial training: by period (Kong et al. 2020, HiFi-GAN) and on complex
spectrograms at several scales (Défossez et al. 2022, EnCodec).

Each returns its feature maps, the last of which are the scores. B clips, N samples.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PERIODS = (2, 3, 5, 7, 11)
FFT_SIZES = (2048, 1024, 512)
SLOPE = 0.1


class PeriodDiscriminator(nn.Module):
    """Looks at every ``period``-th sample together."""

    def __init__(self, period: int, channels: int) -> None:
        super().__init__()
        self.period = period
        dims = [1, channels, 2 * channels, 4 * channels, 4 * channels]
        self.convs = nn.ModuleList(
            [nn.Conv2d(a, b, (5, 1), (3, 1), padding=(2, 0)) for a, b in zip(dims, dims[1:], strict=False)]
        )
        self.out = nn.Conv2d(dims[-1], 1, (3, 1), padding=(1, 0))

    def forward(self, wave_BN: Tensor) -> list[Tensor]:
        x = F.pad(wave_BN, (0, -wave_BN.shape[-1] % self.period))
        x = x.view(len(x), 1, -1, self.period)
        return feature_maps(x, self.convs, self.out)


class SpectrumDiscriminator(nn.Module):
    """Looks at real and imaginary part of a short-time Fourier transform, hop a quarter of its size."""

    def __init__(self, fft_size: int, channels: int) -> None:
        super().__init__()
        self.fft_size = fft_size
        self.register_buffer("window", torch.hann_window(fft_size), persistent=False)
        self.convs = nn.ModuleList([nn.Conv2d(2, channels, (3, 9), padding=(1, 4))])
        for dilation in (1, 2, 4):
            conv = nn.Conv2d(channels, channels, (3, 9), (1, 2), padding=(dilation, 4), dilation=(dilation, 1))
            self.convs.append(conv)
        self.out = nn.Conv2d(channels, 1, (3, 3), padding=1)

    def forward(self, wave_BN: Tensor) -> list[Tensor]:
        spectrum = torch.stft(
            wave_BN,
            self.fft_size,
            self.fft_size // 4,
            window=self.window,
            normalized=True,
            pad_mode="constant",
            return_complex=True,
        )
        x = torch.stack([spectrum.real, spectrum.imag], dim=1).transpose(2, 3)  # [B, 2, frames, frequencies]
        return feature_maps(x, self.convs, self.out)


def feature_maps(x: Tensor, convs: nn.ModuleList, out: nn.Module) -> list[Tensor]:
    """The activations of all layers; the last are the scores."""
    maps = []
    for conv in convs:
        x = F.leaky_relu(conv(x), SLOPE)
        maps.append(x)
    return [*maps, out(x)]


class Discriminators(nn.Module):
    """All of them. Parameter names: ``discriminator.*``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.discriminator = nn.ModuleList(
            [PeriodDiscriminator(period, channels) for period in PERIODS]
            + [SpectrumDiscriminator(size, channels) for size in FFT_SIZES]
        )

    def forward(self, *waves_BN: Tensor) -> list[list[list[Tensor]]]:
        """For each of the waves the feature maps by discriminator."""
        return [[discriminator(wave) for discriminator in self.discriminator] for wave in waves_BN]


def judge(engine: Any, wave_BN: Tensor, target_BN: Tensor) -> dict[str, list[list[Tensor]]]:
    """Feature maps of "real" and "fake" waves, whose gradient reaches the discriminators alone, and of the "generated"
    ones, whose gradient reaches the generator alone. ``engine`` holds Discriminators as its ``module``."""
    real, fake = engine(target_BN, wave_BN.detach())
    fixed = {name: parameter.detach() for name, parameter in engine.module.named_parameters()}
    (generated,) = torch.func.functional_call(engine.module, fixed, (wave_BN,))
    return {"real": real, "fake": fake, "generated": generated}
