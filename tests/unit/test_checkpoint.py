"""Checkpoints: only committed ones exist, the newest is taken, leftovers of a kill are ignored and removed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from omni_train.config import ConfigError
from omni_train.engine import checkpoint
from omni_train.engine.parallel import Ranks

MAIN = Ranks(0, 1, 0, torch.device("cpu"))


class FileEngine:
    """Stands for a DeepSpeed engine: its state is one number in one file."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        assert not save_latest, "the marker `latest` is written before all ranks are done"
        (Path(folder) / tag).mkdir()
        (Path(folder) / tag / "state").write_text(str(self.value))

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str | None, dict[str, Any]]:
        path = Path(folder) / tag / "state"
        if not path.exists():
            return None, {}
        self.value = int(path.read_text())
        return str(path), {}


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "barrier", lambda: None)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda objects, src: None)


def save(folder: Path, step: int, keep: int = 2, world: int = 1) -> Path:
    engines, state = {"thinker": FileEngine(step)}, {"world": world, "step": step}
    return checkpoint.save(folder, step, engines, state, {"buffer": {"codes": torch.arange(step)}}, MAIN, keep)


def load(folder: Path) -> tuple[dict[str, Any] | None, int]:
    engine = FileEngine(-1)
    found = checkpoint.load_newest(folder, {"thinker": engine}, MAIN)
    if found is not None:
        assert found[1]["buffer"]["codes"].tolist() == list(range(engine.value))
    return found and found[0], engine.value


def test_the_newest_committed_one_is_loaded_and_old_ones_go(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        save(tmp_path, step, keep=2)
    assert [path.name for path in checkpoint.committed(tmp_path)] == ["step_00000009", "step_00000010"]
    assert load(tmp_path) == ({"world": 1, "step": 10}, 10)


def test_without_a_checkpoint_there_is_nothing_to_load(tmp_path: Path) -> None:
    assert load(tmp_path / "none") == (None, -1)


def test_a_folder_without_commit_is_ignored(tmp_path: Path) -> None:
    save(tmp_path, 2)
    torn = save(tmp_path, 4)
    (torn / "COMMIT").unlink()
    assert load(tmp_path) == ({"world": 1, "step": 2}, 2)
    save(tmp_path, 4)  # the step is reached again and replaces what was torn
    assert load(tmp_path)[1] == 4


def test_a_truncated_temporary_folder_is_ignored_and_removed(tmp_path: Path) -> None:
    save(tmp_path, 2)
    torn = tmp_path / "tmp_step_00000004" / "thinker"
    torn.mkdir(parents=True)
    (torn / "state").write_bytes(b"")
    (torn.parent / "trainer.json").write_text('{"world": 1, "st')
    assert load(tmp_path) == ({"world": 1, "step": 2}, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]


@pytest.mark.parametrize("last_write", ["engine", "trainer.json", "COMMIT", "rename"])
def test_a_kill_at_any_point_of_a_save_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last_write: str
) -> None:
    save(tmp_path, 2, keep=1)

    class Killed(BaseException):
        pass

    def die(*_: object, **__: object) -> None:
        raise Killed

    if last_write == "engine":
        monkeypatch.setattr(json, "dumps", die)
    elif last_write == "trainer.json":
        monkeypatch.setattr(checkpoint, "fsync_tree", die)
    elif last_write == "COMMIT":
        monkeypatch.setattr(Path, "rename", die)
    else:
        monkeypatch.setattr(checkpoint, "fsync_folder", die)
    with pytest.raises(Killed):
        save(tmp_path, 4, keep=1)
    monkeypatch.undo()
    monkeypatch.setattr(dist, "barrier", lambda: None)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda objects, src: None)
    step = 4 if last_write == "rename" else 2
    assert load(tmp_path) == ({"world": 1, "step": step}, step)
    assert not list(tmp_path.glob("tmp_step_*"))


def test_a_half_deleted_checkpoint_is_not_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 2)
    save(tmp_path, 4)

    def die(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.prune(tmp_path, keep=1)
    assert [path.name for path in checkpoint.committed(tmp_path)] == ["step_00000004"]
    monkeypatch.undo()
    checkpoint.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000004"]


def test_another_number_of_ranks_and_a_missing_engine_are_named(tmp_path: Path) -> None:
    save(tmp_path, 2, world=2)
    with pytest.raises(ConfigError, match="'step_00000002' was written by 2 ranks, this run has 1; resume with"):
        load(tmp_path)
    save(tmp_path, 4)
    with pytest.raises(ConfigError, match="step_00000004' holds no state of engine 'talker'"):
        checkpoint.load_newest(tmp_path, {"talker": FileEngine()}, MAIN)
