"""metrics.jsonl: valid lines, resumable, mirrored to wandb offline, written by one rank."""

from __future__ import annotations

import json
import logging
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from omni_train.reporting.metrics import MetricsWriter, flatten, has_wandb_key, read_metrics, truncate_metrics


def writer_of(folder: Path, **changes) -> MetricsWriter:
    options = {"wandb_project": None, "wandb_mode": "disabled", "config": {}, "is_writer": True} | changes
    return MetricsWriter(folder, **options)


def lines_of(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


@pytest.fixture
def no_wandb_key(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))


def test_a_record_is_one_flushed_line_with_the_step_first(tmp_path):
    writer = writer_of(tmp_path / "new")
    writer.log({"tokens": 512, "loss": {"text": 2.5}, "lr/llm": torch.tensor(0.25), "norm": np.float32(0.5)}, step=3)
    assert lines_of(tmp_path / "new") == ['{"step": 3, "tokens": 512, "loss/text": 2.5, "lr/llm": 0.25, "norm": 0.5}']
    writer.close()
    writer.close()


def test_what_is_not_finite_is_valid_json_and_comes_back(tmp_path):
    writer = writer_of(tmp_path)
    writer.log({"a": math.nan, "b": torch.tensor(math.inf), "c": [1.0, -math.inf]}, step=1)
    writer.close()
    strict = json.loads(lines_of(tmp_path)[0], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict == {"step": 1, "a": "nan", "b": "inf", "c": [1.0, "-inf"]}
    record = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert math.isnan(record["a"]) and record["b"] == math.inf and record["c"] == [1.0, -math.inf]


def test_a_killed_and_resumed_run_leaves_the_file_of_a_straight_run(tmp_path):
    straight = writer_of(tmp_path / "straight")
    for step in range(1, 7):
        straight.log({"loss": 1 / step}, step)
    straight.close()

    killed = writer_of(tmp_path / "resumed")
    for step in range(1, 6):
        killed.log({"loss": 1 / step if step < 4 else 99.0}, step)
    killed.close()
    with (tmp_path / "resumed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while it wrote
    resumed = writer_of(tmp_path / "resumed")
    resumed.truncate_after(3)
    for step in range(4, 7):
        resumed.log({"loss": 1 / step}, step)
    resumed.close()

    assert lines_of(tmp_path / "resumed") == lines_of(tmp_path / "straight")
    assert sorted(path.name for path in (tmp_path / "resumed").iterdir()) == ["metrics.jsonl"]


def test_a_run_killed_after_its_last_evaluation_repeats_that_line_alone(tmp_path):
    writer = writer_of(tmp_path)
    for record in ({"loss": 2.0}, {"eval/loss/text": 1.5}):
        writer.log(record, step=1)
    writer.truncate_after(1)
    writer.log({"eval/loss/text": 1.5}, step=1)
    writer.close()
    assert lines_of(tmp_path) == ['{"step": 1, "loss": 2.0}', '{"step": 1, "eval/loss/text": 1.5}']


def test_a_torn_line_does_not_swallow_the_next_record(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1]
    writer = writer_of(tmp_path)
    writer.log({"loss": 1.5}, step=2)
    writer.close()
    assert lines_of(tmp_path) == ['{"step": 1, "loss": 2.0}', '{"step": 2, "loss": 1.5}']


def test_a_missing_file_is_no_records(tmp_path):
    truncate_metrics(tmp_path / "metrics.jsonl", 3)
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_rank_that_does_not_write_leaves_no_trace(tmp_path):
    writer = writer_of(tmp_path / "run", is_writer=False, wandb_project="p", wandb_mode="offline")
    writer.log({"loss": 1.0}, 1)
    writer.truncate_after(0)
    writer.close()
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_when_wandb_has_ended(tmp_path, capsys):
    class Ended:
        def log(self, row):
            raise ConnectionResetError("gone")

    writer = writer_of(tmp_path)
    writer._wandb_run = Ended()
    for step in (1, 2):
        writer.log({"loss": 1.0}, step)
    writer.close()
    assert [row["step"] for row in read_metrics(writer.path)] == [1, 2]
    assert capsys.readouterr().err.count("wandb has ended (ConnectionResetError: gone)") == 1


def test_flatten_joins_with_slashes():
    assert flatten({"a": {"b": {"c": 1}, "d": 2}, "e/f": 3}) == {"a/b/c": 1, "a/d": 2, "e/f": 3}


def test_a_key_is_found_in_the_environment_and_in_netrc(no_wandb_key, monkeypatch, tmp_path):
    assert not has_wandb_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert has_wandb_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not has_wandb_key()
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert has_wandb_key()


class FakeRun:
    def __init__(self, **options):
        self.options, self.records, self.is_finished = options, [], False

    def define_metric(self, name, step_metric=None):
        pass

    def log(self, record):
        self.records.append(record)

    def finish(self):
        self.is_finished = True


class FakeWandb:
    """Stands for the wandb module: remembers its runs, refuses to go online when ``is_down``."""

    class Error(Exception):
        pass

    def __init__(self, is_down: bool = False):
        self.runs, self.is_down = [], is_down

    def Settings(self, **options):  # noqa: N802 (wandb's name)
        return options

    def init(self, **options):
        if self.is_down and options["mode"] == "online":
            raise self.Error("no route to host")
        self.runs.append(FakeRun(**options))
        return self.runs[-1]


def test_wandb_gets_the_flat_record_and_one_id_for_a_resumed_stage(tmp_path, monkeypatch, no_wandb_key):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in (1, 2):
        writer = writer_of(tmp_path / "run" / "s1", wandb_project="p", wandb_mode="offline", config={"seed": 1})
        writer.log({"loss": {"text": 2.0}}, step)
        writer.close()
    first, second = fake.runs
    assert first.records == [{"step": 1, "loss/text": 2.0}] and first.is_finished
    assert first.options["id"] == second.options["id"]
    assert first.options["dir"] == str(tmp_path / "run" / "s1")
    assert (first.options["name"], first.options["config"], first.options["mode"]) == ("run/s1", {"seed": 1}, "offline")


def test_online_without_a_key_is_offline_with_one_warning(tmp_path, monkeypatch, caplog, no_wandb_key):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with caplog.at_level(logging.WARNING):
        writer_of(tmp_path, wandb_project="p", wandb_mode="online").close()
    assert [run.options["mode"] for run in fake.runs] == ["offline"]
    assert [record.getMessage()[:17] for record in caplog.records] == ["wandb: no API key"]


def test_online_without_a_network_is_offline_with_one_warning(tmp_path, monkeypatch, caplog, no_wandb_key):
    fake = FakeWandb(is_down=True)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    with caplog.at_level(logging.WARNING):
        writer = writer_of(tmp_path, wandb_project="p", wandb_mode="online")
    writer.log({"loss": 1.0}, 1)
    writer.close()
    assert [run.options["mode"] for run in fake.runs] == ["offline"] and len(caplog.records) == 1
    assert lines_of(tmp_path) == ['{"step": 1, "loss": 1.0}']


def test_the_real_wandb_writes_offline_under_the_folder_and_prints_nothing(tmp_path, capfd, no_wandb_key):
    writer = writer_of(tmp_path / "s1", wandb_project="p", wandb_mode="offline")
    writer.log({"loss/text": 2.0, "bad": math.nan}, 1)
    writer.close()
    assert len(list((tmp_path / "s1" / "wandb").glob("offline-run-*/run-*.wandb"))) == 1
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
