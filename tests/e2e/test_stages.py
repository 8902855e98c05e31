"""The tiny recipe at micro size through the real command: a few steps a stage, handed over by export; stock loading."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from corpus import ROOT, environment, omni_train, overrides

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


OF_RECIPE = ("model=", "engine=", "model.text.num_hidden_layers=", "data.packs_per_lane=")
"""Overrides of a micro stage that the recipe sets itself."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str], list[str]]:
    """(run folder, what the command printed, the command) of the Thinker's pretraining."""
    folder = tmp_path_factory.mktemp("recipe")
    recipe = yaml.safe_load((ROOT / "recipes" / "tiny.yaml").read_text())
    recipe["stages"] = recipe["stages"][: len(STAGES)]
    path = folder / "micro.yaml"
    path.write_text(yaml.safe_dump({**recipe, "data": {}}, sort_keys=False))
    values = [value for value in overrides(folder / "run") if not value.startswith(OF_RECIPE)]
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
        assert (run_dir / stage / "checkpoints" / "step_00000002" / "COMMIT").exists(), (
            "saved before the last evaluation"
        )
    results = json.loads((run_dir / "results.json").read_text())
    assert [stage["name"] for stage in results["stages"]] == STAGES
    assert all(stage["loss"] for stage in results["stages"])
    for name in ("spoken_word_exact", "spoken_phrase_cer", "aut_spoken_word_cer_1s", "aut_spoken_word_cer_8s"):
        assert name in results["capabilities"] and name in results["controls"]
    assert {"long_audio_find_exact/s2_checkpoint", "long_audio_find_exact/yarn_off"} <= set(results["controls"])
    assert (run_dir / "report.html").stat().st_size > 1000
    for noise in ("built successfully", "FutureWarning", "Writing model shards"):
        assert noise not in done.stdout + done.stderr
    assert done.stderr == ""


FIGURES = (
    *("codec_words_mel", "codec_words_wave", "codec_stoi", "talker_seen_words", "talker_unseen_words", "talker_cer"),
    *("dpo_cer", "dpo_gain_low", "speaker_f0_error", "speaker_unseen_words", "sft_format_exact"),
    *("gspo_reward_start", "gspo_reward_end", "gspo_kl_to_start", "gspo_unseen_reward_end"),
    *("distill_off_gap_closed", "distill_on_gap_closed"),
)
BESIDE = ("talker_seen_words/after_gspo", "talker_cer/after_speaker", "talker_f0_error/after_speaker")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_speech_and_post_training_go_on_from_the_thinker(finished) -> None:
    """The rest of the recipe in the same run folder, on data that it makes on the way, every figure measured."""
    run_dir, _, command = finished
    recipe = yaml.safe_load((ROOT / "recipes" / "tiny.yaml").read_text())
    recipe["data"]["pairs"]["margin"] = 0.0  # a Talker of two steps says nothing well
    path = run_dir.parent / "whole.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    done = omni_train("run", str(path), *command[2:], timeout=880)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("finished before") == len(STAGES)
    results = json.loads((run_dir / "results.json").read_text())
    assert [stage["name"] for stage in results["stages"]] == [stage["stage"] for stage in recipe["stages"]]
    assert set(FIGURES) <= set(results["capabilities"]) and set(BESIDE) <= set(results["controls"])
    assert set(results["by_speaker"]["talker_f0_hz"]) == {"anna", "ben", "clara", "david"}
    assert list((run_dir / "data" / "codes" / "heldout" / "talk").glob("*.tar"))
    assert list((run_dir / "data" / "pairs" / "train" / "talk").glob("*.tar"))
    again = omni_train("run", str(path), *command[2:], timeout=100)
    assert again.returncode == 0 and again.stdout.count("finished before") == len(recipe["stages"])


@pytest.mark.parametrize("stage", THINKER_STAGES)
def test_stock_transformers_loads_every_export(finished, stage: str) -> None:
    from transformers import Qwen3OmniMoeThinkerForConditionalGeneration

    _, report = Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(
        finished[0] / stage / "export", output_loading_info=True
    )
    assert not any(report.values()), report
    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in (finished[0] / stage / "export").iterdir()} == {0o666 & ~umask}


def test_a_stage_starts_from_the_exports_before_it(finished) -> None:
    from safetensors.torch import load_file

    run_dir = finished[0]
    text, first, second = (
        load_file(run_dir / stage / "export" / "model.safetensors")
        for stage in ("text_pretrain", "s1_adapters", "s1_encoders")
    )
    llm = [name for name in text if "audio_tower" not in name and "visual" not in name]
    assert llm
    for name in llm:  # S1 freezes the LLM
        assert text[name].equal(first[name]) and text[name].equal(second[name]), name
    towers = [name for name in first if "audio_tower" in name or "visual" in name]
    assert sum(first[name].equal(second[name]) for name in towers) < len(towers) / 2, "the encoders train"


def test_a_finished_run_is_skipped_and_a_changed_one_refused(finished) -> None:
    run_dir, _, command = finished
    before = (run_dir / "results.json").read_bytes()
    again = omni_train(*command)
    assert again.returncode == 0 and again.stdout.count("skipped") == len(STAGES), again.stdout + again.stderr
    assert (run_dir / "results.json").read_bytes() == before

    changed = omni_train(*command, "stage.total_tokens=1300")
    assert changed.returncode == 2 and "stage.total_tokens (1200.0 → 1300.0)" in changed.stderr
    assert len(changed.stderr.splitlines()) == 1 and "finished stage" in changed.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_under_torchrun_its_ranks_win_and_a_finished_stage_ends_at_once(tmp_path: Path) -> None:
    values = overrides(tmp_path / "s2", "stage.total_tokens=1000", "engine.num_processes=1", "engine.expert_parallel=2")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "omni_train.cli"]

    def torchrun() -> subprocess.CompletedProcess[str]:
        command = [*launcher, "train", "s2_general", *values]
        return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)

    done = torchrun()
    assert done.returncode == 0, done.stdout + done.stderr
    records = (tmp_path / "s2" / "metrics.jsonl").read_bytes()
    again = torchrun()
    assert again.returncode == 0 and (tmp_path / "s2" / "metrics.jsonl").read_bytes() == records
