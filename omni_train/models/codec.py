"""The speech codec: 24 kHz waves → 12.5 Hz latents → G codes a frame; a mel decoder that only its training needs.

    wave ──log-mel, causal convolutions──▶ latents ──residual vector quantiser──▶ codes [B, G, T]
                                                     └─ sum of codewords ──mel decoder──▶ log-mel (loss only)

The first codebook can be made semantic: its codeword is drawn to features of a speech encoder. Shapes: B clips, T
frames of 80 ms, D latent channels, G codebooks of K codewords, M mel bands, N samples (T × 1920).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MimiModel

from omni_train.config import CodecModelConfig, ConfigError
from omni_train.data.contracts import Pack
from omni_train.data.media_tokens import SAMPLES_PER_CODEC_FRAME, audio_num_tokens
from omni_train.data.speech import MELS_PER_CODEC_FRAME
from omni_train.models.spectrogram import log_mel
from omni_train.models.towers import encode_audio
from omni_train.models.weights import load_components

FFT_SIZE, HOP, NUM_MELS = 1024, 240, 80
MEL_MEAN, MEL_STD = -5.0, 3.0
"""About those of log-mel speech at full scale."""
CANDIDATES_PER_PACK = 64
"""Latents that a pack offers in place of codewords that nothing uses."""


class CausalConv(nn.Module):
    """Conv1d that sees the present and the past: zeros before the start, ``stride`` times fewer frames."""

    def __init__(self, in_dim: int, out_dim: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_dim, out_dim, kernel, stride, groups=groups)
        self.left = kernel - stride

    def forward(self, x_BDT: Tensor) -> Tensor:
        return self.conv(F.pad(x_BDT, (self.left, 0)))


class ConvBlock(nn.Module):
    """Causal ConvNeXt block (Liu et al. 2022): depthwise convolution, norm over channels, two layers; residual."""

    def __init__(self, dim: int, kernel: int = 7) -> None:
        super().__init__()
        self.depthwise = CausalConv(dim, dim, kernel, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 3 * dim)
        self.down = nn.Linear(3 * dim, dim)

    def forward(self, x_BDT: Tensor) -> Tensor:
        hidden = self.norm(self.depthwise(x_BDT).transpose(1, 2))
        return x_BDT + self.down(F.gelu(self.up(hidden))).transpose(1, 2)


def codec_mel(wave_BN: Tensor) -> Tensor:
    """Log-mel at 100 Hz, about 0 ± 1: [B, 80, 8 T]. What the codec hears, and what its mel decoder is to give back."""
    return (log_mel(wave_BN, FFT_SIZE, HOP, NUM_MELS) - MEL_MEAN) / MEL_STD


class CodecEncoder(nn.Module):
    """Waves → latents → codes. Parameter names ``conv_in, stages, conv_out``; the quantiser holds buffers only."""

    def __init__(self, config: CodecModelConfig) -> None:
        super().__init__()
        dim = config.encoder_dim
        self.num_codebooks = config.num_codebooks
        self.conv_in = CausalConv(NUM_MELS, dim, 5)
        self.stages = nn.Sequential()
        for stride in config.strides:
            self.stages.extend([ConvBlock(dim) for _ in range(config.blocks_per_stage)])
            self.stages.append(CausalConv(dim, dim, 2 * stride, stride))
        self.stages.extend([ConvBlock(dim) for _ in range(config.blocks_per_stage)])
        self.conv_out = CausalConv(dim, config.latent_dim, 1)
        self.quantizer = ResidualQuantizer(config)

    def latents(self, mel_BMF: Tensor) -> Tensor:
        """[B, T, D]."""
        return self.conv_out(self.stages(self.conv_in(mel_BMF))).transpose(1, 2)

    @torch.no_grad()
    def encode(self, wave_BN: Tensor) -> Tensor:
        """Codes int64 [B, G, T] of waves whose length is a multiple of 1920."""
        return self.quantizer.encode(self.latents(codec_mel(wave_BN))).transpose(1, 2)


@dataclass(slots=True)
class Quantized:
    """``vectors`` [B, T, D]: sum of the codewords, with the gradient of the latents; ``semantic`` the first alone.

    ``codes`` [B, T, G]; ``commitment`` [B, T]: mean over codebooks of the squared distance of residual to codeword,
    mean over D, gradient to the latents only.
    """

    vectors: Tensor
    semantic: Tensor
    codes: Tensor
    commitment: Tensor


@dataclass(slots=True)
class CodeStatistics:
    """What the packs of a step assigned to each codeword: ``counts`` [G, K], ``sums`` [G, K, D] of residuals, and some
    of them, ``candidates`` [packs × 64, G, D], NaN where a pack had none."""

    counts: Tensor
    sums: Tensor
    candidates: Tensor


class ResidualQuantizer(nn.Module):
    """G codebooks, each for what the ones before left over, moved by exponential averages (van den Oord et al. 2017).

    A forward in training notes statistics; ``take_statistics`` hands them over for a reduction over ranks, ``update``
    moves the codebooks. So a step is the same for every split of its packs into ranks and micro-batches.
    """

    def __init__(self, config: CodecModelConfig) -> None:
        super().__init__()
        shape = (config.num_codebooks, config.codebook_size)
        self.decay, self.revive_below = config.ema_decay, config.revive_below
        self.register_buffer("codebooks", torch.zeros(*shape, config.latent_dim))
        self.register_buffer("sizes", torch.zeros(shape))
        self.register_buffer("sums", torch.zeros(*shape, config.latent_dim))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self.noted: list[CodeStatistics] = []

    def encode(self, latents_BTD: Tensor) -> Tensor:
        """Codes [B, T, G]."""
        residual, codes = latents_BTD.float(), []
        for codebook in self.codebooks:
            codes.append(nearest_codeword(residual, codebook))
            residual = residual - codebook[codes[-1]]
        return torch.stack(codes, dim=-1)

    def decode(self, codes_BTG: Tensor) -> Tensor:
        """Sum of the codewords, [B, T, D]."""
        return sum(codebook[codes_BTG[..., g]] for g, codebook in enumerate(self.codebooks))  # type: ignore[return-value]

    def forward(self, latents_BTD: Tensor, is_real_BT: Tensor) -> Quantized:
        """Quantise; in training note the statistics of the frames that are no padding."""
        residual = latents_BTD.float()
        codes, residuals, commitment, words = [], [], torch.zeros_like(residual[..., 0]), []
        for codebook in self.codebooks:
            code = nearest_codeword(residual.detach(), codebook)
            word = codebook[code]
            commitment = commitment + (residual - word).square().mean(-1)
            residuals.append(residual.detach())
            codes.append(code)
            words.append(word)
            residual = residual - word
        codes_BTG = torch.stack(codes, dim=-1)
        if self.training:
            self._note(codes_BTG[is_real_BT], torch.stack(residuals, dim=-2)[is_real_BT])
        return Quantized(
            vectors=straight_through(latents_BTD, sum(words)),  # type: ignore[arg-type]
            semantic=straight_through(latents_BTD, words[0]),
            codes=codes_BTG,
            commitment=commitment / len(codes),
        )

    def _note(self, codes_FG: Tensor, residuals_FGD: Tensor) -> None:
        counts, sums = torch.zeros_like(self.sizes), torch.zeros_like(self.sums)
        for g in range(len(counts)):
            counts[g].index_add_(0, codes_FG[:, g], torch.ones_like(codes_FG[:, g], dtype=counts.dtype))
            sums[g].index_add_(0, codes_FG[:, g], residuals_FGD[:, g])
        candidates = residuals_FGD.new_full((CANDIDATES_PER_PACK, *residuals_FGD.shape[1:]), math.nan)
        chosen = residuals_FGD[:: max(1, math.ceil(len(residuals_FGD) / CANDIDATES_PER_PACK))]
        candidates[: len(chosen)] = chosen
        self.noted.append(CodeStatistics(counts, sums, candidates))

    def take_statistics(self) -> CodeStatistics:
        """Of all packs since the last call, on this rank."""
        noted, self.noted = self.noted, []
        return CodeStatistics(
            torch.stack([n.counts for n in noted]).sum(0),
            torch.stack([n.sums for n in noted]).sum(0),
            torch.cat([n.candidates for n in noted]),
        )

    @torch.no_grad()
    def update(self, statistics: CodeStatistics, seed: int) -> None:
        """Move the codebooks by the statistics of all ranks; revive dead codewords, deterministic from ``seed``."""
        self.num_updates += 1
        self.sizes.copy_(ema(self.sizes, statistics.counts, self.decay))
        self.sums.copy_(ema(self.sums, statistics.sums, self.decay))
        candidates = statistics.candidates[~statistics.candidates[:, 0, 0].isnan()]
        for g in range(len(self.codebooks)):
            dead = self.sizes[g] < self.revive_below
            generator = torch.Generator().manual_seed(hash_of(seed, int(self.num_updates), g))
            if dead.any() and len(candidates):
                words = draw_in_canonical_order(candidates[:, g], int(dead.sum()), generator)
                self.sums[g, dead], self.sizes[g, dead] = words, 1.0
            self.codebooks[g] = self.sums[g] / self.sizes[g].clamp(min=1e-6)[:, None]

    def usage(self) -> Tensor:
        """(codewords in use, all codewords), float64 [2]."""
        in_use = (self.sizes >= self.revive_below).sum()
        return torch.tensor([float(in_use), float(self.sizes.numel())], dtype=torch.float64, device=self.sizes.device)


def nearest_codeword(vectors: Tensor, codebook_KD: Tensor) -> Tensor:
    """Index of the codeword at the least Euclidean distance, [...] of vectors [..., D]."""
    return (codebook_KD.square().sum(-1) - 2 * vectors @ codebook_KD.T).argmin(-1)


def straight_through(latents: Tensor, words: Tensor) -> Tensor:
    """The value of ``words`` with the gradient of ``latents`` (Bengio et al. 2013)."""
    return latents + (words - latents).detach()


def ema(average: Tensor, new: Tensor, decay: float) -> Tensor:
    """decay × average + (1 − decay) × new."""
    return decay * average + (1 - decay) * new


def hash_of(*numbers: int) -> int:
    """A 62-bit seed of whole numbers, other than Python's ``hash`` the same on every machine."""
    value = 0
    for number in numbers:
        value = (value * 0x9E3779B97F4A7C15 + number + 0x7F4A7C15) % 2**62
    return value


