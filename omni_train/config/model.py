"""The sizes of a model, checked where transformers does not check them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

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

    ``video_fps`` frames a second are looked at, fewer in videos that would have more than ``video_max_frames``.
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
class ModelConfig:
    """A preset's sizes. ``extra`` holds parts that no stage trains yet (Code2Wav), by upstream's names."""

    name: str
    text: TextModelConfig
    audio: AudioModelConfig
    vision: VisionModelConfig
    decoder: DecoderModelConfig
    talker: TalkerModelConfig | None = None  # a preset without one trains no speech
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
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
