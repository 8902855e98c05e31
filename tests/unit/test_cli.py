"""The command line: help that teaches, one message on a user's error, tracebacks kept for bugs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from omni_train import cli
from omni_train.config import ConfigError, available


@pytest.fixture(autouse=True)
def started_by_a_person(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "OMNI_TRAIN_FAILURES", "OMNI_TRAIN_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)


def help_of(capsys, *command: str) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_shows_commands_with_examples(capsys) -> None:
    text = help_of(capsys)
    for command in cli.COMMANDS:
        assert f"    {command} " in text
    assert "omni-train run recipes/tiny.yaml" in text and "omni-train train s2_general" in text


def test_help_of_train_teaches_overrides_and_resuming(capsys) -> None:
    text = help_of(capsys, "train")
    words = " ".join(text.split())
    for stage in available():
        assert stage in words
    for example in ("'+mixture.more={shards:", "'~stage.components.", "+init.all=", "torchrun", "goes on", "status 85"):
        assert example in words


def test_help_of_run_teaches(capsys) -> None:
    text = help_of(capsys, "run")
    assert "run_dir=runs/second seed=1" in text and "goes on where it was stopped" in text


@pytest.mark.parametrize(
    "command",
    [
        ["train", "s2_generl"],
        ["run", "recipes/none.yaml"],
        ["eval", "no/such/export"],
        ["export", "no/such/run", "out"],
        ["data", "prepare", "tyni"],
        ["data", "check", "no/such/folder"],
    ],
)
def test_a_users_error_is_one_line_and_status_2(command: list[str], capsys) -> None:
    assert cli.main(command) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("omni-train: error: ") and captured.err.count("\n") == 1


def test_overrides_may_stand_before_and_behind_options(capsys) -> None:
    options = cli.parse(["eval", "run", "seed=1", "--recipe", "r.yaml", "engine=cpu1", "--split", "validation", "a=2"])
    assert (options.folder, options.overrides) == ("run", ["seed=1", "engine=cpu1", "a=2"])
    assert (options.recipe, options.split) == ("r.yaml", "validation")
    for command in (["eval", "run", "--recipy", "r"], ["export", "run", "folder", "a=1"]):
        with pytest.raises(SystemExit) as ended:
            cli.parse(command)
        assert ended.value.code == 2 and "unrecognized arguments" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    monkeypatch.setitem(cli.COMMANDS, "report", lambda *_: json.loads("{"))
    with pytest.raises(json.JSONDecodeError):
        cli.main(["report", "x"])


def test_a_users_error_keeps_its_traceback_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNI_TRAIN_TRACEBACK", "1")
    with pytest.raises(ConfigError):
        cli.main(["train", "s2_generl"])


def test_what_does_not_fit_a_launcher_is_said_at_once(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    for command, message in (
        (["run", "recipes/tiny.yaml"], "under torchrun run its stages one by one"),
        (["train", "s2_general"], "data.lanes (2) must be at least the number of ranks (4)"),
        (
            ["train", "s2_general", "data.lanes=8", "engine.num_processes=8", "engine.expert_parallel=8"],
            "engine.expert_parallel (8) must divide the number of processes (4)",
        ),
    ):
        assert cli.main(command) == 2
        assert message in capsys.readouterr().err


def test_an_interrupt_ends_quietly(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "report", interrupted)
    assert cli.main(["report", "x"]) == 130
    assert capsys.readouterr().err == ""


def test_checking_a_configuration_needs_no_heavy_import() -> None:
    code = (
        "import sys\nfrom omni_train.cli import main\nassert main(['train', 's2_general', 'data.contxt=1']) == 2\n"
        "print(sorted({'torch', 'transformers', 'deepspeed', 'wandb', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(cli.__file__).parents[1], check=False
    )
    assert done.stdout == "[]\n", done.stderr


def test_report_passes_the_bars_of_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    seen: dict[str, Any] = {}

    def write_report(run_dir: Path, bars: dict[str, float], baseline: str) -> Path:
        seen.update(bars=bars, baseline=baseline)
        return run_dir

    monkeypatch.setattr("omni_train.reporting.report.write_report", write_report)
    assert cli.main(["report", str(tmp_path), "--recipe", "recipes/tiny.yaml"]) == 0
    assert seen["bars"]["spoken_word_exact"] == 0.95 and seen["baseline"] == "s3_long_context"