def draw_in_canonical_order(vectors_CD: Tensor, num: int, generator: torch.Generator) -> Tensor:
    """``num`` of the vectors, drawn with replacement; the same whatever their order (that of the ranks) is."""
    direction = torch.randn(vectors_CD.shape[-1], generator=generator).to(vectors_CD)
    chosen = torch.randint(len(vectors_CD), (num,), generator=generator)
    return vectors_CD[(vectors_CD @ direction).argsort()][chosen.to(vectors_CD.device)]


class MelDecoder(nn.Module):
    """Latents → log-mel: what the codec trains against, thrown away after it; a head for semantic features too."""

    def __init__(self, config: CodecModelConfig, semantic_dim: int) -> None:
        super().__init__()
        dim = config.encoder_dim
        self.conv_in = CausalConv(config.latent_dim, dim, 3)
        self.stages = nn.Sequential()
        for stride in reversed(config.strides):
            self.stages.extend([ConvBlock(dim) for _ in range(config.blocks_per_stage)])
            self.stages.append(nn.ConvTranspose1d(dim, dim, stride, stride))
        self.stages.extend([ConvBlock(dim) for _ in range(config.blocks_per_stage)])
        self.conv_out = CausalConv(dim, NUM_MELS, 1)
        self.semantic = nn.Linear(config.latent_dim, semantic_dim) if semantic_dim else None

    def forward(self, vectors_BTD: Tensor) -> Tensor:
        """[B, M, 8 T]."""
        return self.conv_out(self.stages(self.conv_in(vectors_BTD.transpose(1, 2))))


