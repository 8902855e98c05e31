"""Recipes and run folders: what is checked before a stage starts, what is skipped, what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from omni_train import run as running
from omni_train.config import ConfigError, Control, RunConfig, load, origins_of, to_dict
from omni_train.evaluation.capabilities import Answers
from omni_train.measure import job_of_export, jobs_of_run, measure
from omni_train.recipe import load_recipe, stage_overrides
from omni_train.reporting.results import add_stage, load_results
from omni_train.run import check_origins, check_unchanged, stage_line, start_stage


def write_recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


TWO_STAGES = """
name: two
overrides: [model=tiny, engine=cpu1]
tasks:
  speech: [spoken_word]
stages:
  - stage: text_pretrain
    overrides: [stage.context=128]
  - stage: s2_general
    init: {llm: text_pretrain}
    evaluate:
      - {tasks: [spoken_word]}
      - {tasks: [spoken_word], of: text_pretrain, name: before}
"""


def half_done(folder: Path, *overrides: str) -> RunConfig:
    """A run folder as a killed stage leaves it, and its configuration."""
    config = load("s2_general", [f"run_dir={folder}", *overrides])
    (folder / "checkpoints" / "step_00000004").mkdir(parents=True)
    (folder / "checkpoints" / "step_00000004" / "COMMIT").write_text("4\n")
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    return config


def test_a_recipe_hands_each_stage_the_exports_it_names(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, TWO_STAGES))
    first, second = recipe.stages
    assert stage_overrides(recipe, first, Path("r"), ["seed=3"]) == [
        *("model=tiny", "engine=cpu1", "stage.context=128", "seed=3", "run_dir=r/text_pretrain")
    ]
    overrides = stage_overrides(recipe, second, Path("r"), [])
    assert overrides[-2:] == ["+init.llm=r/text_pretrain/export", "run_dir=r/s2_general"]
    assert load("s2_general", overrides).init == {"llm": "r/text_pretrain/export"}


@pytest.mark.parametrize(
    "before, after, parts",
    [
        ("stage: s2_general", "stage: s2_generl", ["no stage 's2_generl'", "did you mean 's2_general'"]),
        ("llm: text_pretrain", "llm: text_pretrian", ["s2_general.init.llm = 'text_pretrian'", "(text_pretrain)"]),
        ("overrides: [model", "overides: [model", ["recipe.yaml", "'overides'"]),
        ("- {tasks: [spoken_word]}", "- {tasks: [spoken_wrd]}", ["no task 'spoken_wrd'", "did you mean 'spoken_word'"]),
        ("of: text_pretrain", "of: text_pretrian", ["s2_general.evaluate", "'text_pretrian'", "'text_pretrain'"]),
        ("name: before", "name: before, by_lang: true", ["recipe.yaml", "s2_general.evaluate.by_lang", "'before'"]),
        ("name: two", "name: two\nbaseline: s2_generl", ["recipe.yaml", "baseline 's2_generl'", "mean 's2_general'"]),
        ("name: before", "max_new_tokens: 0", ["recipe.yaml", "evaluate.max_new_tokens (0)", "for 24"]),
    ],
)
def test_a_wrong_recipe_names_file_key_and_choice(tmp_path: Path, before: str, after: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(write_recipe(tmp_path, TWO_STAGES.replace(before, after, 1)))
    for part in parts:
        assert part in str(caught.value)


SPEECH = """
name: speech
overrides: [model=tiny, engine=cpu1]
tasks:
  talk: [talker]
data:
  codes: {codec: codec, only: "*/talk/*.tar"}
  pairs: {of: codes, talker: talker_pretrain, through: code2wav, judge: aut_pretrain, only: "*/talk/*.tar"}
stages:
  - stage: aut_pretrain
  - stage: codec
  - stage: code2wav
    init: {codec_encoder: codec}
  - stage: talker_pretrain
    data: codes
    evaluate: [{tasks: [talker], through: code2wav}]
  - stage: talker_dpo
    data: pairs
    init: {talker: talker_pretrain, mtp: talker_pretrain}
