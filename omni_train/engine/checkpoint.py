"""Checkpoints that commit atomically: a kill at any point leaves the last committed one loadable.

    tmp_step_N/<engine>/...  trainer.json  → fsync → COMMIT → fsync → rename to step_N → fsync of the parent

Nothing but a ``step_*`` folder holding ``COMMIT`` is ever loaded.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from omni_train.config import ConfigError
from omni_train.engine.parallel import Ranks


def fsync_tree(folder: Path) -> None:
    """Flush every file and folder under ``folder`` to disk."""
    for root, _, files in os.walk(folder):
        for path in (*(Path(root) / name for name in files), Path(root)):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def save(folder: Path, step: int, engines: dict[str, Any], state: dict[str, Any], ranks: Ranks, keep: int) -> Path:
    """Write and commit checkpoint ``step`` of all trained engines with the trainer's state; keep the newest ``keep``."""
    temporary, final = folder / f"tmp_step_{step:08d}", folder / f"step_{step:08d}"
    if ranks.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    for name, engine in engines.items():
        engine.save_checkpoint(str(temporary), tag=name, save_latest=False)
    dist.barrier()
    if ranks.is_main:
        (temporary / "trainer.json").write_text(json.dumps(state))
        fsync_tree(temporary)
        (temporary / "COMMIT").write_text(f"{step}\n")
        fsync_tree(temporary)
        shutil.rmtree(final, ignore_errors=True)  # only a folder that was being replaced when the run was killed
        temporary.rename(final)
        fsync_folder(folder)
        for old in committed(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def fsync_folder(folder: Path) -> None:
    """Flush a folder's own entries, after a rename in it."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def committed(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step_*") if (path / "COMMIT").exists())


def load_newest(folder: Path, engines: dict[str, Any], ranks: Ranks) -> dict[str, Any] | None:
    """Load the newest committed checkpoint into the engines and return the trainer's state; None when there is none.

    Rank 0 chooses, so that ranks cannot disagree.
    """
    chosen = [str(committed(folder)[-1]) if ranks.is_main and committed(folder) else None]
    dist.broadcast_object_list(chosen, src=0)
    if chosen[0] is None:
        return None
    path = Path(chosen[0])
    state = json.loads((path / "trainer.json").read_text())
    if state["world"] != ranks.world:
        raise ConfigError(
            f"checkpoint '{path.name}' was written by {state['world']} ranks, this run has {ranks.world}; "
            "resume with the same number, or start the stage anew from its input export"
        )
    for name, engine in engines.items():
        loaded, _ = engine.load_checkpoint(str(path), tag=name)
        if loaded is None:
            raise ConfigError(f"checkpoint '{path}' holds no state of engine '{name}'")
    return state
