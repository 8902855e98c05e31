"""A micro recipe through the real command: seven stages, two steps each, handed over by export, loaded by transformers."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml
from corpus import ROOT, micro_corpus, omni_train, overrides

STAGES = [
    "text_pretrain",
    "vision_pretrain",
    "aut_pretrain",
    "s1_adapters",
    "s1_encoders",
    "s2_general",
    "s3_long_context",
]
THINKER_STAGES = ["text_pretrain", *STAGES[3:]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str], list[str]]:
    """(run folder, what the command printed, the command) of a finished micro recipe, its evaluation left out."""
    folder = tmp_path_factory.mktemp("recipe")
    recipe = yaml.safe_load((ROOT / "recipes" / "tiny.yaml").read_text())
    recipe.pop("evaluation")
    path = folder / "micro.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    values = [value for value in overrides(folder / "run") if not value.startswith(("model=", "engine="))]
    command = ["run", str(path), *values, "stage.total_tokens=1200", "stage.context=512"]
    return folder / "run", omni_train(*command, timeout=580), command


@pytest.mark.timeout(600)
def test_every_stage_runs_and_hands_over(finished) -> None:
    run_dir, done, _ = finished
    assert done.returncode == 0, done.stdout + done.stderr
    assert [stage["stage"] for stage in yaml.safe_load((run_dir.parent / "micro.yaml").read_text())["stages"]] == STAGES
    for number, stage in enumerate(STAGES, 1):
        assert f"[{number}/7] {stage}" in done.stdout
        records = [json.loads(line) for line in (run_dir / stage / "metrics.jsonl").read_text().splitlines()]
        assert records[-1]["step"] == 2, stage
    results = json.loads((run_dir / "results.json").read_text())
    assert [stage["name"] for stage in results["stages"]] == STAGES
    assert all(stage["loss"] for stage in results["stages"])
    assert (run_dir / "report.html").stat().st_size > 1000
    for noise in ("built successfully", "FutureWarning", "Writing model shards"):
        assert noise not in done.stdout + done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("stage", THINKER_STAGES)
def test_stock_transformers_loads_every_export(finished, stage: str) -> None:
    from transformers import Qwen3OmniMoeThinkerForConditionalGeneration

    _, report = Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(
        finished[0] / stage / "export", output_loading_info=True
    )
    assert not any(report.values()), report


def test_a_stage_starts_from_the_exports_before_it(finished) -> None:
    from safetensors.torch import load_file

    run_dir = finished[0]
    first, second = (load_file(run_dir / stage / "export" / "model.safetensors") for stage in ("s1_adapters", "s1_encoders"))
    text = load_file(run_dir / "text_pretrain" / "export" / "model.safetensors")
    llm = [name for name in text if "audio_tower" not in name and "visual" not in name]
    assert llm and all(text[name].equal(first[name]) and text[name].equal(second[name]) for name in llm), "S1 freezes the LLM"
    towers = [name for name in first if "audio_tower" in name or "visual" in name]
    assert towers and sum(first[name].equal(second[name]) for name in towers) < len(towers) / 2, "S1 trains the encoders"


def test_a_finished_run_is_skipped_and_a_changed_one_refused(finished) -> None:
    run_dir, _, command = finished
    before = (run_dir / "results.json").read_bytes()
    again = omni_train(*command)
    assert again.returncode == 0 and again.stdout.count("skipped") == len(STAGES), again.stdout + again.stderr
    assert (run_dir / "results.json").read_bytes() == before

    changed = omni_train(*command, "stage.total_tokens=1300")
    assert changed.returncode == 2 and "stage.total_tokens (1200.0 → 1300.0)" in changed.stderr
    assert len(changed.stderr.splitlines()) == 1 and "finished stage" in changed.stderr
    assert micro_corpus().exists()
