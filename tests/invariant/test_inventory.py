"""What each stage trains: by name against the stage table, by hash of the weights, by every parameter's gradient."""

from __future__ import annotations

import pytest
import torch
from support import (
    Case,
    Ranks,
    component_hashes_of,
    make_trainer,
    packs_of_rank,
    run_config_in,
    run_ranks,
    tokenizer_folder,
)

from omni_train import config as configuration
from omni_train.data.tokenizer import load_tokenizer, token_ids
from omni_train.models.components import freeze_all_but
from omni_train.stage import build_modules

SPEECH = {"talker", "mtp"}
LLM, AUDIO, VISION = "llm", {"audio_encoder", "audio_adapter"}, {"vision_encoder", "vision_adapter"}
# Stage → (what trains, what is there and frozen).
TABLE: dict[str, tuple[set[str], set[str]]] = {
    "text_pretrain": ({LLM}, set()),
    "aut_pretrain": ({"audio_encoder", "aut_decoder"}, {"audio_adapter"}),
    "vision_pretrain": ({"vision_encoder", "vision_decoder"}, {"vision_adapter"}),
    "s1_adapters": ({"audio_adapter", "vision_adapter"}, {LLM, "audio_encoder", "vision_encoder"}),
    "s1_encoders": (AUDIO | VISION, {LLM}),
    "s2_general": ({LLM} | AUDIO | VISION, set()),
    "s3_long_context": ({LLM} | AUDIO | VISION, set()),
    "talker_pretrain": (SPEECH, {LLM} | AUDIO | VISION),
    "talker_cpt": (SPEECH, {LLM} | AUDIO | VISION),
    "talker_dpo": (SPEECH, {LLM} | AUDIO | VISION),
    "talker_speaker": (SPEECH, {LLM} | AUDIO | VISION),
    "codec": ({"codec_encoder", "codec_decoder"}, set()),
    "code2wav": ({"code2wav"}, {"codec_encoder"}),
    **dict.fromkeys(
        ("thinker_sft", "thinker_distill_off", "thinker_distill_on", "thinker_gspo"), ({LLM} | AUDIO | VISION, set())
    ),
}
OWN_STEPS = ("codec", "code2wav", "thinker_distill_off", "thinker_distill_on", "thinker_gspo")
"""Stages whose packs come of waves, a teacher or rollouts; their steps are in test_codec_stages, test_post_training."""
# Part of a parameter's name → its component, first match wins; written apart from the patterns of the code.
PARTS = (
    ("codec_encoder.", "codec_encoder"),
    ("codec_decoder.", "codec_decoder"),
    ("code2wav.", "code2wav"),
    ("code_predictor.", "mtp"),
    ("talker.", "talker"),
    ("audio_tower.proj1.", "audio_adapter"),
    ("audio_tower.proj2.", "audio_adapter"),
    ("audio_tower.", "audio_encoder"),
    ("visual.merger.", "vision_adapter"),
    ("visual.merger_list.", "vision_adapter"),
    ("visual.", "vision_encoder"),
    ("audio_decoder.", "aut_decoder"),
    ("vision_decoder.", "vision_decoder"),
    ("model.embed_tokens.", LLM),
    ("model.layers.", LLM),
    ("model.norm.", LLM),
    ("lm_head.", LLM),
)
KINDS = {"transcription": ("audio", "short_audio"), "captioning": ("image", "image")}
KINDS_OF_STAGE = {"text_pretrain": ("text", "text")}
MIXED = ("image", "audio", "video", "short_audio", "image_audio", "text")


def component(name: str) -> str:
    return next(component for part, component in PARTS if part in name)


def stage_case(stage: str, **changes) -> Case:
    """The stage of conf/ on the micro model: its objective and components, without weight decay."""
    config = configuration.load(stage, [])
    objective = config.stage.objective.name
    kinds = KINDS_OF_STAGE.get(stage, KINDS.get(objective, MIXED))
    settings = {"kinds": kinds, "components": tuple(config.stage.components), "objective": objective}
    settings |= {"weight_decay": 0.0, "router_aux_coef": config.stage.router_aux_coef, "world": 2}
    settings |= {"ctc_weight": config.stage.ctc_weight}
    return Case(**settings | {"expert_parallel": 2} | changes)


def test_every_stage_stands_in_the_table():
    assert set(configuration.available()) == set(TABLE)


