"""The report of a run: one HTML file, without any external resource, made from what lies in the run folder.

    results.json ────────────────▶ capabilities, stages, environment
    <stage>/metrics.jsonl ───────▶ one chart a group of metrics (loss, held-out loss, learning rate, experts, …)
    <stage>/mixture.jsonl, config.yaml ▶ shares, configuration

Whatever is missing is left out, so a report can be written while the run goes on.
"""

from __future__ import annotations

import json
import math
import os
from html import escape
from pathlib import Path
from typing import Any

from omni_train.reporting.charts import Series, line_chart
from omni_train.reporting.formatting import MISSING, format_count, format_duration, format_value, sort_modalities
from omni_train.reporting.metrics import METRICS_FILE, read_metrics
from omni_train.reporting.mixture import MIXTURE_FILE
from omni_train.reporting.results import capability_rows, change_rows, is_lower_better, load_results, loss_columns
from omni_train.reporting.style import STYLE

REPORT_FILE = "report.html"

# Group of metrics → title of its chart, in the order of the page; groups that are not named here follow by name.
TITLES = {
    "loss": "Training loss (nats per token)",
    "eval/loss": "Held-out loss (nats per token)",
    "eval/exact": "Held-out exact match (fraction)",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Throughput (tokens/s)",
    "moe/max_violation": "Expert load: largest excess over the mean (fraction)",
    "moe/dead_experts": "Experts without a token",
    "loss/router": "Router load-balance loss (1 = even)",
    "mixture": "Mixture (share of tokens)",
}
OWN_CHART = ("loss/router",)
NOT_CHARTED = ("step", "tokens", "seconds")


