"""The report of a run: one HTML file from what its folder holds."""

from __future__ import annotations

from pathlib import Path

REPORT_FILE = "report.html"


def write_report(run_dir: Path) -> Path:
    """Writes ``<run_dir>/report.html`` and returns its path."""
    path = Path(run_dir) / REPORT_FILE
    path.write_text("<!doctype html><title>omni-train</title>", encoding="utf-8")
    return path