@pytest.mark.parametrize("stage", TABLE)
def test_trainable_inventory(stage):
    config = configuration.load(stage, [f"data.tokenizer={tokenizer_folder()}"])
    modules = build_modules(config, load_tokenizer(tokenizer_folder()))
    inventory = freeze_all_but(modules.values(), config.stage.components)
    trained, frozen = TABLE[stage]
    assert {line.component for line in inventory if line.is_trained} == trained
    assert {line.component for line in inventory if not line.is_trained} == frozen
    parameters = {f"{key}.{name}": p for key, module in modules.items() for name, p in module.named_parameters()}
    assert {n for n, p in parameters.items() if p.requires_grad} == {n for n in parameters if component(n) in trained}
    for line in inventory:
        assert line.num_parameters == sum(p.numel() for n, p in parameters.items() if component(n) == line.component)
        assert line.lr == (config.stage.components[line.component].lr if line.is_trained else 0.0)
    if "vision_adapter" in trained:
        levels = len(config.model.vision.deepstack_visual_indexes)
        assert {n.split("merger_list.")[1][0] for n in parameters if "merger_list." in n} == set("0123456789"[:levels])


# Hashes and gradients, on two ranks.


def one_step(ranks: Ranks, case: Case, folder: str) -> dict:
    """Hashes by component before and after a step, and which parameters got a gradient on this rank.

    An expert counts as a parameter of its own: its name ends in its global number.
    """
    config = run_config_in(case, folder)
    packs = packs_of_rank(case, config, token_ids(load_tokenizer(folder)), 0, ranks.rank)
    trainer = make_trainer(config, ranks, len(packs))
    before = component_hashes_of(trainer)
    largest: dict[str, float] = {}

    def watch(name: str, parameter: torch.nn.Parameter) -> None:
        first = parameter.shape[0] * (ranks.rank % case.expert_parallel)
        parts = {name: slice(None)}
        if ".experts." in name:
            parts = {f"{name}.{first + n}": n for n in range(parameter.shape[0])}

        def note(grad: torch.Tensor) -> None:
            for key, part in parts.items():
                largest[key] = max(largest[key], float(grad[part].abs().max()))

        largest.update(dict.fromkeys(parts, 0.0))
        parameter.register_hook(note)

    for engine in trainer.stage.engines.values():
        for name, parameter in engine.module.named_parameters():
            if parameter.requires_grad:
                watch(name, parameter)
    metrics = trainer.step(packs)
    unseen = [] if trainer.fractions is None else (trainer.fractions == 0).nonzero().tolist()
    after = component_hashes_of(trainer)
    return {"before": before, "after": after, "gradients": largest, "unseen": unseen, "metrics": metrics}


def gradients(results: list[dict]) -> dict[str, float]:
    """The largest gradient of each parameter over the ranks."""
    names = {name for result in results for name in result["gradients"]}
    return {name: max(result["gradients"].get(name, 0.0) for result in results) for name in names}


@pytest.mark.parametrize("stage", [s for s in TABLE if s not in ("s3_long_context", *OWN_STEPS)])
def test_what_is_frozen_stays_bit_identical_and_what_trains_gets_gradients(stage):
    results = run_ranks(2, one_step, stage_case(stage), tokenizer_folder())
    trained, frozen = TABLE[stage]
    for result in results:
        assert set(result["before"]) == trained | frozen
        assert {name for name, digest in result["after"].items() if digest == result["before"][name]} == frozen
    found = gradients(results)
    assert {component(name) for name in found} == trained
    assert sorted(name for name, value in found.items() if value == 0.0) == []
    assert results[0]["unseen"] == []
    names = {name.removeprefix("towers.") for name in found}
    if "vision_adapter" in trained:
        assert {f"visual.merger_list.{n}.mlp.2.weight" for n in range(2)} <= names
    if "audio_adapter" in trained:
        assert {f"audio_tower.{p}.{kind}" for p in ("proj1", "proj2") for kind in ("weight", "bias")} <= names


def test_experts_that_saw_no_token_are_exactly_those_without_gradient():
    """One short text and 16 experts: some see nothing. The step's metrics count them.

    In the last layer a token without a label reaches no loss, so an expert that saw only such tokens has none either.
    """
    case = stage_case("text_pretrain", kinds=("text", "none"), num_experts=16)
    results = run_ranks(2, one_step, case, tokenizer_folder())
    unseen = results[0]["unseen"]
    assert 0 < len(unseen) < 3 * 16
    expected = {f"model.layers.{layer}.mlp.experts.{w}.{n}" for layer, n in unseen for w in ("w1", "w2", "w3")}
    without = {name for name, value in gradients(results).items() if value == 0.0}
    assert expected <= without
    assert all(name.startswith("model.layers.2.mlp.experts.") for name in without - expected)
    assert results[0]["metrics"]["moe/dead_experts"] == len(unseen)
