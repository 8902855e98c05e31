"""Metrics of one run: a JSON line per logged step in ``metrics.jsonl``, mirrored to wandb.

record ──flatten──▶ finite check ──▶ metrics.jsonl   (the truth: report, tests and resume read this)
                                └──▶ wandb           (a mirror: offline unless asked, never required)
"""

from __future__ import annotations

import json
import logging
import math
import netrc
import os
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends records to ``<run_dir>/metrics.jsonl`` and mirrors them to wandb, on the one rank that writes.

    ``run_dir`` is the folder of the stage. Nothing is written, and wandb is not imported, where ``is_writer`` is False.
    ``wandb_project`` None is the same as mode "disabled". Mode "online" without an API key becomes "offline" with one
    warning; ``wandb sync <run_dir>/wandb/offline-run-*`` uploads such a run later.
    """

    def __init__(
        self, run_dir: Path, *, wandb_project: str | None, wandb_mode: str, config: dict[str, Any], is_writer: bool
    ) -> None:
        self.path = Path(run_dir) / METRICS_FILE
        self.is_writer = is_writer
        self._file: Any = None
        self._wandb_run: Any = None
        if not is_writer:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        drop_torn_line(self.path)
        self._file = self.path.open("a", encoding="utf-8")
        if wandb_project is not None and wandb_mode != "disabled":
            self._wandb_run = _start_wandb(self.path.parent, wandb_project, wandb_mode, config)

    def log(self, record: dict[str, Any], step: int) -> None:
        """Appends ``record`` as one flushed line whose first key is ``step``; nested keys are joined with "/".

        Every line is valid JSON: NaN and infinities are written as the strings "nan", "inf", "-inf", which ``float``
        reads back. Scalar tensors and arrays are written as numbers.
        """
        if self._file is None:
            return
        flat = {"step": int(step)} | {key: _plain(v) for key, v in flatten(record).items() if key != "step"}
        self._file.write(json.dumps(encode_json(flat), allow_nan=False) + "\n")
        self._file.flush()
        self._mirror(lambda run: run.log(flat))

    def truncate_after(self, step: int) -> None:
        """Removes the lines of later steps, atomically: a killed and resumed run leaves the file of a straight run.

        Call it once after the checkpoint of ``step`` was loaded. wandb keeps its first copy of the repeated steps: its
        history is append-only, and ``step`` is an ordinary column there.
        """
        if self._file is None:
            return
        self._file.close()
        truncate_metrics(self.path, step)
        self._file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Ends the wandb run and closes the file; a second call does nothing."""
        self._mirror(lambda run: run.finish())
        self._wandb_run = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def _mirror(self, tell: Callable[[Any], None]) -> None:
        """Tells wandb, whose process may be gone: a signal to the whole machine ends it before the run has saved."""
        if self._wandb_run is None:
            return
        try:
            tell(self._wandb_run)
        except Exception as error:  # wandb's, of any kind
            self._wandb_run = None
            print(
                f"wandb has ended ({type(error).__name__}: {error}); {self.path} goes on", file=sys.stderr, flush=True
            )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``, in file order, "nan" and "inf" as floats; [] where the file is missing.

    A last line torn by a kill is left out.
    """
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = _parse(line)
        if record is not None:
            records.append(decode_json(record))
    return records


def truncate_metrics(path: Path, step: int) -> None:
    """Rewrites ``path`` up to its first line of ``step`` and without torn lines (atomic replace).

    A second line of a step is that of the last evaluation, which a resumed run repeats.
    """
    if not path.exists():
        return
    kept: list[str] = []
    seen: set[int] = set()
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        record = _parse(line)
        if record is not None and record["step"] <= step and record["step"] not in seen:
            kept.append(line if line.endswith("\n") else line + "\n")
            seen.add(record["step"])
    temporary = path.with_suffix(".jsonl.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def drop_torn_line(path: Path) -> None:
    """Cuts what follows the last newline: the half line of a killed writer, which the next append would run into."""
    if not path.exists():
        return
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def flatten(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The record with nested dictionaries joined by "/": ``{"loss": {"text": 1}}`` becomes ``{"loss/text": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _plain(value: Any) -> Any:
    """Python's own number for a scalar tensor or array, the value itself for anything else."""
    return value.item() if hasattr(value, "item") else value


def encode_json(value: Any) -> Any:
    """``value`` as strict JSON has it: scalar tensors as numbers, NaN and infinities as "nan", "inf", "-inf"."""
    if isinstance(value, dict):
        return {str(key): encode_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode_json(item) for item in value]
    value = _plain(value)
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def decode_json(value: Any) -> Any:
    """The inverse of ``encode_json`` for parsed JSON: "nan", "inf" and "-inf" become floats again."""
    if isinstance(value, dict):
        return {key: decode_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [decode_json(item) for item in value]
    return float(value) if isinstance(value, str) and value in ("nan", "inf", "-inf") else value


def _parse(line: str) -> dict[str, Any] | None:
    """The record of a line, or None where the line is not a whole record."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and "step" in record else None


def _start_wandb(run_dir: Path, project: str, mode: Any, config: dict[str, Any]) -> Any:
    """A silent wandb run whose files lie under ``run_dir``; its id is kept there, so a resumed stage continues it."""
    if mode == "online" and not has_wandb_key():
        logger.warning("wandb: no API key (WANDB_API_KEY or netrc), logging offline under %s", run_dir / "wandb")
        mode = "offline"
    wandb_dir = run_dir / "wandb"
    wandb_dir.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("WANDB_CACHE_DIR", str(wandb_dir / "cache"))  # NOTE: read when wandb is imported
    import wandb

    id_file = wandb_dir / "run_id"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
    options: dict[str, Any] = {
        "project": project,
        "dir": str(run_dir),
        "config": config,
        "name": f"{run_dir.parent.name}/{run_dir.name}",
        "id": id_file.read_text(encoding="utf-8").strip(),
        "settings": wandb.Settings(silent=True, console="off", save_code=False),
    }
    try:
        # Resuming is a notion of the server: offline, the option is ignored with a warning.
        run = wandb.init(mode=mode, resume="allow" if mode == "online" else None, **options)
    except wandb.Error as error:
        if mode == "offline":
            logger.warning("wandb: could not start (%s); metrics are in %s", error, run_dir / METRICS_FILE)
            return None
        logger.warning("wandb: could not go online (%s), logging offline under %s", error, wandb_dir)
        run = wandb.init(mode="offline", **options)
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def has_wandb_key() -> bool:
    """Whether wandb would find credentials without asking: in the environment or in the user's netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False
