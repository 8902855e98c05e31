"""The full-size preset against the published configuration, and its parameters against the published counts."""

from __future__ import annotations

import pytest

from omni_train.config import ModelConfig, load
from omni_train.models.build import build_omni, omni_config
from omni_train.planning.counts import count_parameters, render_counts, render_plan


def preset(name: str) -> ModelConfig:
    return load("s2_general", [f"model={name}"]).model


# Values that the published descriptions of Qwen3-Omni-30B-A3B give (arXiv 2509.17765 and its config.json).
PUBLISHED = {
    "thinker_config.text_config": {
        "num_hidden_layers": 48,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "vocab_size": 152_064,
        "tie_word_embeddings": False,
    },
    "thinker_config.audio_config": {
        "encoder_layers": 32,
        "d_model": 1280,
        "encoder_attention_heads": 20,
        "encoder_ffn_dim": 5120,
        "num_mel_bins": 128,
        "downsample_hidden_size": 480,
        "n_window": 50,
        "n_window_infer": 800,
        "output_dim": 2048,
    },
    "thinker_config.vision_config": {
        "depth": 27,
        "hidden_size": 1152,
        "num_heads": 16,
        "intermediate_size": 4304,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "deepstack_visual_indexes": [8, 16, 24],
        "num_position_embeddings": 2304,
        "out_hidden_size": 2048,
    },
    "thinker_config": {
        "audio_token_id": 151_675,
        "image_token_id": 151_655,
        "video_token_id": 151_656,
        "audio_start_token_id": 151_669,
        "audio_end_token_id": 151_670,
        "vision_start_token_id": 151_652,
        "user_token_id": 872,
        "position_id_per_seconds": 13,
    },
    "talker_config.text_config": {
        "num_hidden_layers": 20,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "num_experts": 128,
        "num_experts_per_tok": 6,
        "norm_topk_prob": True,
    },
    "talker_config.code_predictor_config": {"num_hidden_layers": 5, "hidden_size": 1024, "num_code_groups": 16},
    "talker_config": {
        "num_code_groups": 16,
        "accept_hidden_layer": 24,
        "thinker_hidden_size": 2048,
        "audio_token_id": 151_675,
        "codec_bos_id": 2149,
    },
    "code2wav_config": {
        "num_hidden_layers": 8,
        "num_quantizers": 16,
        "codebook_size": 2048,
        "sliding_window": 72,
        "upsample_rates": [8, 5, 4, 3],
        "upsampling_ratios": [2, 2],
    },
}


@pytest.mark.parametrize("path", PUBLISHED)
def test_full_size_equals_the_published_configuration(path):
    section = omni_config(preset("qwen3_omni_30b_a3b"))
    for name in path.split("."):
        section = getattr(section, name)
    assert {key: getattr(section, key) for key in PUBLISHED[path]} == PUBLISHED[path]


def test_rope_sections_and_frame_rate():
    config = omni_config(preset("qwen3_omni_30b_a3b"))
    for text in (config.thinker_config.text_config, config.talker_config.text_config):
        assert text.rope_parameters["mrope_section"] == [24, 20, 20]
        assert text.rope_parameters["rope_theta"] == 1_000_000
    rates = config.code2wav_config.upsample_rates + config.code2wav_config.upsampling_ratios
    product = 1
    for rate in rates:
        product *= rate
    assert 24_000 / product == 12.5  # frames a second


# Published, millions; tolerance; which of our numbers it is.
FIGURES = {
    "thinker total": (30_000, 0.02, lambda c: c["llm"].num_parameters),
    "thinker active": (3_000, 0.12, lambda c: c["llm"].num_active),
    "thinker active, without the token embeddings": (3_000, 0.02, lambda c: active_without_embeddings(c)),
    "AuT": (650, 0.01, lambda c: c["audio_encoder"].num_parameters + c["audio_adapter"].num_parameters),
    "vision": (540, 0.01, lambda c: c["vision_encoder"].num_parameters + c["vision_adapter"].num_parameters),
    "talker total": (3_000, 0.07, lambda c: c["talker"].num_parameters),
    "talker active": (300, 0.02, lambda c: c["talker"].num_active),
    "MTP, its layers": (80, 0.02, lambda c: c["mtp"].parts["transformer layers"]),
    "Code2Wav": (200, 0.09, lambda c: c["code2wav"].num_parameters),
    "whole": (34_500, 0.025, lambda c: sum(x.num_parameters for n, x in c.items() if n != "aut_decoder")),
}


def active_without_embeddings(counts):
    return counts["llm"].num_active - counts["llm"].parts["token embeddings"]


@pytest.fixture(scope="module")
def counts():
    return count_parameters(preset("qwen3_omni_30b_a3b"))


@pytest.mark.parametrize("name", FIGURES)
def test_counts_of_the_full_size_model(name, counts):
    published, tolerance, ours = FIGURES[name]
    assert abs(ours(counts) / 1e6 - published) <= tolerance * published


def test_counts_by_hand(counts):
    """48 layers of 128 experts of 3 × 2048 × 768; attention q, o of 2048 × 4096 and k, v of 2048 × 512, with norms."""
    experts = 48 * 128 * 3 * 2048 * 768
    attention = 48 * (2 * 2048 * 4096 + 2 * 2048 * 512 + 2 * 128 + 2 * 2048) + 2048
    routers, embeddings = 48 * 2048 * 128, 152_064 * 2048
    assert counts["llm"].parts == {
        "token embeddings": embeddings,
        "transformer layers": attention,
        "routed experts": experts,
        "routers and shared experts": routers,
        "head": embeddings,
    }
    assert counts["llm"].num_active == experts // 16 + attention + routers + 2 * embeddings


def test_every_parameter_is_counted_once(counts):
    whole = sum(parameter.numel() for parameter in build_omni(preset("qwen3_omni_30b_a3b"), device="meta").parameters())
    assert whole == sum(count.num_parameters for name, count in counts.items() if name != "aut_decoder")
    for count in counts.values():
        assert sum(count.parts.values()) == count.num_parameters >= count.num_active


def test_the_table_names_every_component_and_what_it_includes(counts):
    table = render_counts(preset("qwen3_omni_30b_a3b"))
    for count in counts.values():
        assert f"{count.num_parameters:,}" in table and count.includes in table
    assert "35,259,818,545" in table


@pytest.mark.parametrize(("name", "more"), [("tiny", {"talker", "mtp", "code2wav"}), ("small", set())])
def test_presets_with_and_without_a_talker_are_counted_too(name, more):
    thinker = {"llm", "audio_encoder", "audio_adapter", "vision_encoder", "vision_adapter", "aut_decoder"}
    assert set(count_parameters(preset(name))) == thinker | more


def test_a_plan_states_steps_and_tokens():
    values = ["model=tiny", "data.lanes=3", "data.packs_per_lane=2", "stage.context=100", "stage.total_tokens=2e6"]
    plan = render_plan(load("s2_general", values))
    assert "6 packs of 100 tokens a step (600 tokens)" in plan
    assert "2,000,000 tokens: at least 3,334 steps" in plan
