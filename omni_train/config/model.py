"""The sizes of a model, checked where transformers does not check them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

from omni_train.config.errors import ConfigError as ConfigError
from omni_train.config.errors import nearest as nearest
from omni_train.config.talker import TalkerModelConfig


@dataclass(kw_only=True, slots=True)
class TextModelConfig:
    """The Thinker's decoder; names are those of transformers' Qwen3OmniMoeTextConfig.

    ``embedding_std`` scales new embeddings. From scratch 1.0, the scale of media: beside media of rms 0.7, text of 0.02
    leaves the LLM's layers no say over the media positions. With pretrained rows theirs, about 0.02.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    moe_intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    mrope_section: list[int]
    max_position_embeddings: int
    rope_theta: float = 1_000_000.0
    norm_topk_prob: bool = True
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    embedding_std: float = 0.02

    def __post_init__(self) -> None:
        if self.hidden_size <= 0 or self.num_experts_per_tok > self.num_experts:
            raise ConfigError(
                f"model.text.num_experts_per_tok ({self.num_experts_per_tok}) must be at most "
                f"num_experts ({self.num_experts})"
            )
        if sum(self.mrope_section) != self.head_dim // 2:
            raise ConfigError(
                f"model.text.mrope_section {self.mrope_section} must sum to head_dim / 2 = {self.head_dim // 2} "
                "(temporal, height and width angles; transformers does not check it)"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"model.text.num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )


@dataclass(kw_only=True, slots=True)
class AudioModelConfig:
    """The AuT encoder; names are those of Qwen3OmniMoeAudioEncoderConfig. n_window stays 50 (upstream's bug)."""

    d_model: int
    encoder_layers: int
    encoder_attention_heads: int
    encoder_ffn_dim: int
    downsample_hidden_size: int
    num_mel_bins: int = 128
    max_source_positions: int = 1500
    n_window_infer: int = 800

    def __post_init__(self) -> None:
        if self.d_model % self.encoder_attention_heads:
            raise ConfigError(
                f"model.audio.d_model ({self.d_model}) must be a multiple of encoder_attention_heads "
                f"({self.encoder_attention_heads})"
            )
        if self.n_window_infer % 100:
            raise ConfigError(
                f"model.audio.n_window_infer ({self.n_window_infer} mel frames) must be a multiple of 100 (1 s)"
            )


@dataclass(kw_only=True, slots=True)
class VisionModelConfig:
    """The vision encoder; names are those of Qwen3OmniMoeVisionEncoderConfig. Pixels: limits of the resize.

    ``video_fps`` frames a second are looked at, fewer in videos that would have more than ``video_max_frames``. The
    temporal patches of a video share ``video_total_pixels`` (None: no bound), down to 1.05 times ``video_min_pixels``.
    """

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_position_embeddings: int
    deepstack_visual_indexes: list[int]
    patch_size: int = 16
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    min_pixels: int = 3136
    max_pixels: int = 12845056
    video_min_pixels: int = 131072
    video_max_pixels: int = 786432
    video_total_pixels: int | None = None
    video_fps: float = 2.0
    video_max_frames: int = 768

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 4:
            raise ConfigError(
                f"model.vision.hidden_size ({self.hidden_size}) / num_heads ({self.num_heads}) must be a multiple of 4"
            )
        outside = [index for index in self.deepstack_visual_indexes if not 0 <= index < self.depth]
        if outside:
            raise ConfigError(
                f"model.vision.deepstack_visual_indexes {outside} are not layers of a depth of {self.depth}"
            )
        if round(self.num_position_embeddings**0.5) ** 2 != self.num_position_embeddings:
            raise ConfigError(
                f"model.vision.num_position_embeddings ({self.num_position_embeddings}) must be a square number"
            )


@dataclass(kw_only=True, slots=True)
class DecoderModelConfig:
    """The attention decoder that AuT and the captioner train with; its width is its encoder's output width."""

    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int


@dataclass(kw_only=True, slots=True)
class CodecModelConfig:
    """The codec that makes speech into codes: log-mel at 100 Hz, causal convolutions, residual vector quantiser.

    ``strides`` bring 100 Hz down to 12.5. A codeword with an average of fewer than ``revive_below`` latents a step is
    replaced by one of the step's latents.
    """

    encoder_dim: int
    latent_dim: int
    num_codebooks: int
    codebook_size: int
    blocks_per_stage: int = 1
    strides: list[int] = field(default_factory=lambda: [2, 2, 2])
    ema_decay: float = 0.99
    revive_below: float = 0.1

    def __post_init__(self) -> None:
        if math.prod(self.strides) != 8:
            raise ConfigError(f"model.codec.strides {self.strides} must multiply to 8: from 100 Hz of mel to 12.5 Hz")
        if not 2 <= self.codebook_size <= 32768:
            raise ConfigError(f"model.codec.codebook_size ({self.codebook_size}) must be 2 … 32768: codes are int16")
        if not 0 < self.ema_decay < 1:
            raise ConfigError(f"model.codec.ema_decay ({self.ema_decay}) must lie between 0 and 1")


class WaveHead(Enum):
    """What turns Code2Wav's 50 Hz features into samples."""

    conv = "conv"  # the published ConvNet: stock transformers loads the weights
    istft = "istft"  # an inverse Fourier transform (Siuzdak 2023, Vocos): learns in a fraction of the time


@dataclass(kw_only=True, slots=True)
class Code2WavModelConfig:
    """Code2Wav; names are those of Qwen3OmniMoeCode2WavConfig. The rates multiply to 1920 samples a frame."""

    num_quantizers: int
    codebook_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    decoder_dim: int
    sliding_window: int = 72
    upsample_rates: list[int] = field(default_factory=lambda: [8, 5, 4, 3])
    upsampling_ratios: list[int] = field(default_factory=lambda: [2, 2])
    head: WaveHead = WaveHead.conv

    def __post_init__(self) -> None:
        if math.prod([*self.upsample_rates, *self.upsampling_ratios]) != 1920:
            raise ConfigError(
                f"model.code2wav.upsample_rates {self.upsample_rates} and upsampling_ratios {self.upsampling_ratios} "
                "must multiply to 1920 samples a frame"
            )
        if self.decoder_dim % 2 ** len(self.upsample_rates):
            raise ConfigError(
                f"model.code2wav.decoder_dim ({self.decoder_dim}) must be a multiple of "
                f"{2 ** len(self.upsample_rates)}: it is halved at each of the upsample_rates"
            )


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """A preset's sizes."""

    name: str
    text: TextModelConfig
    audio: AudioModelConfig
    vision: VisionModelConfig
    decoder: DecoderModelConfig
    codec: CodecModelConfig
    code2wav: Code2WavModelConfig
    talker: TalkerModelConfig | None = None  # a preset without one trains no speech

    def __post_init__(self) -> None:
        self._check_codes()
        levels, layers = len(self.vision.deepstack_visual_indexes), self.text.num_hidden_layers
        if levels >= layers:  # what is added after the last layer never reaches a text position
            raise ConfigError(
                f"model.vision.deepstack_visual_indexes has {levels} levels; use fewer than the LLM's {layers} layers"
            )
        if self.talker is not None and not levels < self.talker.accept_hidden_layer <= layers:
            raise ConfigError(
                f"model.talker.accept_hidden_layer ({self.talker.accept_hidden_layer}) must be more than the "
                f"{levels} DeepStack levels, whose features it hands on, and at most the LLM's {layers} layers"
            )

    def _check_codes(self) -> None:
        """Codec, Code2Wav and Talker speak of the same codes."""
        users = {"code2wav": (self.code2wav.num_quantizers, "num_quantizers", self.code2wav.codebook_size)}
        if self.talker is not None:
            users["talker"] = (self.talker.num_code_groups, "num_code_groups", self.talker.codebook_size)
        for part, (number, name, size) in users.items():
            if number != self.codec.num_codebooks:
                raise ConfigError(
                    f"model.codec.num_codebooks ({self.codec.num_codebooks}) and model.{part}.{name} ({number}) must "
                    "be equal"
                )
            if size != self.codec.codebook_size:
                raise ConfigError(
                    f"model.codec.codebook_size ({self.codec.codebook_size}) and model.{part}.codebook_size ({size}) "
                    "must be equal"
                )
