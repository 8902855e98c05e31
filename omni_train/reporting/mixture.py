"""``mixture.jsonl`` of a stage: the weights it starts with, their changes at a resume, each source that ran dry."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MIXTURE_FILE = "mixture.jsonl"


class MixtureLog:
    """Appends records to a stage's ``mixture.jsonl``; on one rank only (``is_writer``)."""

    def __init__(self, folder: Path, *, is_writer: bool) -> None:
        self._path, self._is_writer = folder / MIXTURE_FILE, is_writer
        self._exhausted: set[str] = set()

    def start(self, weights: dict[str, Any], step: int) -> None:
        """A new run with these weights; what an earlier one left is dropped."""
        if self._is_writer:
            self._path.unlink(missing_ok=True)
        self._add([{"event": "start", "step": step, "weights": weights}])

    def resume(self, weights: dict[str, Any], step: int, changes: list[dict[str, Any]], exhausted: list[str]) -> None:
        """Go on after ``step`` with these weights, ``changes`` of them, and the sources that had run dry by then.

        What ran dry after the checkpoint was written will do so again: its record is dropped.
        """
        if self._is_writer and self._path.exists():
            lines = self._path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if not _is_repeated(line, step)]
            partial = self._path.with_suffix(".part")
            partial.write_text("".join(kept))
            partial.replace(self._path)
        self._exhausted = set(exhausted)
        self._add([*changes, {"event": "resume", "step": step, "weights": weights}])

    def note_exhausted(self, sources: Iterable[str], step: int) -> None:
        """A record for each source that is here for the first time: its share goes to the others after ``step``."""
        new = sorted(set(sources) - self._exhausted)
        self._exhausted |= set(new)
        self._add([{"event": "exhausted", "source": source, "step": step} for source in new])

    def _add(self, records: list[dict[str, Any]]) -> None:
        if self._is_writer and records:
            with open(self._path, "a") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)


def _is_repeated(line: str, step: int) -> bool:
    """Whether a run that goes on after ``step`` comes by this line again, or a kill has torn it."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return True
    return record.get("event") == "exhausted" and record["step"] >= step
