"""Samples that are left out: how many may be, and where they are written down. Never a silent skip.

    index: header or text is bad ──▶ ShardIndex.bad ────┐
    worker: the body cannot be decoded ──▶ Pack.bad_samples ──▶ BadSampleLog: bad_samples.jsonl, budget

A sample is bad or not whatever the budget is; ``data.max_bad_samples`` only says when a run stops. So it may change at
a resume, and a run with bad samples goes the same way for any number of ranks and workers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from math import floor
from pathlib import Path
from typing import Any

from omni_train.config import ConfigError
from omni_train.data.contracts import BadSample
from omni_train.data.shard import DataError, SampleError

FIX = "mend the sample, or remove it from the shard"
LIST_THEM = "`omni-train data check FOLDER` lists them"


def is_share(max_bad_samples: float) -> bool:
    """Whether ``data.max_bad_samples`` is a share of all samples, not a number of them."""
    return 0 < max_bad_samples < 1


def num_allowed(max_bad_samples: float, num_samples: int) -> float:
    """How many of ``num_samples`` may be bad: a share of them, rounded down, or the number itself."""
    return floor(max_bad_samples * num_samples) if is_share(max_bad_samples) else max_bad_samples


def check_budget(bad: Sequence[BadSample], allowed: float, listed_in: str) -> None:
    """Raises DataError naming the first bad sample that is one too many; ``listed_in`` says where all are listed."""
    if len(bad) <= allowed:
        return
    first = bad[int(allowed)]
    count = f"{len(bad):,} bad sample{'s' if len(bad) > 1 else ''}, {allowed:,.0f} allowed by data.max_bad_samples"
    fix = f"{FIX} ({count}; {listed_in})"
    raise DataError.at(first.shard, first.offset, first.error, key=first.key, fix=fix)


def bad_sample(place: tuple[str, str, int], error: ValueError) -> BadSample:
    """The sample at ``place`` (shard, key, offset) that could not be read or encoded. Raises what is not its fault."""
    shard, key, offset = place
    if isinstance(error, (ConfigError, DataError)) and not isinstance(error, SampleError):
        raise error
    what = error.what if isinstance(error, SampleError) else str(error).split(f"/{key}: ", 1)[-1]  # after a Sample.id
    return BadSample(shard, key, offset, what)


class SampleCount:
    """The samples of shards and the bad ones among them, each once, also where a shard is read in two layouts."""

    def __init__(self) -> None:
        self._num_samples: dict[str, int] = {}
        self._bad: dict[tuple[str, int], BadSample] = {}

    def add(self, shard: str, num_samples: int, bad: Sequence[BadSample]) -> None:
        """Takes up a shard of ``num_samples``, the bad ones too."""
        self._num_samples[shard] = num_samples
        for sample in bad:
            self._bad.setdefault((shard, sample.offset), sample)

    @property
    def bad(self) -> list[BadSample]:
        return list(self._bad.values())

    def allowed(self, max_bad_samples: float) -> float:
        """``num_allowed`` of all samples."""
        return num_allowed(max_bad_samples, sum(self._num_samples.values()))

    def check(self, max_bad_samples: float) -> None:
        """Raises DataError when more samples are bad than allowed."""
        check_budget(self.bad, self.allowed(max_bad_samples), LIST_THEM)


class BadSampleLog:
    """The bad samples of a run, each once: counted, written to a file of JSON lines, and stopped at the budget.

    A line has the ``step`` at which the sample was met (0: when its shard was indexed), ``shard``, ``key``, ``offset``
    in bytes, and ``error``. ``indexed`` are those of the indexes; ``allowed`` is the budget for all together.
    """

    def __init__(self, path: Path, indexed: Sequence[BadSample], allowed: float):
        check_budget(indexed, allowed, LIST_THEM)
        self.path = path
        self.allowed = allowed
        self._steps = [0] * len(indexed)
        self._bad = list(indexed)
        self._seen = {(bad.shard, bad.offset) for bad in indexed}

    @property
    def count(self) -> int:
        return len(self._bad)

    def start(self, step: int, is_writer: bool) -> None:
        """Takes up what the file has of steps 1 to ``step``, where a run goes on; the writer drops the rest of it."""
        for line in self._read():
            if 0 < line["step"] <= step:
                self._take(line.pop("step"), [BadSample(**line)])
        if is_writer:
            self._write()

    def add(self, step: int, found: Sequence[BadSample], is_writer: bool) -> None:
        """Takes up samples met at ``step``, in an order free of how ranks share them; known ones count no second time.

        Raises DataError when there are more than allowed, after writing them down.
        """
        before = self.count
        self._take(step, sorted(found, key=lambda bad: (bad.shard, bad.offset)))
        if is_writer and self.count > before:
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(self._lines(before))
        check_budget(self._bad, self.allowed, f"listed in {self.path}")

    def _take(self, step: int, found: Sequence[BadSample]) -> None:
        for bad in found:
            if (bad.shard, bad.offset) not in self._seen:
                self._seen.add((bad.shard, bad.offset))
                self._bad.append(bad)
                self._steps.append(step)

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]  # a kill may have torn the last one

    def _lines(self, first: int) -> list[str]:
        """JSON lines of the samples from number ``first`` on."""
        found = zip(self._steps[first:], self._bad[first:], strict=True)
        return [json.dumps({"step": step} | asdict(bad)) + "\n" for step, bad in found]

    def _write(self) -> None:
        """The whole file in one atomic step; none where there is nothing to tell."""
        if not self._bad:
            self.path.unlink(missing_ok=True)
            return
        temporary = self.path.with_suffix(".jsonl.tmp")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text("".join(self._lines(0)), encoding="utf-8")
        os.replace(temporary, self.path)
