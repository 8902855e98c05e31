"""Components out of local folders: ours, Qwen3-MoE, Qwen3-VL, a whole Qwen3-Omni; and what is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import micro_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from omni_train.config import ConfigError
from omni_train.models.build import build_encoder, build_thinker, thinker_config
from omni_train.models.thinker import compose
from omni_train.models.weights import WeightFolder, canonical, load_components

THINKER = {"llm", "audio_encoder", "audio_adapter", "vision_encoder", "vision_adapter"}


def thinker(seed: int):
    return build_thinker(thinker_config(micro_model()), seed=seed)


def parameters(module) -> dict[str, torch.Tensor]:
    return {canonical(name): parameter.detach().clone() for name, parameter in module.named_parameters()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.fixture(scope="module")
def source():
    return thinker(seed=1)


def folder_of(source, kind: str, folder):
    """The source's weights as folders of the family store them."""
    if kind == "stock":  # experts one by one, audio_tower. and visual. at the top
        source.save_pretrained(folder)
        stored = load_file(folder / "model.safetensors")
        assert "model.layers.0.mlp.experts.3.gate_proj.weight" in stored and "visual.pos_embed.weight" in stored
    else:
        prefix = {"in memory, fused": "", "inside a whole Omni": "thinker."}[kind]
        save_file(
            {prefix + name: tensor.clone() for name, tensor in source.state_dict().items()}, folder / "a.safetensors"
        )
    return folder


@pytest.mark.parametrize("kind", ["stock", "in memory, fused", "inside a whole Omni"])
def test_a_thinker_comes_back_whole(kind, source, tmp_path):
    module = compose(thinker(seed=2))
    assert load_components(module, folder_of(source, kind, tmp_path), THINKER) == THINKER
    assert_same(parameters(module), parameters(source))


def test_a_folder_of_several_files_and_of_half_precision(source, tmp_path):
    state = {name: tensor.bfloat16() for name, tensor in source.state_dict().items()}
    names = sorted(state)
    for number in range(3):
        save_file({name: state[name].clone() for name in names[number::3]}, tmp_path / f"model-{number}.safetensors")
    module = compose(thinker(seed=2))
    load_components(module, tmp_path, THINKER)
    assert_same(parameters(module), {canonical(name): state[name].float() for name in dict(source.named_parameters())})


def test_only_what_is_asked_for_changes(source, tmp_path):
    folder = folder_of(source, "stock", tmp_path)
    module = compose(thinker(seed=2))
    before, wanted = parameters(module), parameters(source)
    assert load_components(module, folder, {"audio_adapter"}) == {"audio_adapter"}
    adapter = {f"audio_tower.proj{number}.{what}" for number in (1, 2) for what in ("weight", "bias")}
    assert_same(parameters(module), {name: (wanted if name in adapter else before)[name] for name in before})


def test_an_encoder_alone_takes_its_part(source, tmp_path):
    folder = folder_of(source, "inside a whole Omni", tmp_path)
    encoder = torch.nn.Module()
    encoder.audio_tower = build_encoder(micro_model(), "audio", seed=3)
    assert load_components(encoder, folder, THINKER) == {"audio_encoder", "audio_adapter"}
    expected = {name: tensor for name, tensor in parameters(source).items() if name.startswith("audio_tower.")}
    assert_same(parameters(encoder), expected)


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_qwen3_moe_folder_is_an_llm(is_tied, tmp_path):
    """Same logits on text as transformers' own Qwen3MoeForCausalLM."""
    text = micro_model().text
    torch.manual_seed(0)
    qwen = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            intermediate_size=text.moe_intermediate_size,
            moe_intermediate_size=text.moe_intermediate_size,
            num_hidden_layers=text.num_hidden_layers,
            num_attention_heads=text.num_attention_heads,
            num_key_value_heads=text.num_key_value_heads,
            head_dim=text.head_dim,
            num_experts=text.num_experts,
            num_experts_per_tok=text.num_experts_per_tok,
            norm_topk_prob=True,
            rms_norm_eps=text.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": text.rope_theta},
            tie_word_embeddings=is_tied,
        )
    ).eval()
    with torch.no_grad():
        for parameter in qwen.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    qwen.save_pretrained(tmp_path)
    module = thinker(seed=2).eval()
    assert load_components(compose(module), tmp_path, {"llm"}) == {"llm"}
    ids = torch.randint(0, 300, (1, 20))
    module.config.text_config._attn_implementation_internal = "sdpa"
    with torch.no_grad():
        found, expected = module(input_ids=ids, use_cache=False).logits, qwen(ids, use_cache=False).logits
    assert (found - expected).abs().max() < 1e-5 < expected.abs().max()


