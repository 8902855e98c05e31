"""Every parameter belongs to exactly one component; freezing and optimizer groups follow the configuration."""

from __future__ import annotations

import re

import pytest
import torch
from support import Case, run_config, tokenizer_folder
from torch import nn

from omni_train.config import COMPONENTS, ComponentConfig, ConfigError, load
from omni_train.data.tokenizer import load_tokenizer
from omni_train.models.build import build_omni
from omni_train.models.components import PATTERNS, component_of, freeze_all_but, parameter_groups
from omni_train.models.weights import canonical
from omni_train.stage import build_modules


def names_of(case: Case) -> list[str]:
    modules = build_modules(run_config(case), load_tokenizer(tokenizer_folder()))
    return [name for module in modules.values() for name, _ in module.named_parameters()]


def meaning(name: str) -> str:
    """The component that a name says in words, written apart from the patterns."""
    if "audio_tower" in name:
        return "audio_adapter" if ".proj1." in name or ".proj2." in name else "audio_encoder"
    if "visual" in name:
        return "vision_adapter" if "merger" in name else "vision_encoder"
    return next((part for part in ("audio_decoder", "vision_decoder") if name.startswith(part)), "llm")


CASES = {
    "thinker": Case(),
    "llm alone": Case(components=("llm",)),
    "towers": Case(components=("audio_adapter",)),
    "aut": Case(components=("audio_encoder", "aut_decoder"), objective="transcription"),
    "captioner": Case(components=("vision_encoder", "vision_decoder"), objective="captioning"),
}


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_has_its_component(name):
    names = names_of(CASES[name])
    assert len(names) > 20
    for parameter in names:
        expected = {"audio_decoder": "aut_decoder"}.get(meaning(parameter), meaning(parameter))
        assert component_of(parameter) == expected, parameter


@pytest.mark.parametrize("name", CASES)
def test_only_an_adapter_lies_within_another_components_pattern(name):
    """First match wins, so a second match is allowed only where an adapter stands inside its tower."""
    for parameter in names_of(CASES[name]):
        matches = [component for component, pattern in PATTERNS if re.match(pattern, parameter)]
        assert matches in ([matches[0]], ["audio_adapter", "audio_encoder"], ["vision_adapter", "vision_encoder"])


def test_the_whole_model_has_components_of_the_configuration_only():
    omni = build_omni(load("s2_general", ["model=qwen3_omni_30b_a3b"]).model, device="meta")
    found = {component_of(canonical(name)) for name, _ in omni.named_parameters()}
    training_only = {"codec_encoder", "codec_decoder", "discriminator", "aut_decoder", "vision_decoder"}
    assert found == set(COMPONENTS) - training_only
    assert component_of("talker.code_predictor.lm_head.0.weight") == "mtp"
    assert component_of("talker.model.layers.0.mlp.gate.weight") == "talker"


def test_an_unknown_parameter_is_an_error():
    with pytest.raises(ConfigError, match="'teacher.weight' belongs to no component; add a pattern"):
        component_of("teacher.weight")


class _Tiny(nn.Module):
    """A model with an adapter, a tower and an LLM, 4 + 6 + 3 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.audio_tower = nn.Module()
        self.audio_tower.proj1 = nn.Linear(2, 2, bias=False)
        self.audio_tower.fc = nn.Linear(2, 2)
        self.model = nn.Module()
        self.model.norm = nn.LayerNorm(3, bias=False)


def test_inventory_and_groups_by_hand():
    module = _Tiny()
    components = {"audio_encoder": ComponentConfig(lr=1e-3, weight_decay=0.2), "llm": ComponentConfig(lr=1e-4)}
    inventory = freeze_all_but([module], components)
    assert [(i.component, i.num_parameters, i.is_trained, i.lr) for i in inventory] == [
        ("audio_adapter", 4, False, 0.0),
        ("audio_encoder", 6, True, 1e-3),
        ("llm", 3, True, 1e-4),
    ]
    assert not module.audio_tower.proj1.weight.requires_grad and module.audio_tower.fc.bias.requires_grad
    groups = parameter_groups(module, components)
    assert [(g["component"], g["lr"], g["weight_decay"], sum(p.numel() for p in g["params"])) for g in groups] == [
        ("audio_encoder", 1e-3, 0.0, 2),
        ("audio_encoder", 1e-3, 0.2, 4),
        ("llm", 1e-4, 0.0, 3),
    ]
    assert len({group["name"] for group in groups}) == len(groups)
    torch.optim.AdamW(groups)


def test_what_was_trained_before_is_frozen_again():
    module = _Tiny()
    freeze_all_but([module], {"llm": ComponentConfig(lr=1.0)})
    freeze_all_but([module], {"audio_adapter": ComponentConfig(lr=1.0)})
    assert [name for name, p in module.named_parameters() if p.requires_grad] == ["audio_tower.proj1.weight"]


def test_a_component_that_matches_nothing_is_an_error():
    with pytest.raises(
        ConfigError, match="stage.components.vision_encoder matches no parameter .*; did you mean 'audio"
    ):
        freeze_all_but([_Tiny()], {"vision_encoder": ComponentConfig(lr=1.0)})
