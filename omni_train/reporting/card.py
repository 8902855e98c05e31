"""What the folder of a whole model says of itself: where its components come from and what was measured of them."""

from __future__ import annotations

from pathlib import Path

from omni_train.reporting.formatting import format_value
from omni_train.reporting.results import capability_rows, load_results

HEADER = """---
library_name: transformers
pipeline_tag: any-to-any
---

# {name}

Written by omni-train, for `Qwen3OmniMoeForConditionalGeneration.from_pretrained`.

| component | from |
|---|---|
"""


def model_card(name: str, sources: dict[str, str]) -> str:
    """A model card. ``sources``: component → folder; those of a recipe (RUN/STAGE/export) bring RUN's figures."""
    lines = [HEADER.format(name=name).rstrip("\n")]
    lines += [f"| {component} | {source} |" for component, source in sources.items()]
    runs = dict.fromkeys(Path(source).resolve().parents[1] for source in sources.values())
    for run in runs:
        results = load_results(run)
        stages = ", ".join(sorted({Path(s).parent.name for s in sources.values() if run in Path(s).resolve().parents}))
        if not results["capabilities"]:
            lines += ["", f"Nothing was measured beside {stages} in `{run}`."]
            continue
        lines += ["", f"## Measured in `{run}`, from which {stages} was taken", "", "| held out | | control |"]
        lines += ["|---|---|---|"]
        rows = capability_rows(results, {})
        lines += [
            f"| {figure} | {format_value(value)} | {format_value(control)} |" for figure, value, control, *_ in rows
        ]
    return "\n".join(lines) + "\n"