def write_report(run_dir: Path, bars: dict[str, float] | None = None, baseline: str = "") -> Path:
    """Writes ``<run_dir>/report.html`` and returns its path; ``bars`` are the recipe's bars by capability name,
    ``baseline`` its stage that later held-out losses are compared with.

    ``run_dir`` is the folder of a whole run, or of a single stage. Raises ValueError where it does not exist.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ValueError(f"run folder {str(run_dir)!r} does not exist; pass the run_dir of a finished or running run")
    results = load_results(run_dir)
    stages = find_stages(run_dir, results)
    links = "".join(f'<a href="#{escape(path.name)}">{escape(path.name)}</a>' for path in stages)
    name = run_dir.resolve().name
    body = [
        f"<header><h1>{escape(name)}</h1>{_summary(results)}<nav>{links}</nav></header>",
        _capabilities(results, bars or {}),
        _stage_table(results["stages"]),
        _change_table(results["stages"], baseline),
        *(_stage_section(path) for path in stages),
        _environment(results["environment"]),
    ]
    html = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)} – omni-train</title><style>{STYLE}</style></head>\n"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )
    path = run_dir / REPORT_FILE
    temporary = path.with_suffix(".html.tmp")
    temporary.write_text(html, encoding="utf-8")
    os.replace(temporary, path)
    return path


def find_stages(run_dir: Path, results: dict[str, Any]) -> list[Path]:
    """The stage folders that hold anything to show: in the order of the results, the others after them by name."""
    folders = {path.name: path for path in sorted(run_dir.iterdir()) if path.is_dir()}
    named = [folders.pop(stage["name"]) for stage in results["stages"] if stage["name"] in folders]
    stages = [path for path in (*named, *folders.values()) if _is_stage(path)]
    return [run_dir, *stages] if _is_stage(run_dir) else stages


def metric_series(records: list[dict[str, Any]]) -> dict[str, list[Series]]:
    """Series by group of metrics, in the order of TITLES. x is the ``tokens`` of a record, its ``step`` without them.

    The group of ``a/b`` is ``a``, of ``eval/a/b`` it is ``eval/a``; ``moe/*`` and the router loss stand alone, in other
    units. The plain ``loss`` and its kind, the sum over a group, is only shown where the group has no parts.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        x = record.get("tokens", record.get("step", 0))
        for key, value in record.items():
            if key not in NOT_CHARTED and isinstance(value, int | float):
                points.setdefault(key, []).append((float(x), float(value)))
    groups: dict[str, dict[str, Series]] = {}
    for key, values in points.items():
        group, name = _group_of(key)
        groups.setdefault(group, {})[name] = Series(name, values)
    order = [group for group in TITLES if group in groups] + sorted(set(groups).difference(TITLES))
    series = {}
    for group in order:
        parts = set(groups[group])
        names = sort_modalities(parts - {group} or parts)
        series[group] = [groups[group][name] for name in names]
    return series


def _group_of(key: str) -> tuple[str, str]:
    """(group, name of the line) of a metric."""
    parts = key.split("/")
    depth = 2 if parts[0] == "eval" else 1
    if len(parts) <= depth or parts[0] == "moe" or key in OWN_CHART:
        return key, key
    return "/".join(parts[:depth]), "/".join(parts[depth:])


def _is_stage(path: Path) -> bool:
    return any((path / name).exists() for name in (METRICS_FILE, "config.yaml"))


def _summary(results: dict[str, Any]) -> str:
    stages, environment = results["stages"], results["environment"]
    if not stages:
        return '<p class="soft">No stage has finished yet.</p>'
    tokens = sum(stage.get("tokens") or 0 for stage in stages)
    seconds = sum(stage.get("seconds") or 0 for stage in stages)
    parts = [
        f"{len(stages)} stage{'s' * (len(stages) > 1)}",
        f"{format_count(tokens)} tokens",
        format_duration(seconds),
    ]
    if environment.get("git_commit"):
        parts.append(f"commit {environment['git_commit']}")
    return f'<p class="soft">{escape(" · ".join(parts))}</p>'


def _table(header: list[str], rows: list[list[str]]) -> str:
    """A table of cells that are HTML already; the first column is text, the others are numbers."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _capabilities(results: dict[str, Any], bars: dict[str, float]) -> str:
    rows = []
    for name, value, control, bar, verdict in capability_rows(results, bars):
        limit = MISSING if bar is None else f"{'≤' if is_lower_better(name) else '≥'} {format_value(bar)}"
        mark = f'<span class="{verdict.lower()}">{verdict}</span>' if bar is not None else ""
        rows.append([escape(name), f"<b>{format_value(value)}</b>", escape(format_value(control)), limit, mark])
    if not rows:
        return ""
    note = '<p class="soft">Control: the same measurement where the input cannot tell the answer.</p>'
    return f"<h2>Capabilities</h2>{note}{_table(['capability', 'value', 'control', 'bar', ''], rows)}"


def _stage_table(stages: list[dict[str, Any]]) -> str:
    if not stages:
        return ""
    modalities = loss_columns(stages)
    rows = []
    for stage in stages:
        losses = stage.get("loss") or {}
        name = escape(stage["name"])
        rows.append(
            [
                f'<a href="#{name}">{name}</a>',
                format_count(stage.get("tokens")),
                format_duration(stage.get("seconds")),
                format_count(stage.get("tokens_per_second")),
                *(escape(format_value(losses.get(modality))) for modality in modalities),
            ]
        )
    header = ["stage", "tokens", "time", "tokens/s", *(f"loss {modality}" for modality in modalities)]
    return f"<h2>Stages</h2>{_table(header, rows)}"


def _change_table(stages: list[dict[str, Any]], baseline: str) -> str:
    rows = change_rows(stages, baseline)
    if not rows:
        return ""
    note = f'<p class="soft">Held-out loss, above (+) or below (−) that after {escape(baseline)}.</p>'
    cells = [[escape(cell) for cell in row] for row in rows[1:]]
    return f"<h2>Against {escape(baseline)}</h2>{note}{_table(rows[0], cells)}"


def _stage_section(folder: Path) -> str:
    records = read_metrics(folder / METRICS_FILE)
    x_label = "tokens" if any("tokens" in record for record in records) else "steps"
    charts = [
        line_chart(TITLES.get(group, group), series, x_label=x_label)
        for group, series in metric_series(records).items()
    ]
    name = escape(folder.name)
    empty = "" if any(charts) else '<p class="soft">No metrics yet.</p>'
    grid = f'<div class="charts">{"".join(charts)}</div>'
    return f'<section id="{name}"><h2>{name}</h2>{empty}{grid}{_mixture(folder)}{_config(folder)}</section>'


def _mixture(folder: Path) -> str:
    """Shares of the newest mixture as bars, and every change: at a resume, or by a source that ran dry."""
    path = folder / MIXTURE_FILE
    if not path.exists():
        return ""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:  # torn by a kill
            continue
    with_weights = [record for record in records if isinstance(record.get("weights"), dict)]
    parts = []
    if with_weights:
        weights = with_weights[-1]["weights"]
        numbers = [weight for weight in weights.values() if _is_number(weight)]
        total = sum(numbers)
        rows = []
        for source, weight in weights.items():
            share = weight / total if _is_number(weight) and total else None
            bar = "" if share is None else f'<span class="share" style="width:{160 * share:.0f}px"></span>'
            percent = escape(str(weight)) if share is None else f"{100 * share:.1f} %"
            rows.append([escape(source), f"{bar}{percent}"])
        parts.append(_table(["source", "share of tokens"], rows))
    changes = [json.dumps(record, ensure_ascii=False) for record in records if "weights" not in record]
    if changes:
        parts.append(f"<p>Changes</p><pre>{escape(chr(10).join(changes))}</pre>")
    return f"<h3>Mixture</h3>{''.join(parts)}" if parts else ""


def _config(folder: Path) -> str:
    path = folder / "config.yaml"
    if not path.exists():
        return ""
    text = escape(path.read_text(encoding="utf-8").strip())
    return f"<details><summary>Configuration</summary><pre>{text}</pre></details>"


def _environment(environment: dict[str, Any]) -> str:
    if not environment:
        return ""
    rows = [[escape(name), escape(MISSING if value is None else str(value))] for name, value in environment.items()]
    return f"<h2>Environment</h2>{_table(['', ''], rows)}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
