"""Code2Wav's objective: waves from codes, judged by spectrograms at several scales and, where wanted, by adversaries.

Means over the real part of a clip for spectrograms, over a pack for adversaries, times the number of codec frames.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from omni_train.config import ReconstructionConfig
from omni_train.models.codec import frame_mask
from omni_train.models.spectrogram import FLOOR, log_mel, magnitudes
from omni_train.objectives.codec import clip_means
from omni_train.objectives.terms import Losses, LossTerm

SCALES = ((2048, 80), (1024, 80), (512, 40), (256, 20))
"""FFT size (hop a quarter of it) and mel bands."""
STFT_SIZES = (2048, 1024, 512)


def multi_scale_mel_loss(wave_BN: Tensor, target_BN: Tensor, lengths_B: Tensor) -> Tensor:
    """Mean over scales of |difference| of natural-log mel magnitudes (Défossez et al. 2022, eq. 2, first norm), [B]."""
    losses = []
    for fft_size, num_mels in SCALES:
        hop = fft_size // 4
        predicted, wanted = (log_mel(x, fft_size, hop, num_mels) for x in (wave_BN, target_BN))
        mask = frame_mask(lengths_B, predicted.shape[-1], hop)
        losses.append(clip_means((predicted - wanted).abs(), mask))
    return torch.stack(losses).mean(0)


def multi_scale_stft_loss(wave_BN: Tensor, target_BN: Tensor, lengths_B: Tensor) -> Tensor:
    """Mean over scales of |difference| of natural-log magnitudes (Yamamoto et al. 2020, eq. 6), [B]."""
    losses = []
    for fft_size in STFT_SIZES:
        hop = fft_size // 4
        predicted, wanted = (magnitudes(x, fft_size, hop).clamp(min=FLOOR).log() for x in (wave_BN, target_BN))
        mask = frame_mask(lengths_B, predicted.shape[-1], hop)
        losses.append(clip_means((predicted - wanted).abs(), mask))
    return torch.stack(losses).mean(0)


def discriminator_loss(real: list[list[Tensor]], fake: list[list[Tensor]]) -> Tensor:
    """Hinge loss (Lim & Ye 2017): mean over discriminators of E max(0, 1 − D(real)) + E max(0, 1 + D(fake))."""
    losses = [F.relu(1 - r[-1]).mean() + F.relu(1 + f[-1]).mean() for r, f in zip(real, fake, strict=True)]
    return torch.stack(losses).mean()


def adversarial_loss(fake: list[list[Tensor]]) -> Tensor:
    """What the generator minimises: mean over discriminators of E max(0, 1 − D(fake)) (EnCodec, eq. 3)."""
    return torch.stack([F.relu(1 - maps[-1]).mean() for maps in fake]).mean()


def feature_matching_loss(real: list[list[Tensor]], fake: list[list[Tensor]]) -> Tensor:
    """Mean over layers of all discriminators of |real − fake| relative to the mean |real| (EnCodec, eq. 4)."""
    ratios = [
        (r.detach() - f).abs().mean() / r.detach().abs().mean().clamp(min=FLOOR)
        for real_maps, fake_maps in zip(real, fake, strict=True)
        for r, f in zip(real_maps[:-1], fake_maps[:-1], strict=True)
    ]
    return torch.stack(ratios).mean()


def code2wav_losses(
    output: dict[str, Tensor],
    weights: ReconstructionConfig,
    judged: dict[str, list[list[Tensor]]] | None,
) -> Losses:
    """Loss terms of the vocoder's output. ``judged``: the discriminators' feature maps, "real", "fake" for
    their own loss, and "generated": of the waves with their gradient, through discriminators that get none."""
    mel = multi_scale_mel_loss(output["wave"], output["target"], output["lengths"])
    frames = output["frames"].to(mel.dtype)
    terms = [LossTerm("code2wav", "mel", (mel * frames).sum(), "tokens")]
    if weights.stft > 0:
        stft = multi_scale_stft_loss(output["wave"], output["target"], output["lengths"])
        terms.append(LossTerm("code2wav", "stft", (stft * frames).sum(), "tokens", weights.stft))
    if judged is not None:
        num = frames.sum()
        adversarial = adversarial_loss(judged["generated"]) * num
        matching = feature_matching_loss(judged["real"], judged["generated"]) * num
        theirs = discriminator_loss(judged["real"], judged["fake"]) * num
        terms += [
            LossTerm("code2wav", "adversarial", adversarial, "tokens", weights.adversarial),
            LossTerm("code2wav", "features", matching, "tokens", weights.adversarial * weights.feature_matching),
            LossTerm("discriminators", "discriminator", theirs, "tokens"),
        ]
    return Losses(terms)
