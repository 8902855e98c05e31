"""Presets become transformers configurations and freshly initialised modules."""

from __future__ import annotations

import math

import pytest
import torch
from support import micro_model, tokenizer_folder

from omni_train.config import ConfigError, load
from omni_train.data.tokenizer import load_tokenizer
from omni_train.models.build import (
    TOKEN_FIELDS,
    build_decoder,
    build_encoder,
    build_thinker,
    rope_parameters,
    thinker_config,
    token_ids,
)


@pytest.fixture(scope="module")
def tiny():
    return load("s2_general", ["model=tiny"]).model


@pytest.fixture(scope="module")
def modules(tiny):
    return {
        "thinker": build_thinker(thinker_config(tiny), seed=0),
        "audio": build_encoder(tiny, "audio", seed=0),
        "vision": build_encoder(tiny, "vision", seed=0),
        "decoder": build_decoder(tiny, tiny.audio.d_model, seed=0, has_ctc=True),
    }


@pytest.mark.parametrize("name", ["thinker", "audio", "vision", "decoder"])
def test_every_parameter_is_initialised(name, modules):
    """Finite; norm weights one, vectors else zero or small; matrices neither zero nor constant, mean near zero."""
    for parameter_name, trained in modules[name].named_parameters():
        parameter = trained.detach()
        assert parameter.isfinite().all(), parameter_name
        if parameter.ndim == 1:
            assert parameter_name.endswith("bias") or bool((parameter == 1).all()), parameter_name
            assert not parameter_name.endswith("bias") or float(parameter.abs().max()) < 1, parameter_name
        else:
            assert 0.005 < float(parameter.std()) < 1.1, parameter_name
            assert abs(float(parameter.mean())) < 0.1 * float(parameter.std()) + 1e-3, parameter_name


def test_no_two_experts_or_layers_start_alike(modules):
    layers = modules["thinker"].model.language_model.layers
    experts = torch.cat([layer.mlp.experts.gate_up_proj.flatten(1) for layer in layers])
    assert torch.corrcoef(experts.detach()).fill_diagonal_(0).abs().max() < 0.1


@pytest.mark.parametrize("name", ["audio", "vision"])
def test_towers_start_at_one_over_the_square_root_of_fan_in(name, modules):
    seen = 0
    for layer in modules[name].modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)) and layer.weight.numel() > 5_000:
            fan_in = layer.weight[0].numel()
            assert float(layer.weight.detach().std()) == pytest.approx(fan_in**-0.5, rel=0.05)
            assert layer.bias is None or not layer.bias.any()
            seen += 1
    assert seen > 10


def test_the_llm_starts_at_fan_in_with_a_head_that_copies(tiny):
    std = 0.3
    thinker = build_thinker(thinker_config(tiny), seed=0, embedding_std=std)
    embeddings, head = thinker.model.language_model.embed_tokens.weight, thinker.lm_head.weight
    assert float(embeddings.std()) == pytest.approx(std, rel=0.02)
    assert (head * tiny.text.hidden_size**0.5 - embeddings / std).abs().max() < 1e-5
    layer = thinker.model.language_model.layers[0]
    for weight in (layer.self_attn.q_proj.weight, layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
        assert float(weight.std()) * weight.shape[-1] ** 0.5 == pytest.approx(1.0, rel=0.05)


def test_a_seed_names_the_weights_and_leaves_the_global_generator_alone(tiny):
    def weights(seed):
        return dict(build_thinker(thinker_config(micro_model()), seed=seed).named_parameters())

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, again, other = weights(1), weights(1), weights(2)
    build_encoder(micro_model(), "audio", seed=1)
    build_decoder(micro_model(), 32, seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_token_ids_are_those_of_the_tokenizer():
    tokenizer = load_tokenizer(tokenizer_folder())
    config = thinker_config(micro_model(), tokenizer)
    for field, token in TOKEN_FIELDS.items():
        assert getattr(config, field) == tokenizer.convert_tokens_to_ids(token)
    assert tokenizer.decode([config.user_token_id]) == "user"[: len(tokenizer.decode([config.user_token_id]))]
    assert config.position_id_per_seconds == 13


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused():
    tokenizer = load_tokenizer(tokenizer_folder())
    size = len(tokenizer)
    message = (
        rf"model.text.vocab_size \(64\) is smaller than the tokenizer \({size} tokens\); try .*={-(-size // 64) * 64}"
    )
    with pytest.raises(ConfigError, match=message):
        token_ids(tokenizer, 64)


def test_a_tokenizer_without_audio_tokens_is_refused():
    class WithoutAudio:
        def __len__(self):
            return 10

        def convert_tokens_to_ids(self, token):
            return None if "audio" in token else 3

    with pytest.raises(ConfigError, match=r"lacks the special tokens .*audio_pad.*; use a Qwen3-Omni tokenizer folder"):
        token_ids(WithoutAudio(), 320)


def test_yarn_states_the_original_context():
    """Factor 4 from 512 positions; without the original length transformers would take 2048 for it."""
    model = micro_model()
    assert rope_parameters(model, 1.0)["rope_type"] == "default"
    rope = thinker_config(model, yarn_factor=4.0).text_config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 4.0, 512)
    assert thinker_config(model, yarn_factor=4.0).text_config.max_position_embeddings == 2048
    assert rope["mrope_section"] == [4, 2, 2] and rope["rope_theta"] == 10_000.0


def test_yarn_changes_slow_angles_only_and_scales_attention():
    """The fastest angle stays, the slowest is divided by the factor; cos and sin are scaled by 0.1 ln 4 + 1."""
    plain, yarn = (
        build_thinker(thinker_config(micro_model(), yarn_factor=f), seed=0).model.language_model.rotary_emb
        for f in (1.0, 4.0)
    )
    ratio = plain.inv_freq / yarn.inv_freq
    assert float(ratio[0]) == pytest.approx(1.0) and float(ratio[-1]) == pytest.approx(4.0)
    assert yarn.attention_scaling == pytest.approx(0.1 * math.log(4) + 1)


def test_the_decoder_has_a_ctc_head_only_when_asked():
    assert build_decoder(micro_model(), 32, seed=0).ctc_head is None
    head = build_decoder(micro_model(), 32, seed=0, has_ctc=True).ctc_head
    assert head.weight.shape == (2 * 257, 32)


def test_the_meta_device_costs_nothing():
    thinker = build_thinker(
        thinker_config(load("s2_general", ["model=qwen3_omni_30b_a3b"]).model), seed=0, device="meta"
    )
    assert {parameter.device.type for parameter in thinker.parameters()} == {"meta"}
    assert isinstance(thinker.config.text_config.num_experts, int)
