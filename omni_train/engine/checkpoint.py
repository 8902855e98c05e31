"""Checkpoints that commit atomically: a kill at any point leaves the last committed one loadable.

    tmp_step_N/<engine>/...  trainer.json  rank_R.pt  → fsync → COMMIT → fsync → rename to step_N → fsync of the parent

Nothing but a ``step_*`` folder holding ``COMMIT`` is ever loaded; what a kill left half-written or half-deleted is
removed at the next start and at the next save.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
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


def save(
    folder: Path,
    step: int,
    engines: dict[str, Any],
    state: dict[str, Any],
    parts: dict[str, dict[str, Any]],
    ranks: Ranks,
    keep: int,
) -> Path:
    """Write and commit checkpoint ``step``, which must not be there yet; keep the newest ``keep``.

    It holds the trained engines, the trainer's ``state`` (JSON, alike on all ranks), and ``parts`` (by name, tensors
    and plain values, this rank's own).
    """
    temporary, final = folder / f"tmp_step_{step:08d}", folder / f"step_{step:08d}"
    if ranks.is_main:
        remove_leftovers(folder)
        temporary.mkdir(parents=True)
    dist.barrier()
    for name, engine in engines.items():
        engine.save_checkpoint(str(temporary), tag=name, save_latest=False)
    if parts:
        torch.save(parts, temporary / f"rank_{ranks.rank}.pt")
    dist.barrier()
    if ranks.local_rank == 0:  # a node flushes what its own ranks wrote
        fsync_tree(temporary)
    dist.barrier()
    if ranks.is_main:
        (temporary / "trainer.json").write_text(json.dumps(state))
        fsync_tree(temporary)
        (temporary / "COMMIT").write_text(f"{step}\n")
        fsync_tree(temporary)
        temporary.rename(final)
        fsync_folder(folder)
        prune(folder, keep)
    dist.barrier()
    return final


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` committed checkpoints; each is withdrawn before any of its files goes."""
    for old in committed(folder)[:-keep]:
        (old / "COMMIT").unlink()
        shutil.rmtree(old)


def remove_leftovers(folder: Path) -> None:
    """Delete what an interrupted save or deletion left. Called by one rank, while nothing is being saved."""
    for path in {*folder.glob("tmp_step_*"), *folder.glob("step_*")} - {*committed(folder)}:
        shutil.rmtree(path)


def fsync_folder(folder: Path) -> None:
    """Flush a folder's own entries, after a rename in it."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def committed(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step_*") if (path / "COMMIT").exists())


def load_newest(
    folder: Path, engines: dict[str, Any], ranks: Ranks
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]] | None:
    """Load the newest committed checkpoint into the engines; returns (state, parts) of ``save``, None without one.

    Rank 0 chooses, so that ranks cannot disagree.
    """
    chosen: list[str | None] = [None]
    if ranks.is_main:
        remove_leftovers(folder)
        chosen = [str(path) for path in committed(folder)[-1:]] or [None]
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
    own = path / f"rank_{ranks.rank}.pt"
    return state, torch.load(own, weights_only=True) if own.exists() else {}
