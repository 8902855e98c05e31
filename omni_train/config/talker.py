"""The sizes of the Talker and of its code predictor (MTP), and the ids that its sequences are written with."""

from __future__ import annotations

from dataclasses import dataclass

from omni_train.config.errors import ConfigError

NUM_CODEC_TOKENS = 1024
"""Rows of the codec vocabulary behind the codes: control tokens and speakers; none but eos is ever spoken."""


@dataclass(kw_only=True, slots=True)
class TalkerDecoderConfig:
    """The Talker's decoder; names are those of transformers' Qwen3OmniMoeTalkerTextConfig.

    ``intermediate_size`` is the width of the projections from the Thinker: every layer's MLP is a mixture of experts.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    mrope_section: list[int]
    max_position_embeddings: int
    rope_theta: float = 1_000_000.0
    norm_topk_prob: bool = True

    def __post_init__(self) -> None:
        if self.num_experts_per_tok > self.num_experts:
            raise ConfigError(
                f"model.talker.decoder.num_experts_per_tok ({self.num_experts_per_tok}) must be at most "
                f"num_experts ({self.num_experts})"
            )
        if sum(self.mrope_section) != self.head_dim // 2:
            raise ConfigError(
                f"model.talker.decoder.mrope_section {self.mrope_section} must sum to head_dim / 2 = "
                f"{self.head_dim // 2} (temporal, height and width angles; transformers does not check it)"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"model.talker.decoder.num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )


@dataclass(kw_only=True, slots=True)
class MtpConfig:
    """The code predictor (MTP) of a frame's residual codes; its width is the Talker's."""

    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 1_000_000.0


@dataclass(kw_only=True, slots=True)
class CodecTokens:
    """Ids of the codec vocabulary's control tokens."""

    pad: int
    bos: int
    eos: int
    nothink: int
    think_bos: int
    think_eos: int


@dataclass(kw_only=True, slots=True)
class TalkerModelConfig:
    """The Talker with its MTP. A frame is ``num_code_groups`` codes below ``codebook_size``.

    ``accept_hidden_layer``: after how many of the Thinker's layers media are read (all of them: after its last norm).
    ``speakers``: name → row of the codec embedding. ``embedding_std`` scales new embeddings of codes, see
    TextModelConfig.
    """

    accept_hidden_layer: int
    num_code_groups: int
    codebook_size: int
    decoder: TalkerDecoderConfig
    mtp: MtpConfig
    tokens: CodecTokens
    speakers: dict[str, int]
    embedding_std: float = 0.02

    @property
    def vocab_size(self) -> int:
        """Codes and control tokens of the first codebook's embedding and head."""
        return self.codebook_size + NUM_CODEC_TOKENS

    def __post_init__(self) -> None:
        if self.num_code_groups < 2:
            raise ConfigError(f"model.talker.num_code_groups ({self.num_code_groups}) must be at least 2")
        if not self.speakers:
            raise ConfigError("model.talker.speakers is empty: give at least one name and its codec id")
        tokens = {f"tokens.{name}": getattr(self.tokens, name) for name in CodecTokens.__slots__}
        tokens |= {f"speakers.{name}": number for name, number in self.speakers.items()}
        for name, number in tokens.items():
            if not self.codebook_size <= number < self.vocab_size:
                raise ConfigError(
                    f"model.talker.{name} ({number}) must lie in {self.codebook_size} … {self.vocab_size - 1}, "
                    "behind the codes"
                )
        if len(set(tokens.values())) < len(tokens):
            raise ConfigError(f"model.talker.tokens and speakers must have different ids; they are {tokens}")
        for name in self.speakers:
            if name != name.lower():
                raise ConfigError(f"model.talker.speakers.{name}: transformers looks a speaker up in lower case")
