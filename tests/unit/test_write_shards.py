"""Shards of a corpus are written side by side; what one process says, or that it says nothing, ends them all."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import webdataset

sys.path.insert(0, str(Path(__file__).parents[2]))

from data.shards import PlannedSample, ShardJob, cut, write_shards  # noqa: E402

MEMBER = "a.png"


def jobs(folder: Path, kinds: str) -> list[ShardJob]:
    """Shards of two samples; ``kinds`` says what is to become of each shard."""
    samples = [PlannedSample({"task": kind}, {MEMBER: (kind, str(folder))}) for kind in kinds for _ in range(2)]
    return cut(folder, "train", "made", samples, 2)


def make(spec: tuple[str, str]) -> tuple[bytes, float]:
    kind, folder = spec
    if kind == "e":
        raise ValueError("it cannot be drawn")
    if kind == "k":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "s":
        (Path(folder) / f"slow{os.getpid()}").touch()
        time.sleep(60)
    return f"{kind}{os.getpid()}".encode(), 1.5


@pytest.mark.parametrize("processes", [1, 3])
def test_every_shard_is_written_by_a_process_of_its_own(tmp_path, processes):
    results = write_shards(jobs(tmp_path, "abcdf"), make, processes)
    assert sorted(result.name for result in results) == [f"train/made/made-{n:06d}.tar" for n in range(5)]
    assert all((result.num_samples, result.audio_sec) == (2, 3.0) for result in results)
    members = [[s[MEMBER] for s in webdataset.WebDataset(str(tmp_path / r.name), shardshuffle=False)] for r in results]
    assert all(len(set(own)) == 1 for own in members) and len({own[0][1:] for own in members}) == 5


def test_an_error_says_where_and_ends_the_others(tmp_path):
    started = time.monotonic()
    with pytest.raises(ValueError, match="it cannot be drawn") as raised:
        write_shards(jobs(tmp_path, "se"), make, 2)
    assert "train/made" in raised.value.__notes__[0] and "in make" in raised.value.__notes__[0]
    assert time.monotonic() - started < 30
    assert not any(Path(f"/proc/{path.name[4:]}").exists() for path in tmp_path.glob("slow*"))


def test_a_process_that_is_killed_is_an_error_not_a_hang(tmp_path):
    with pytest.raises(RuntimeError, match="the process that wrote train/made, shard 1 was ended"):
        write_shards(jobs(tmp_path, "ak"), make, 2)
