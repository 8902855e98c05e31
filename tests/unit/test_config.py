"""The configuration: every file composes, every wrong value is named with its rule and a fix."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from omni_train import config as configuration
from omni_train.config import COMPONENTS, CONF_DIR, TRAINABLE, ConfigError, load, nearest_key, to_dict
from omni_train.run import changed_keys, load_recipe, stage_overrides

RECIPES = CONF_DIR.parent / "recipes"


def test_every_stage_composes() -> None:
    stages = configuration.available()
    assert len(stages) == len(list(CONF_DIR.glob("*.yaml"))) >= 7
    for stage in stages:
        config = load(stage, [])
        assert config.stage.name == stage
        assert type(config.stage.components) is dict and type(config.stage.betas) is list


def test_every_file_of_every_group_composes() -> None:
    groups = sorted(path.name for path in CONF_DIR.iterdir() if path.is_dir())
    assert {"model", "corpus", "mixture", "validation", "engine"} == set(groups)
    count = len(configuration.available())
    for group in groups:
        for name in configuration.available(group):
            is_listed = f"- {group}:" in (CONF_DIR / "s2_general.yaml").read_text()
            load("s2_general", [f"{'' if is_listed else '+'}{group}={name}", "data.lanes=8"])
            count += 1
    assert count == len(list(CONF_DIR.rglob("*.yaml"))) >= 24


@pytest.mark.parametrize("name", configuration.available("corpus"))
def test_one_override_moves_every_stage_to_another_corpus(name: str) -> None:
    corpus = configuration.load_corpus(name)
    trained: set[str] = set()
    for stage in configuration.available():
        config = load(stage, [f"corpus={name}"])
        assert config.data.root == corpus.root == f".cache/corpus/{name}/current"
        assert config.data.tokenizer == f"{corpus.root}/tokenizer"
        assert config.model.text.vocab_size == corpus.vocab_size
        sources = {pattern for source in config.mixture.values() for pattern in source.shards}
        watched = {pattern for source in config.validation.values() for pattern in source.shards}
        watched = {pattern.replace("validation/", "train/") for pattern in watched}
        if stage.startswith("thinker_"):  # they watch what they do not train, too
            assert sources < watched or sources == watched
        else:
            assert sources == watched
        trained |= sources
    folders = {pattern.split("/")[1] for pattern in trained}
    card = yaml.safe_load((CONF_DIR.parent / "data" / name / "card.yaml").read_text())
    assert folders == {source for source, (in_train, *_) in card["sources"].items() if in_train}


def test_a_corpus_leaves_what_is_overridden_beside_it() -> None:
    config = load("s2_general", ["corpus=tuxpaint", "mixture=s2", "~validation", "data.root=elsewhere"])
    assert config.data.tokenizer == "elsewhere/tokenizer" and config.validation == {}
    assert config.mixture["text"].shards == ["text/*.tar"]
    with pytest.raises(ConfigError, match="no corpus is called 'tyni'; did you mean 'tiny'"):
        configuration.load_corpus("tyni")


def test_every_recipe_composes_with_all_of_its_stages() -> None:
    paths = sorted(RECIPES.glob("*.yaml"))
    assert len(paths) >= 2
    for path in paths:
        recipe = load_recipe(path)
        assert recipe.stages
        for stage in recipe.stages:
            config = load(stage.stage, stage_overrides(recipe, stage, Path("runs/x"), []))
            assert config.run_dir == f"runs/x/{stage.stage}"


@pytest.mark.parametrize(
    "override, parts",
    [
        ("stag.context=3", ["unknown key 'stag.context'", "did you mean 'stage.context'"]),
        ("engin=cpu2", ["'engin'", "did you mean 'engine'"]),
        ("+satge=s2", ["'satge'", "did you mean 'stage'"]),
        ("model.text.hiden_size=3", ["did you mean 'model.text.hidden_size'"]),
        ("mixture.text.wieght=3", ["did you mean 'mixture.*.weight'"]),
        ("+stage.components.llm.lrr=1", ["'lrr'", "did you mean 'stage.components.*.lr'"]),
        ("qqqqqqq=3", ["'qqqqqqq'", "top-level keys: stage, model"]),
        ("model", ["'model'", "EQUAL"]),
        ("stage.context=many", ["stage.context: ", "'many'", "Integer"]),
        ("engine.precision=fp16", ["engine.precision: ", "fp32, bf16"]),
        ("engine=cpu3", ["no engine preset is called 'cpu3'", "did you mean 'cpu"]),
        ("stage.components.llm.lr=0", ["lr (0.0) must be positive", "leave it out"]),
        ("model.text.mrope_section=[6,5,4]", ["must sum to head_dim / 2 = 16"]),
        ("data.lanes=1", ["data.lanes (1)", "try data.lanes=2"]),
        ("engine.expert_parallel=16", ["must divide model.text.num_experts (8)", "try 8"]),
        ("+init.audo_encoder=x", ["'audo_encoder'", "did you mean 'audio_encoder'"]),
        ("+stage.components.talker.lr=1e-3", ["does not train 'talker'", "its components: llm, audio_encoder"]),
        ("stage.yarn_factor=0.5", ["stage.yarn_factor (0.5)"]),
        ("data.resume_policy=lax", ["data.resume_policy 'lax'", "strict"]),
    ],
)
def test_a_wrong_override_is_named_with_its_fix(override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load("s2_general", [override])
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_sources_and_components_can_be_added_changed_and_removed() -> None:
    config = load(
        "s1_adapters",
        [
            "+mixture.more={shards: [more/*.tar], weight: 0.25, max_epochs: 2}",
            "mixture.speech.weight=0.75",
            "~mixture.pictures",
            "~mixture.digits",
            "+stage.components.audio_encoder.lr=3e-4",
            "~stage.components.vision_adapter",
        ],
    )
    assert {name: source.weight for name, source in config.mixture.items()} == {"speech": 0.75, "more": 0.25}
    assert config.mixture["more"].shards == ["more/*.tar"] and config.mixture["more"].max_epochs == 2
    assert {name: value.lr for name, value in config.stage.components.items()} == {
        "audio_adapter": 2e-3,
        "audio_encoder": 3e-4,
    }
    assert type(config.mixture["more"]) is configuration.SourceConfig


@pytest.mark.parametrize("corpus", [[], ["corpus=tuxpaint"]])
def test_validation_sources_can_be_added_changed_and_removed(corpus: list[str]) -> None:
    before = load("s2_general", corpus).validation
    more = "+validation.more={shards: [more/*.tar], layout: pairs, prompt: 'what?'}"
    after = load("s2_general", [*corpus, "~validation.text", "validation.audio.shards=[mine/*.tar]", more]).validation
    assert set(after) == set(before) - {"text"} | {"more"}
    assert {type(source) for source in after.values()} == {configuration.ShardsConfig}
    assert after["audio"].shards == ["mine/*.tar"] and after["image"] == before["image"]
    assert (after["more"].layout, after["more"].prompt) == ("pairs", "what?")
    assert load("s2_general", [*corpus, "~validation", more]).validation == {"more": after["more"]}
    assert load("s2_general", [*corpus, "validation=tiny_text"]).validation == load("text_pretrain", []).validation


def test_nearest_key_prefers_the_owner_that_was_named() -> None:
    assert nearest_key("model.audio.hiden_size") != nearest_key("stage.contxt")
    assert nearest_key("model.vision.hiden_size") == "did you mean 'model.vision.hidden_size'?"
    assert nearest_key("data.sed") == "did you mean 'data.seed'?"


def test_trainable_components_are_components() -> None:
    assert {name for names in TRAINABLE.values() for name in names} <= set(COMPONENTS)
    assert set(TRAINABLE) == set(configuration.Objective)


def test_to_dict_survives_yaml_and_names_enums() -> None:
    values = to_dict(load("aut_pretrain", []))
    assert yaml.safe_load(yaml.safe_dump(values)) == values
    assert values["stage"]["objective"] == "transcription" and values["engine"]["precision"] == "fp32"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("wandb_mode=onlin", "wandb_mode 'onlin' is unknown; did you mean 'online'"),
        ("save_every_steps=0", "save_every_steps and keep_checkpoints must be at least 1"),
    ],
)
def test_what_would_fail_after_a_step_fails_at_once(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load("s2_general", [override])


def test_changed_keys_name_what_changes_a_run_and_nothing_else() -> None:
    before = to_dict(load("s2_general", []))
    harmless = ["save_every_steps=1", "engine.threads=2", "wandb_mode=disabled", "run_dir=elsewhere", "eval_tokens=5"]
    assert changed_keys(before, to_dict(load("s2_general", harmless))) == {}
    real = ["stage.context=1024", "stage.components.llm.lr=1", "~mixture.text", "+init.llm=x"]
    assert changed_keys(before, to_dict(load("s2_general", real))) == {
        "stage.context": (512, 1024),
        "stage.components.llm.lr": (1e-3, 1.0),
        "mixture.text": (before["mixture"]["text"], None),
        "init.llm": (None, "x"),
    }


def test_a_field_that_an_older_run_did_not_know_is_no_change() -> None:
    now = to_dict(load("s2_general", []))
    before = {**now, "stage": {key: value for key, value in now["stage"].items() if key != "grad_clip"}}
    assert changed_keys(before, now) == {}


def test_an_error_that_is_its_own_cause_is_explained_all_the_same() -> None:
    """OmegaConf raises so under a debugger or coverage."""
    error = ValueError("stage.context must be positive")
    error.__cause__ = error
    assert configuration.explain(error) == "stage.context must be positive"


@pytest.mark.parametrize("stage", ["thinker_gspo", "thinker_distill_on"])
def test_what_learns_from_answers_trains_the_llm(stage: str) -> None:
    with pytest.raises(ConfigError, match="lacks 'llm'.*add stage.components.llm"):
        load(stage, ["~stage.components.llm"])
    with pytest.raises(ConfigError, match="lacks 'talker'.*add stage.components.talker"):
        load("talker_cpt", ["~stage.components.talker"])


def test_the_thinker_is_short_for_its_components() -> None:
    init = {"thinker": "t", "audio_encoder": "a", "all": "w"}
    found = {name: configuration.init_of(init, name) for name in ("llm", "audio_encoder", "talker")}
    assert found == {"llm": "t", "audio_encoder": "a", "talker": "w"}
    assert configuration.init_of({"thinker": "t"}, "talker") is None
    with pytest.raises(ConfigError, match="init: no component is called 'thinkr'; did you mean 'thinker'"):
        load("s2_general", ["+init.thinkr=x"])