class Codec(nn.Module):
    """The codec with what its training needs. Parameter names: ``codec_encoder.*`` and ``codec_decoder.*``.

    ``semantic_dim`` is the width of the features that the first codebook is drawn to; 0 for none.
    """

    def __init__(self, config: CodecModelConfig, semantic_dim: int = 0) -> None:
        super().__init__()
        self.codec_encoder = CodecEncoder(config)
        self.codec_decoder = MelDecoder(config, semantic_dim)

    def forward(self, pack: Pack) -> dict[str, Tensor]:
        """``predicted`` and ``mel`` [B, M, 8 T], ``is_mel`` [B, 8 T] and ``is_real`` [B, T] of what is no padding,
        ``frames`` [B]; ``commitment`` [B, T]; ``semantic`` [B, T, E] with a head for it; ``usage`` [2]. A pack without
        sound gives one clip of no length."""
        waves_BN, lengths_B = pack_waves(pack)
        mel = codec_mel(waves_BN)
        is_real = frame_mask(lengths_B, waves_BN.shape[1] // SAMPLES_PER_CODEC_FRAME, SAMPLES_PER_CODEC_FRAME)
        quantized = self.codec_encoder.quantizer(self.codec_encoder.latents(mel), is_real)
        output = {
            "predicted": self.codec_decoder(quantized.vectors),
            "mel": mel,
            "is_mel": frame_mask(lengths_B, mel.shape[-1], HOP),
            "is_real": is_real,
            "frames": is_real.sum(-1),
            "commitment": quantized.commitment,
            "usage": self.codec_encoder.quantizer.usage(),
        }
        if self.codec_decoder.semantic is not None:
            output["semantic"] = self.codec_decoder.semantic(quantized.semantic)
        return output


class FrozenCodec(nn.Module):
    """What remains of a codec when it is trained. Parameter names: ``codec_encoder.*``."""

    def __init__(self, config: CodecModelConfig) -> None:
        super().__init__()
        self.codec_encoder = CodecEncoder(config)

    def forward(self, pack: Pack) -> Tensor:
        """Codes int64 [B, G, T] of the clips of a pack."""
        return self.codec_encoder.encode(pack_waves(pack)[0])


def load_codec(
    folder: Path, num_codebooks: int | None = None, device: torch.device | str = "cpu"
) -> Callable[[np.ndarray], np.ndarray]:
    """A function from a 24 kHz wave [n] to its codes [G, ceil(n / 1920)]: our codec, or transformers' Mimi.

    ``folder`` is an export of stage codec or code2wav, or holds a Mimi checkpoint. ``num_codebooks``: the first so
    many. Raises ConfigError for another folder or more codebooks than there are.
    """
    config = Path(folder) / "config.json"
    if not config.is_file():
        raise ConfigError(f"'{folder}' has no config.json; give the export folder of stage codec, or one of Mimi")
    description = json.loads(config.read_text())
    kind = description.get("model_type")
    if kind == "mimi":
        mimi = MimiModel.from_pretrained(folder).eval().to(device)
        num_available, encode = mimi.config.num_quantizers, lambda wave: mimi.encode(wave[:, None]).audio_codes
    elif kind in ("omni_train_codec", "omni_train_code2wav"):
        codec = FrozenCodec(CodecModelConfig(**description["model"]["codec"])).eval()
        load_components(codec, Path(folder), {"codec_encoder"})
        codec.to(device)
        num_available, encode = codec.codec_encoder.num_codebooks, codec.codec_encoder.encode
    else:
        raise ConfigError(
            f"'{folder}' is of model type '{kind}'; give the export folder of stage codec, or one of Mimi"
        )
    if num_codebooks is not None and not 1 <= num_codebooks <= num_available:
        raise ConfigError(f"{num_codebooks} codebooks are asked for; the codec in '{folder}' has {num_available}")

    @torch.no_grad()
    def codes_of(wave: np.ndarray) -> np.ndarray:
        padded = F.pad(torch.from_numpy(wave), (0, -len(wave) % SAMPLES_PER_CODEC_FRAME))
        return encode(padded[None].to(device))[0, :num_codebooks].cpu().numpy()

    return codes_of


class SpeechFeatures(nn.Module):
    """AuT's encoder as a teacher. Parameter names: ``audio_tower.*``."""

    def __init__(self, audio_tower: nn.Module) -> None:
        super().__init__()
        self.audio_tower = audio_tower

    @torch.no_grad()
    def forward(self, pack: Pack) -> Tensor:
        """Features [B, T, E] of a pack with mels: AuT's 13 a second brought to 12.5 by linear interpolation."""
        if not len(pack.mel_lengths):
            return pack.mel.new_zeros(1, 1, self.audio_tower.config.d_model)
        hidden = encode_audio(self.audio_tower, pack.mel, pack.mel_lengths, pack.audio_window_sec)
        num_tokens = [audio_num_tokens(frames) for frames in pack.mel_lengths.tolist()]
        features = hidden.new_zeros(len(num_tokens), pack.waves.shape[1] // SAMPLES_PER_CODEC_FRAME, hidden.shape[-1])
        for row, clip, mels in zip(features, hidden.split(num_tokens), pack.mel_lengths.tolist(), strict=True):
            frames = mels // MELS_PER_CODEC_FRAME
            row[:frames] = F.interpolate(clip.T[None], frames, mode="linear")[0].T
        return features


def pack_waves(pack: Pack) -> tuple[Tensor, Tensor]:
    """(waves [B, N], lengths [B]) of a pack; one silent frame of length 0 for a pack without sound."""
    if len(pack.waves):
        return pack.waves, pack.wave_lengths
    return pack.waves.new_zeros(1, SAMPLES_PER_CODEC_FRAME), pack.wave_lengths.new_zeros(1)


def frame_mask(lengths_B: Tensor, num_frames: int, hop: int) -> Tensor:
    """Which frames start before the end of their clip, bool [B, F]."""
    return torch.arange(num_frames, device=lengths_B.device)[None] * hop < lengths_B[:, None]