def test_a_qwen3_vl_folder_has_the_vision_encoder(tmp_path):
    vision = micro_model().vision
    sizes = {
        name: getattr(vision, name)
        for name in ("depth", "hidden_size", "intermediate_size", "num_heads", "num_position_embeddings", "patch_size")
    }
    vision_config = {**sizes, "deepstack_visual_indexes": [0, 1], "out_hidden_size": 32}
    text_config = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": 320,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
    }
    stock = Qwen3VLForConditionalGeneration(Qwen3VLConfig(vision_config=vision_config, text_config=text_config))
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    stock.save_pretrained(tmp_path)
    visual = torch.nn.Module()
    visual.visual = build_encoder(micro_model(), "vision", seed=3)
    assert load_components(visual, tmp_path, {"vision_encoder"}) == {"vision_encoder"}
    pixels, grid = torch.randn(16, 3 * 2 * 4 * 4), torch.tensor([[1, 4, 4]])
    visual.visual.config._attn_implementation_internal = "sdpa"
    with torch.no_grad():
        found = visual.visual(pixels, grid_thw=grid).last_hidden_state
        expected = stock.model.visual(pixels, grid_thw=grid).last_hidden_state
    assert (found - expected).abs().max() < 1e-5 < expected.abs().max()


def broken(source, folder, change):
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    change(state)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "qwen3_moe"}')
    return folder


def test_a_missing_tensor_is_named(source, tmp_path):
    folder = broken(source, tmp_path, lambda state: state.pop("model.language_model.layers.1.mlp.gate.weight"))
    message = (
        "has no tensor 'model.layers.1.mlp.gate.weight' of component llm; it is a folder of model type 'qwen3_moe'"
    )
    with pytest.raises(ConfigError, match=message):
        load_components(compose(thinker(seed=2)), folder, {"llm"})


def test_a_wrong_shape_is_named(source, tmp_path):
    def widen(state):
        state["model.audio_tower.proj2.weight"] = torch.zeros(64, 32)

    message = r"'audio_tower.proj2.weight' is \[64, 32\] in .*, the model needs \[32, 32\]; choose the preset"
    with pytest.raises(ConfigError, match=message):
        load_components(compose(thinker(seed=2)), broken(source, tmp_path, widen), {"audio_adapter"})


def test_too_few_experts_are_a_wrong_shape(source, tmp_path):
    source.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state = {name: tensor for name, tensor in state.items() if ".experts.3." not in name}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"experts.* is \[3, .* the model needs \[4, "):
        load_components(compose(thinker(seed=2)), tmp_path, {"llm"})


def test_a_smaller_vocabulary_fills_the_first_rows(source, tmp_path):
    """Qwen3's folders have 151,936 rows, Qwen3-Omni 152,064; a larger vocabulary than the model's is refused."""
    rows = ("model.language_model.embed_tokens.weight", "lm_head.weight")

    def cut(state):
        state |= {name: state[name][:300].clone() for name in rows}

    module = compose(thinker(seed=2))
    before = parameters(module)
    load_components(module, broken(source, tmp_path, cut), {"llm"})
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        found = parameters(module)[name]
        assert torch.equal(found[:300], parameters(source)[name][:300]) and torch.equal(found[300:], before[name][300:])

    def grow(state):
        state["lm_head.weight"] = torch.zeros(330, 32)

    with pytest.raises(ConfigError, match=r"'lm_head.weight' is \[330, 32\] in .*, the model needs \[320, 32\]"):
        load_components(module, broken(source, tmp_path, grow), {"llm"})


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no .*safetensors file in .*; give a local transformers folder"):
        WeightFolder(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "thinker.model.language_model.layers.0.mlp.gate.weight",
        "model.language_model.layers.0.mlp.gate.weight",
        "llm.model.layers.0.mlp.gate.weight",
        "model.layers.0.mlp.gate.weight",
    ],
)
def test_spellings_of_one_parameter(name):
    assert canonical(name) == "model.layers.0.mlp.gate.weight"
    tower = name.replace("language_model.", "").replace("layers.0.mlp.gate", "visual.pos_embed").replace("llm.", "")
    assert canonical(tower) == "visual.pos_embed.weight"
    assert canonical("towers.audio_tower.proj1.bias") == "audio_tower.proj1.bias"
    assert canonical("talker.model.layers.0.mlp.gate.weight") == "talker.model.layers.0.mlp.gate.weight"
