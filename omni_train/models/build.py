"""transformers configurations and modules of a preset, initialised for training from scratch."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.models.moonshine.configuration_moonshine import MoonshineConfig
from transformers.models.moonshine.modeling_moonshine import MoonshineDecoder
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import (
    Qwen3OmniMoeAudioEncoderConfig,
    Qwen3OmniMoeCode2WavConfig,
    Qwen3OmniMoeConfig,
    Qwen3OmniMoeTalkerConfig,
    Qwen3OmniMoeThinkerConfig,
    Qwen3OmniMoeVisionEncoderConfig,
)
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import (
    Qwen3OmniMoeAudioEncoder,
    Qwen3OmniMoeForConditionalGeneration,
    Qwen3OmniMoeTalkerForConditionalGeneration,
    Qwen3OmniMoeThinkerForConditionalGeneration,
    Qwen3OmniMoeVisionEncoder,
)

from omni_train.config import ConfigError, ModelConfig
from omni_train.data.tokenizer import IM_END, IM_START, TTS_BOS, TTS_EOD, TTS_PAD
from omni_train.models.attention import VARLEN
from omni_train.models.encoder_decoder import TextDecoder

# Token names → fields of the Thinker's configuration.
TOKEN_FIELDS = {
    "audio_token_id": "<|audio_pad|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "audio_start_token_id": "<|audio_start|>",
    "audio_end_token_id": "<|audio_end|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}

# Those of the published tokenizer. NOTE: upstream's defaults are the audio ids of Qwen2.5-Omni.
PUBLISHED_TOKEN_IDS = {
    "audio_token_id": 151675,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "audio_start_token_id": 151669,
    "audio_end_token_id": 151670,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "user_token_id": 872,
}


# Token names → fields of the whole model's configuration; roles are the first token of their name.
OMNI_TOKEN_FIELDS = {
    "im_start_token_id": IM_START,
    "im_end_token_id": IM_END,
    "tts_pad_token_id": TTS_PAD,
    "tts_bos_token_id": TTS_BOS,
    "tts_eos_token_id": TTS_EOD,
}
TALKER_TOKEN_FIELDS = (
    "audio_token_id", "image_token_id", "video_token_id", "audio_start_token_id", "vision_start_token_id",
)  # fmt: skip
ROPE_FIELDS = ("mrope_section", "rope_theta")
ROLE_FIELDS = {"system_token_id": "system", "user_token_id": "user", "assistant_token_id": "assistant"}

AUDIO_WINDOW_FRAMES = 50
"""Half a chunk of the audio encoder, in mel frames. NOTE: upstream counts tokens wrongly for any other value."""

EXPERTS = re.compile(r"mlp\.experts\.(gate_up_proj|down_proj)$")


def rope_parameters(model: ModelConfig, yarn_factor: float) -> dict[str, Any]:
    """RoPE settings of the LLM; YaRN (Peng et al. 2023) extends max_position_embeddings by ``yarn_factor``."""
    text = model.text
    shared = {"rope_theta": text.rope_theta, "mrope_section": list(text.mrope_section)}
    if yarn_factor == 1.0:
        return {"rope_type": "default", **shared}
    # NOTE: without original_max_position_embeddings transformers takes the *current* maximum for the original one.
    original = text.max_position_embeddings
    return {"rope_type": "yarn", "factor": yarn_factor, "original_max_position_embeddings": original, **shared}


def thinker_config(
    model: ModelConfig, tokenizer: PreTrainedTokenizerBase | None = None, yarn_factor: float = 1.0
) -> Qwen3OmniMoeThinkerConfig:
    """The Thinker's transformers configuration; token ids from ``tokenizer``, or the published ones without one."""
    text = model.text
    text_config = {
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.moe_intermediate_size,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "head_dim": text.head_dim,
        "moe_intermediate_size": text.moe_intermediate_size,
        "num_experts": text.num_experts,
        "num_experts_per_tok": text.num_experts_per_tok,
        "norm_topk_prob": text.norm_topk_prob,
        "rms_norm_eps": text.rms_norm_eps,
        "max_position_embeddings": int(text.max_position_embeddings * yarn_factor),
        "rope_parameters": rope_parameters(model, yarn_factor),
        "tie_word_embeddings": text.tie_word_embeddings,
    }
    return Qwen3OmniMoeThinkerConfig(
        text_config=text_config,
        audio_config=audio_config(model).to_dict(),
        vision_config=vision_config(model).to_dict(),
        position_id_per_seconds=13,
        tie_word_embeddings=text.tie_word_embeddings,
        **token_ids(tokenizer, text.vocab_size),
    )


