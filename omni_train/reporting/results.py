"""What a run reached: ``results.json`` in the run folder, and the table printed from it.

    {"stages": [{"name", "tokens", "seconds", "tokens_per_second", "loss": {modality: nats}}],
     "capabilities": {name: value}, "controls": {name: value}, "environment": {...},
     "by_lang": {name: {language: [value, control]}}, "by_speaker": {name: {speaker: [value, of the originals]}}}

Fractions lie in 0–1; any other unit is in the name. Written by one rank only.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from omni_train.reporting.environment import describe_environment
from omni_train.reporting.formatting import (
    MISSING,
    format_change,
    format_count,
    format_duration,
    format_value,
    sort_modalities,
)
from omni_train.reporting.metrics import decode_json, encode_json

RESULTS_FILE = "results.json"
LOSS_COLUMNS = 7
"""Stages in a table of losses: what fits a terminal of 110 columns."""
LOWER_IS_BETTER = frozenset(
    {"wer", "cer", "error", "errors", "loss", "nats", "distance", "perplexity", "latency", "kl"}
)


def load_results(run_dir: Path) -> dict[str, Any]:
    """The content of ``<run_dir>/results.json``, every top-level key present; empty where there is no file."""
    empty: dict[str, Any] = {"stages": [], "capabilities": {}, "controls": {}, "environment": {}}
    path = Path(run_dir) / RESULTS_FILE
    return empty | decode_json(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else empty


def add_stage(run_dir: Path, stage: dict[str, Any]) -> None:
    """Writes one finished stage: replaces the stage of the same name where it stands, otherwise appends.

    ``stage`` holds ``name``, ``tokens``, ``seconds``, ``loss`` ({modality: nats}) and what else is worth keeping;
    ``tokens_per_second`` is filled in from the two if it is absent. Also records this process's environment.
    Raises ValueError without a name.
    """
    if not stage.get("name"):
        raise ValueError(f"results: a stage needs a name, got {sorted(stage)}")
    stage = dict(stage)
    if "tokens_per_second" not in stage and stage.get("seconds"):
        stage["tokens_per_second"] = stage.get("tokens", 0) / stage["seconds"]
    results = load_results(run_dir)
    names = [known["name"] for known in results["stages"]]
    if stage["name"] in names:
        results["stages"][names.index(stage["name"])] = stage
    else:
        results["stages"].append(stage)
    results["environment"] = describe_environment()
    _write(run_dir, results)


def add_capabilities(run_dir: Path, capabilities: dict[str, float], controls: dict[str, float]) -> None:
    """Writes measured capabilities and their controls; a name measured before is overwritten, the others stay.

    The control of a capability has its name (``asr_wer``) or begins with it (``asr_wer/silence``).
    """
    results = load_results(run_dir)
    results["capabilities"] |= capabilities
    results["controls"] |= controls
    _write(run_dir, results)


def add_apart(run_dir: Path, key: str, figures: dict[str, dict[str, list[float | None]]]) -> None:
    """Writes {figure: {group: [value, its control or None]}} under ``key`` (by_lang, by_speaker), which no table
    shows."""
    results = load_results(run_dir)
    results[key] = results.get(key, {}) | figures
    _write(run_dir, results)


def render_table(results: dict[str, Any], bars: dict[str, float] | None, baseline: str = "") -> str:
    """Plain text: a row a stage; a row a held-out source with its loss after each stage, then with its change since the
    stage ``baseline``; a row a capability beside its control, its bar and whether it passed.

    Stages and capabilities keep the order of the results, sources a fixed one; – for what is missing.
    """
    console = Console(file=io.StringIO(), width=200, no_color=True, force_terminal=False)
    console.print(_stage_table(results["stages"]))
    for table in _loss_tables([stage for stage in results["stages"] if stage.get("loss")]):
        console.print(table)
    if rows := change_rows(results["stages"], baseline):
        console.print(_change_table(baseline, rows))
    if results["capabilities"] or bars:
        console.print(_capability_table(results, bars or {}))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in lines).strip("\n") + "\n"


def capability_rows(results: dict[str, Any], bars: dict[str, float]) -> list[tuple[str, Any, Any, Any, str]]:
    """(name, value, control, bar, verdict) for every capability and for every bar that was not measured.

    Verdict: "pass", "FAIL", or – without a bar; a bar that was not measured is "FAIL". Several controls of a capability
    are joined into one text.
    """
    rows = []
    for name in [*results["capabilities"], *(bar for bar in bars if bar not in results["capabilities"])]:
        value, bar = results["capabilities"].get(name), bars.get(name)
        controls = {key: v for key, v in results["controls"].items() if key == name or key.startswith(f"{name}/")}
        control: Any = None
        if len(controls) == 1:
            control = next(iter(controls.values()))
        elif controls:
            control = ", ".join(
                f"{key.removeprefix(f'{name}/')} {format_value(v)}" if key != name else format_value(v)
                for key, v in controls.items()
            )
        verdict = MISSING if bar is None else "pass" if value is not None and meets_bar(name, value, bar) else "FAIL"
        rows.append((name, value, control, bar, verdict))
    return rows


def meets_bar(name: str, value: float, bar: float) -> bool:
    """Whether ``value`` is at least ``bar``; at most, where a word of the name says so (wer, cer, error, loss, …)."""
    return value <= bar if is_lower_better(name) else value >= bar


def is_lower_better(name: str) -> bool:
    """Whether a word of ``name`` (split at "_", "/", "-") is in LOWER_IS_BETTER."""
    return not LOWER_IS_BETTER.isdisjoint(name.lower().replace("/", "_").replace("-", "_").split("_"))


def loss_columns(stages: list[dict[str, Any]]) -> list[str]:
    """The modalities that any of the stages has a loss of, in their fixed order."""
    return sort_modalities({name for stage in stages for name in stage.get("loss") or {}})


def loss_changes(stages: list[dict[str, Any]], baseline: str) -> dict[str, dict[str, float]]:
    """{stage: {source: fraction}} for the stages after ``baseline``: by how much a held-out loss lies above (+) or
    below (−) that of the baseline. Stages without a source in common are left out; empty without the baseline."""
    names = [stage["name"] for stage in stages]
    if baseline not in names:
        return {}
    start = names.index(baseline)
    base = {name: loss for name, loss in (stages[start].get("loss") or {}).items() if loss}
    found = {
        stage["name"]: {name: loss / base[name] - 1 for name, loss in (stage.get("loss") or {}).items() if name in base}
        for stage in stages[start + 1 :]
    }
    return {name: changes for name, changes in found.items() if changes}


def change_rows(stages: list[dict[str, Any]], baseline: str) -> list[list[str]]:
    """The cells of the comparison with ``baseline``: a header (source, baseline, later stages), then a row a source:
    its loss there in nats a token and its later changes. Empty where there is nothing to compare."""
    changes = loss_changes(stages, baseline)
    base: dict[str, float] = next((stage["loss"] for stage in stages if stage["name"] == baseline), {})
    rows = [
        [source, format_value(base[source]), *(format_change(change.get(source)) for change in changes.values())]
        for source in loss_columns([{"loss": change} for change in changes.values()])
    ]
    return [["source", baseline, *changes], *rows] if rows else []


def _new_table(title: str) -> Table:
    return Table(box=SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False, min_width=len(title))


def _stage_table(stages: list[dict[str, Any]]) -> Table:
    table = _new_table("Stages")
    table.add_column("stage", no_wrap=True)
    for header in ("tokens", "time", "tokens/s"):
        table.add_column(header, justify="right", no_wrap=True)
    for stage in stages:
        rate = format_count(stage.get("tokens_per_second"))
        table.add_row(stage["name"], format_count(stage.get("tokens")), format_duration(stage.get("seconds")), rate)
    return table


def _loss_tables(stages: list[dict[str, Any]]) -> Iterator[Table]:
    """A table for every LOSS_COLUMNS stages."""
    for start in range(0, len(stages), LOSS_COLUMNS):
        part = stages[start : start + LOSS_COLUMNS]
        table = _new_table("Held-out loss, nats a token")
        table.add_column("source", no_wrap=True)
        for stage in part:
            table.add_column(stage["name"].replace("_", "\n", 1), justify="right", no_wrap=True)
        for name in loss_columns(part):
            table.add_row(name, *(format_value(stage["loss"].get(name)) for stage in part))
        yield table


def _change_table(baseline: str, rows: list[list[str]]) -> Table:
    table = _new_table(f"Held-out loss against {baseline}")
    table.add_column("source", no_wrap=True)
    for name in rows[0][1:]:
        table.add_column(name.replace("_", "\n", 1), justify="right", no_wrap=True)
    for row in rows[1:]:
        table.add_row(*row)
    return table


def _capability_table(results: dict[str, Any], bars: dict[str, float]) -> Table:
    table = _new_table("Capabilities")
    table.add_column("capability", no_wrap=True)
    for header in ("value", "control", "bar"):
        table.add_column(header, justify="right")
    table.add_column("", no_wrap=True)
    for name, value, control, bar, verdict in capability_rows(results, bars):
        if bar is None:
            limit = MISSING
        else:
            limit = f"{'≤' if is_lower_better(name) else '≥'} {format_value(bar)}"
        table.add_row(name, format_value(value), format_value(control), limit, verdict)
    return table


def _write(run_dir: Path, results: dict[str, Any]) -> None:
    path = Path(run_dir) / RESULTS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".json.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(encode_json(results), file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