"""


@pytest.mark.parametrize(
    "before, after, parts",
    [
        ("    data: codes\n", "    data: code\n", ["talker_pretrain", "no data 'code'", "did you mean 'codes'"]),
        ("of: codes", "of: cods", ["for stage talker_dpo", "no data 'cods'", "did you mean 'codes'"]),
        ("of: codes", "of: pairs", ["for stage talker_dpo", "no data 'pairs'"]),
        ("codec: codec,", "codec: talker_dpo,", ["data.codes.codec 'talker_dpo' is no stage before talker_pretrain"]),
        ("codec: codec,", "codec: codec, heat: [1.0],", ["'heat' and 'margin' are of pairs"]),
        (", judge: aut_pretrain", "", ["'talker', 'through' and 'judge'", "it has talker, through"]),
        ("through: code2wav}]", "through: code2wv}]", ["talker_pretrain.evaluate", "did you mean 'code2wav'"]),
    ],
)
def test_wrong_data_of_a_recipe_is_named(tmp_path: Path, before: str, after: str, parts: list[str]) -> None:
    assert before in SPEECH
    with pytest.raises(ConfigError) as caught:
        load_recipe(write_recipe(tmp_path, SPEECH.replace(before, after, 1)))
    for part in parts:
        assert part in str(caught.value)


def test_data_is_made_before_the_stage_that_trains_on_it_and_again_when_its_maker_was_trained_anew(
    tmp_path: Path, monkeypatch
) -> None:
    recipe = load_recipe(write_recipe(tmp_path, SPEECH))
    commands: list[list[str]] = []

    def run_ranks(command: list[str], *_) -> int:
        commands.append(command)
        Path(command[command.index("--out") + 1]).mkdir(parents=True)  # as `data codes` does; it must not be there
        return 0

    monkeypatch.setattr("omni_train.launching.local.run_ranks", run_ranks)
    run_dir, corpus = tmp_path / "run", str(tmp_path / "corpus")
    for stage in recipe.stages[:-1]:
        (run_dir / stage.stage).mkdir(parents=True)
        (run_dir / stage.stage / "DONE").touch()
    last = recipe.stage("talker_dpo")
    own = stage_overrides(recipe, last, run_dir, [])
    assert f"data.root={run_dir}/data/pairs" in own
    config = load("talker_dpo", own)

    def made() -> list[str]:
        commands.clear()
        assert running.make_data(recipe, last, config, run_dir, {"codec": corpus}, own) == 0
        return [command[1] for command in commands]

    assert made() == ["codes", "pairs"]
    codes, pairs = commands
    assert codes[2:4] == [corpus, "--out"] and codes[-2:] == ["--codec", f"{run_dir}/codec/export"]
    assert pairs[2] == f"{run_dir}/data/codes" and pairs[-len(own) :] == own
    assert f"{run_dir}/aut_pretrain/export" == pairs[pairs.index("--judge") + 1]
    assert "--heat" not in pairs and "--margin" not in pairs, "the command's own, unless the recipe says more"
    assert made() == []
    done = run_dir / "code2wav" / "DONE"
    os.utime(done, ns=(0, done.stat().st_mtime_ns + 1))
    assert made() == ["pairs"]
    recipe.data["pairs"].heat = [1.0, 0.5]
    assert made() == ["pairs"] and commands[0][commands[0].index("--heat") :][:3] == ["--heat", "1.0", "0.5"]
    (run_dir / "talker_dpo").mkdir()
    (run_dir / "talker_dpo" / "DONE").touch()
    assert made() == [], "a finished stage needs no data"
    os.utime(done, ns=(0, done.stat().st_mtime_ns + 1))
    with pytest.raises(ConfigError, match="made by talker, through, judge before one of them was trained anew"):
        made()


def test_a_talker_without_code2wav_is_refused_before_it_trains(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, SPEECH.replace(", through: code2wav}]", "}]")))
    exported(tmp_path / "run", "talker_pretrain")
    with pytest.raises(ConfigError, match="talker_pretrain is heard through Code2Wav"):
        jobs_of_run(recipe, tmp_path / "run", "talker_pretrain", [])


def test_a_missing_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no recipe 'recipes/tyni.yaml'; did you mean 'recipes/tiny.yaml'"):
        load_recipe(Path("recipes/tyni.yaml"))


def test_a_half_done_stage_goes_on_with_the_same_configuration(tmp_path: Path) -> None:
    half_done(tmp_path)
    harmless = ["save_every_steps=7", "engine.threads=2", "eval_tokens=9"]
    check_unchanged(load("s2_general", [f"run_dir={tmp_path}", *harmless]))


def test_a_half_done_stage_refuses_another_configuration(tmp_path: Path) -> None:
    half_done(tmp_path)
    with pytest.raises(ConfigError) as caught:
        check_unchanged(load("s2_general", [f"run_dir={tmp_path}", "stage.context=1024", "seed=1"]))
    for part in (str(tmp_path), "half-done", "stage.context (512 → 1024)", "seed (0 → 1)", "another run_dir"):
        assert part in str(caught.value)


def test_the_mixture_may_change_where_the_policy_allows_it(tmp_path: Path) -> None:
    half_done(tmp_path)
    changed = [f"run_dir={tmp_path}", "mixture.text.weight=0.9"]
    with pytest.raises(ConfigError, match="mixture.text.weight"):
        check_unchanged(load("s2_general", changed))
    check_unchanged(load("s2_general", [*changed, "data.resume_policy=reweight"]))


def test_a_stage_whose_origin_was_trained_anew_says_so(tmp_path: Path) -> None:
    origin = tmp_path / "s1_encoders"
    (origin / "export").mkdir(parents=True)
    (origin / "DONE").write_text('{"time_ns": 1}')
    own = [f"run_dir={tmp_path}/s2_general", f"+init.all={origin}/export"]
    config = load("s2_general", own)
    check_origins(config)  # never started
    (tmp_path / "s2_general").mkdir()
    (tmp_path / "s2_general" / "origins.json").write_text(json.dumps(origins_of(config.init)))
    (origin / "DONE").write_text('{"time_ns": 2}')
    check_origins(config)  # killed before its first checkpoint: starts anew
    (tmp_path / "s2_general" / "DONE").touch()
    with pytest.raises(ConfigError, match="was trained from '.*s1_encoders/export' as it was before"):
        check_origins(config)
    (origin / "DONE").write_text('{"time_ns": 1}')
    check_origins(config, [f"{origin}/export"])
    (origin / "DONE").unlink()
    check_origins(config)  # nobody will make it
    with pytest.raises(ConfigError, match="move '.*s2_general' away"):
        check_origins(config, [f"{origin}/export"])


def test_a_folder_without_a_checkpoint_starts_anew(tmp_path: Path) -> None:
    half_done(tmp_path)
    (tmp_path / "checkpoints" / "step_00000004" / "COMMIT").unlink()
    check_unchanged(load("s2_general", [f"run_dir={tmp_path}", "stage.context=1024"]))


def test_a_finished_stage_is_skipped_and_not_silently_when_it_would_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    config = half_done(tmp_path)
    (tmp_path / "DONE").write_text("{}\n")
    monkeypatch.setattr("omni_train.launching.local.run_ranks", lambda *_: pytest.fail("a rank was started"))
    assert start_stage(config, []) == 0
    assert "s2_general: finished before" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="finished stage of another configuration: stage.context"):
        start_stage(load("s2_general", [f"run_dir={tmp_path}", "stage.context=1024"]), [])


def test_a_stage_is_started_on_its_ranks_and_its_status_returned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr("omni_train.launching.local.run_ranks", lambda *call: calls.append(call) or 85)
    monkeypatch.setattr(running, "check_inputs", lambda config: None)
    config = load("s2_general", [f"run_dir={tmp_path}", "engine.threads=3"])
    assert start_stage(config, ["s2_general", "engine.threads=3"]) == 85
    assert calls == [(["train", "s2_general", "engine.threads=3"], config.engine)]


def test_stage_line_is_one_compact_line() -> None:
    stage = {"name": "s2", "tokens": 12_345, "seconds": 67.8, "loss": {"text": 1.23456, "audio": 0.5}}
    assert stage_line({"stages": [stage]}, "s2") == "  s2: 12,345 tokens in 68 s; held-out loss: text 1.235 audio 0.500"
    later = {"name": "s3", "tokens": 1, "seconds": 1.0, "loss": {"text": 1.2, "chat": 2.0}}
    line = stage_line({"stages": [stage, later]}, "s3", baseline="s2")
    assert line.endswith("held-out loss, change since s2: text 1.200 (−2.8 %) chat 2.000")


def test_a_recipe_prints_later_losses_beside_its_baseline(tmp_path: Path, monkeypatch, capsys) -> None:
    for name in ("check_inputs", "start_stage", "evaluate_stage"):
        monkeypatch.setattr(running, name, lambda *_: 0)
    run_dir = tmp_path / "run"
    add_stage(run_dir, {"name": "text_pretrain", "tokens": 1, "seconds": 1.0, "loss": {"text": 4.0}})
    add_stage(run_dir, {"name": "s2_general", "tokens": 1, "seconds": 1.0, "loss": {"text": 5.0}})
    recipe = write_recipe(tmp_path, TWO_STAGES + "baseline: text_pretrain\n")
    assert running.run(recipe, [f"run_dir={run_dir}"]) == 0
    printed = capsys.readouterr().out
    assert "change since text_pretrain: text 5.000 (+25.0 %)" in printed
    assert "Held-out loss against text_pretrain" in printed
    assert "+25.0 %" in (run_dir / "report.html").read_text()


def test_a_run_folder_is_held_by_one_command_at_a_time(tmp_path: Path) -> None:
    with running.held(tmp_path / "run"), pytest.raises(ConfigError, match="another command is training in"):
        with running.held(tmp_path / "run"):
            pytest.fail("held twice")
    with running.held(tmp_path / "run"):
        pass


def exported(run_dir: Path, stage: str, model_type: str = "qwen3_omni_moe_thinker") -> Path:
    """An export folder as far as measurements look at it before they start."""
    folder = run_dir / stage / "export"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def test_a_recipe_measures_what_its_finished_stages_list(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, TWO_STAGES))
    with pytest.raises(ConfigError, match="no export of a stage that recipe 'two' measures"):
        jobs_of_run(recipe, tmp_path / "run", None, [])
    exported(tmp_path / "run", "s2_general")
    (only,) = jobs_of_run(recipe, tmp_path / "run", None, [])
    assert only.config.stage.name == "s2_general" and only.tasks == {"spoken_word": "speech"}
    exported(tmp_path / "run", "text_pretrain")
    own, compared = jobs_of_run(recipe, tmp_path / "run", "s2_general", ["seed=4"])
    assert (own.measurement.name, compared.measurement.name) == ("", "before")
    assert compared.folder == tmp_path / "run" / "text_pretrain" / "export"
    assert compared.config.stage.name == "text_pretrain" and compared.config.seed == 4


def test_one_export_is_measured_by_the_stage_that_wrote_it(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, TWO_STAGES))
    options = {"stage": None, "tasks": None, "use_yarn": False, "window_sec": None}
    job = job_of_export(recipe, exported(tmp_path, "text_pretrain"), [], **options)
    assert job.config.stage.name == "text_pretrain" and job.config.stage.context == 128
    assert job.tasks == {"spoken_word": "speech"} and not job.measurement.use_yarn
    other = exported(tmp_path, "elsewhere")
    assert job_of_export(recipe, other, [], **options).config.stage.name == "s2_general"
    speech = load_recipe(write_recipe(tmp_path, SPEECH.replace("tasks:\n", "tasks:\n  speech: [spoken_word]\n")))
    job = job_of_export(speech, exported(tmp_path, "voice", "omni_train_code2wav"), [], **options)
    assert job.config.stage.name == "code2wav" and job.tasks == {"talker": "talk"}
    job = job_of_export(speech, exported(tmp_path, "ears", "omni_train_transcription"), [], **options)
    assert job.config.stage.name == "aut_pretrain" and job.tasks == {"spoken_word": "speech"}
    with pytest.raises(ConfigError, match="--window-sec has no effect"):
        job_of_export(recipe, other, [], **(options | {"window_sec": [1]}))


def test_answers_are_as_long_as_the_recipe_asks(tmp_path: Path) -> None:
    """24 tokens by default; of one export as many as any measurement of the recipe."""
    asks_more = TWO_STAGES.replace("name: before", "name: before, max_new_tokens: 48")
    options = {"stage": None, "tasks": None, "use_yarn": True, "window_sec": None}
    folder = exported(tmp_path / "run", "s2_general")
    exported(tmp_path / "run", "text_pretrain")
    for text, expected in ((TWO_STAGES, [24, 24, 24]), (asks_more, [24, 48, 48])):
        recipe = load_recipe(write_recipe(tmp_path, text))
        jobs = [*jobs_of_run(recipe, tmp_path / "run", None, []), job_of_export(recipe, folder, [], **options)]
        assert [job.measurement.max_new_tokens for job in jobs] == expected


def test_measure_writes_figures_by_language_beside_their_controls(tmp_path: Path, monkeypatch) -> None:
    by_lang = TWO_STAGES.replace("{tasks: [spoken_word]}", "{tasks: [spoken_word], by_lang: true, max_new_tokens: 5}")
    recipe = load_recipe(write_recipe(tmp_path, by_lang))
    exported(tmp_path / "run", "s2_general")
    asked = []

    def answer_tasks(config, folder, tasks, split, ranks, max_new_tokens, *, use_yarn, control):
        asked.append((tasks, split, max_new_tokens, control))
        yield Answers("spoken_word", [("un", "un"), ("x", "два")], [("un", "deux")], "", ["fr", "ru"], ["fr"])

    monkeypatch.setattr("omni_train.engine.parallel.start", lambda engine: SimpleNamespace(is_main=True))
    monkeypatch.setattr("omni_train.engine.parallel.stop", lambda: None)
    monkeypatch.setattr("omni_train.evaluation.capabilities.answer_tasks", answer_tasks)
    measure(jobs_of_run(recipe, tmp_path / "run", None, []), "heldout", tmp_path)
    assert asked == [({"spoken_word": "speech"}, "heldout", 5, Control.media_swapped)]
    results = load_results(tmp_path)
    assert results["capabilities"]["spoken_word_exact"] == 0.5 and results["controls"]["spoken_word_exact"] == 0.0
    assert results["by_lang"]["spoken_word_exact"] == {"fr": [1.0, 0.0], "ru": [0.0, None]}


def test_a_measured_stage_is_measured_again_only_when_the_recipe_asks_for_something_else(tmp_path, monkeypatch) -> None:
    recipe = load_recipe(write_recipe(tmp_path, TWO_STAGES))
    started: list[list[str]] = []
    monkeypatch.setattr("omni_train.launching.local.run_ranks", lambda command, *_: started.append(command) or 0)
    stage = recipe.stages[1]
    config = load("s2_general", ["engine=cpu1"])
    exported(tmp_path, "s2_general")
    done = tmp_path / "s2_general" / "DONE"
    done.touch()
    for _ in range(2):
        assert running.evaluate_stage(tmp_path / "recipe.yaml", stage, config, tmp_path, ["seed=1"]) == 0
    assert len(started) == 1 and started[0][:2] == ["eval", str(tmp_path)] and started[0][-1] == "seed=1"
    stage.evaluate.pop()
    assert running.evaluate_stage(tmp_path / "recipe.yaml", stage, config, tmp_path, []) == 0
    assert len(started) == 2
    assert running.evaluate_stage(tmp_path / "recipe.yaml", recipe.stages[0], config, tmp_path, []) == 0
    assert len(started) == 2, "nothing to measure"
    os.utime(done, ns=(0, done.stat().st_mtime_ns + 1))  # trained anew
    assert running.evaluate_stage(tmp_path / "recipe.yaml", stage, config, tmp_path, []) == 0
    assert len(started) == 3