def omni_config(
    model: ModelConfig, tokenizer: PreTrainedTokenizerBase | None = None, yarn_factor: float = 1.0
) -> Qwen3OmniMoeConfig:
    """The configuration of the whole model; the Thinker's alone (no audio output) for a preset without a Talker."""
    thinker = thinker_config(model, tokenizer, yarn_factor).to_dict()
    if model.talker is None:
        return Qwen3OmniMoeConfig(thinker_config=thinker, enable_audio_output=False)
    ids = {}
    if tokenizer is not None:
        ids = {field: tokenizer.convert_tokens_to_ids(token) for field, token in OMNI_TOKEN_FIELDS.items()}
        ids |= {field: tokenizer.encode(role)[0] for field, role in ROLE_FIELDS.items()}
    talker, code2wav = talker_config(model, tokenizer).to_dict(), code2wav_config(model).to_dict()
    return Qwen3OmniMoeConfig(thinker_config=thinker, talker_config=talker, code2wav_config=code2wav, **ids)


def talker_config(model: ModelConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> Qwen3OmniMoeTalkerConfig:
    """The Talker's transformers configuration.

    NOTE: stock's get_rope_index reads ``audio_config.n_window`` of this configuration, which has none, where a picture
    meets a sound. The attribute map, which a config.json keeps, finds it in ``text_config``.
    """
    talker = model.talker
    assert talker is not None
    decoder, mtp, tokens = talker.decoder, talker.mtp, talker.tokens
    text_config = {name: getattr(decoder, name) for name in decoder.__slots__ if name not in ROPE_FIELDS}
    text_config |= {"vocab_size": talker.vocab_size, "n_window": AUDIO_WINDOW_FRAMES}
    text_config["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": decoder.rope_theta,
        "mrope_section": list(decoder.mrope_section),
    }
    predictor = {name: getattr(mtp, name) for name in mtp.__slots__ if name not in ROPE_FIELDS}
    predictor |= {
        "vocab_size": talker.codebook_size,
        "hidden_size": decoder.hidden_size,
        "num_code_groups": talker.num_code_groups,
        "rope_parameters": {"rope_type": "default", "rope_theta": mtp.rope_theta},
    }
    thinker_ids = token_ids(tokenizer, model.text.vocab_size)
    return Qwen3OmniMoeTalkerConfig(
        text_config=text_config,
        code_predictor_config=predictor,
        num_code_groups=talker.num_code_groups,
        accept_hidden_layer=talker.accept_hidden_layer,
        thinker_hidden_size=model.text.hidden_size,
        spatial_merge_size=model.vision.spatial_merge_size,
        position_id_per_seconds=13,
        attribute_map={"audio_config": "text_config"},
        codec_pad_id=tokens.pad,
        codec_bos_id=tokens.bos,
        codec_eos_token_id=tokens.eos,
        codec_nothink_id=tokens.nothink,
        codec_think_bos_id=tokens.think_bos,
        codec_think_eos_id=tokens.think_eos,
        speaker_id=dict(talker.speakers),
        **{name: number for name, number in thinker_ids.items() if name in TALKER_TOKEN_FIELDS},
    )


def audio_config(model: ModelConfig) -> Qwen3OmniMoeAudioEncoderConfig:
    """The AuT encoder's transformers configuration."""
    audio = model.audio
    return Qwen3OmniMoeAudioEncoderConfig(
        num_mel_bins=audio.num_mel_bins,
        d_model=audio.d_model,
        encoder_layers=audio.encoder_layers,
        encoder_attention_heads=audio.encoder_attention_heads,
        encoder_ffn_dim=audio.encoder_ffn_dim,
        downsample_hidden_size=audio.downsample_hidden_size,
        max_source_positions=audio.max_source_positions,
        n_window=AUDIO_WINDOW_FRAMES,
        n_window_infer=audio.n_window_infer,
        output_dim=model.text.hidden_size,
    )


def vision_config(model: ModelConfig) -> Qwen3OmniMoeVisionEncoderConfig:
    """The vision encoder's transformers configuration."""
    vision = model.vision
    return Qwen3OmniMoeVisionEncoderConfig(
        depth=vision.depth,
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_heads=vision.num_heads,
        patch_size=vision.patch_size,
        spatial_merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
        num_position_embeddings=vision.num_position_embeddings,
        deepstack_visual_indexes=list(vision.deepstack_visual_indexes),
        out_hidden_size=model.text.hidden_size,
    )


def code2wav_config(model: ModelConfig) -> Qwen3OmniMoeCode2WavConfig:
    """Code2Wav's transformers configuration."""
    code2wav = model.code2wav
    return Qwen3OmniMoeCode2WavConfig(
        num_quantizers=code2wav.num_quantizers,
        codebook_size=code2wav.codebook_size,
        hidden_size=code2wav.hidden_size,
        num_hidden_layers=code2wav.num_hidden_layers,
        num_attention_heads=code2wav.num_attention_heads,
        num_key_value_heads=code2wav.num_key_value_heads,
        intermediate_size=code2wav.intermediate_size,
        sliding_window=code2wav.sliding_window,
        decoder_dim=code2wav.decoder_dim,
        upsample_rates=list(code2wav.upsample_rates),
        upsampling_ratios=list(code2wav.upsampling_ratios),
    )


def token_ids(tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> dict[str, int]:
    """The Thinker configuration's token ids, looked up by name. Raises ConfigError where the tokenizer does not fit."""
    if tokenizer is None:
        return PUBLISHED_TOKEN_IDS
    if len(tokenizer) > vocab_size:
        raise ConfigError(
            f"model.text.vocab_size ({vocab_size}) is smaller than the tokenizer ({len(tokenizer)} tokens); "
            f"try model.text.vocab_size={math.ceil(len(tokenizer) / 64) * 64}"
        )
    ids = {field: tokenizer.convert_tokens_to_ids(token) for field, token in TOKEN_FIELDS.items()}
    missing = [TOKEN_FIELDS[field] for field, number in ids.items() if number is None]
    if missing:
        raise ConfigError(f"the tokenizer lacks the special tokens {missing}; use a Qwen3-Omni tokenizer folder")
    return {**ids, "user_token_id": tokenizer.encode("user")[0]}


@torch.no_grad()
def build_thinker(
    config: Qwen3OmniMoeThinkerConfig, *, seed: int, device: str = "cpu", embedding_std: float = 0.02
) -> nn.Module:
    """A Qwen3OmniMoeThinkerForConditionalGeneration in fp32, initialised from ``seed`` (nothing on device="meta").

    An untied head starts as the transposed embeddings, so that what attention fetches is what is said: copying eight
    words is then learned in 0.35 M tokens (99 % against 15 %), and transcribing in S1 and S2 rests on it.
    """
    with torch.device(device), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        thinker = Qwen3OmniMoeThinkerForConditionalGeneration(config)
        if device != "meta":
            fan_in_init(thinker.model)
            if not config.text_config.tie_word_embeddings:  # a tied head keeps transformers' std 0.02
                embeddings = nn.init.normal_(thinker.model.language_model.embed_tokens.weight)
                thinker.lm_head.weight.copy_(embeddings * config.text_config.hidden_size**-0.5)
                embeddings.mul_(embedding_std)
    use_varlen(thinker.config.text_config, thinker.config.audio_config, thinker.config.vision_config)
    return thinker


@torch.no_grad()
def build_talker(
    config: Qwen3OmniMoeTalkerConfig, *, seed: int, device: str = "cpu", embedding_std: float = 0.02
) -> nn.Module:
    """A Qwen3OmniMoeTalkerForConditionalGeneration in fp32, initialised from ``seed`` (nothing on device="meta").

    NOTE: stock leaves the Talker's experts uninitialised and its routers zero.
    """
    with torch.device(device), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        talker = Qwen3OmniMoeTalkerForConditionalGeneration(config)
        if device != "meta":
            fan_in_init(talker)
            for layer in talker.model.layers:
                nn.init.normal_(layer.mlp.gate.weight, std=config.text_config.initializer_range)
            for embedding in (talker.model.codec_embedding, *talker.code_predictor.model.codec_embedding):
                nn.init.normal_(embedding.weight, std=embedding_std)
    use_varlen(talker.model.config)
    talker.code_predictor.set_attn_implementation("sdpa")
    return talker


def build_omni(
    model: ModelConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    yarn_factor: float = 1.0,
    *,
    device: str,
) -> nn.Module:
    """The whole Qwen3OmniMoeForConditionalGeneration, for counting and for export: no usable initial weights."""
    with torch.device(device):
        return Qwen3OmniMoeForConditionalGeneration(omni_config(model, tokenizer, yarn_factor))


def build_encoder(model: ModelConfig, kind: str, *, seed: int) -> nn.Module:
    """The audio ('audio') or vision ('vision') encoder alone, initialised from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = (
            Qwen3OmniMoeAudioEncoder(audio_config(model))
            if kind == "audio"
            else Qwen3OmniMoeVisionEncoder(vision_config(model))
        )
        fan_in_init(encoder)
    use_varlen(encoder.config)
    return encoder


def build_decoder(model: ModelConfig, hidden_size: int, *, seed: int, has_ctc: bool = False) -> TextDecoder:
    """The library's attention decoder (rotary, pre-norm, cross-attention) of the encoder's width."""
    decoder = model.decoder
    config = MoonshineConfig(
        vocab_size=model.text.vocab_size,
        hidden_size=hidden_size,
        intermediate_size=decoder.intermediate_size,
        decoder_num_hidden_layers=decoder.num_hidden_layers,
        decoder_num_attention_heads=decoder.num_attention_heads,
        decoder_num_key_value_heads=decoder.num_attention_heads,
        max_position_embeddings=4096,
        pad_token_id=None,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TextDecoder(MoonshineDecoder(config), has_ctc)


def use_varlen(*configs: Any) -> None:
    """Select our packed attention for modules built from these configurations."""
    for config in configs:
        # NOTE: not set_attn_implementation: for a name with "flash" it asks for the flash_attn package.
        config._attn_implementation_internal = VARLEN


@torch.no_grad()
def fan_in_init(module: nn.Module) -> None:
    """Weights of linear and convolution layers and of experts from N(0, 1 / fan_in), biases zero.

    At width 2048 this is transformers' std 0.02; at small width it beat that clearly (vision 27 against 14 % after 25
    s).
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d)):
            fan_in = layer.weight[0].numel()
            if isinstance(layer, nn.ConvTranspose1d):  # [in, out, kernel]: kernel / stride inputs reach an output
                fan_in = layer.weight.shape[0] * layer.kernel_size[0] // layer.stride[0]
            nn.init.normal_(layer.weight, std=fan_in**-0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for name, parameter in module.named_parameters():
        if EXPERTS.search(name):  # [experts, out, in]
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
