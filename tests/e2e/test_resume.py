"""Killed at any point, the same command again gives the uninterrupted run bit for bit: samples, losses, weights."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from corpus import omni_train, overrides, start

NUM_STEPS = 12
START_LIMIT_SEC = 120.0


def stage_command(stage: str, run_dir: Path, *extra: str) -> list[str]:
    budget = ("stage.total_tokens=5700", "save_every_steps=2", f"data.seed={len(stage)}")
    return ["train", stage, *overrides(run_dir, *budget), *extra]


def outcome(run_dir: Path) -> tuple[list[dict], str, dict]:
    """(all metrics but the speed, by step; hash of the exported weights; the DONE file but its time)."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("tokens_per_second", None)
    digest = hashlib.sha256((run_dir / "export" / "model.safetensors").read_bytes()).hexdigest()
    done = json.loads((run_dir / "DONE").read_text())
    assert abs(done.pop("time_ns") - time.time_ns()) < 3600e9
    return records, digest, done


def finish(stage: str, run_dir: Path, *extra: str) -> tuple[list[dict], str, dict]:
    done = omni_train(*stage_command(stage, run_dir, *extra))
    assert done.returncode == 0, done.stdout + done.stderr
    return outcome(run_dir)


def num_steps_logged(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def is_saving(run_dir: Path) -> bool:
    return any((run_dir / "checkpoints").glob("tmp_step_*"))


def kill_when(stage: str, run_dir: Path, is_time: Callable[[], bool], *extra: str) -> int:
    """Start the stage, SIGKILL all of its ranks as soon as ``is_time``; the number of steps logged by then."""
    return kill_command(stage_command(stage, run_dir, *extra), run_dir, is_time)


def ran_dry(run_dir: Path) -> list[tuple[str, int]]:
    """(source, after which step) of each source that reached its max_epochs, as mixture.jsonl tells it."""
    records = [json.loads(line) for line in (run_dir / "mixture.jsonl").read_text().splitlines()]
    return [(record["source"], record["step"]) for record in records if record["event"] == "exhausted"]


def kill_command(
    command: list[str], run_dir: Path, is_time: Callable[[], bool], number: int = signal.SIGKILL, code: int = -9
) -> int:
    """Start a command, send a signal to all of its processes as soon as ``is_time``, expect its exit status; the number
    of steps logged by then."""
    process = start(*command)
    deadline = time.monotonic() + START_LIMIT_SEC
    try:
        while not is_time():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        os.killpg(process.pid, number)
        told = process.communicate()[0]
    assert process.returncode == code, told
    assert not (run_dir / "DONE").exists(), "the kill came too late"
    return num_steps_logged(run_dir)


def assert_same(resumed: tuple[list[dict], str, dict], straight: tuple[list[dict], str, dict]) -> None:
    records, digest, done = resumed
    assert [r["step"] for r in records] == [r["step"] for r in straight[0]]
    for ours, theirs in zip(records, straight[0], strict=True):
        assert ours == theirs, f"step {ours['step']}"
    assert (digest, done) == straight[1:]


LIMITED = ("mixture.digits.max_epochs=0.34",)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], str, dict]:
    run_dir = tmp_path_factory.mktemp("straight") / "s1_encoders"
    found = finish("s1_encoders", run_dir, *LIMITED)
    assert found[0][-2]["step"] == NUM_STEPS
    assert len({r["samples"] for r in found[0][:-1]}) == NUM_STEPS, "every step has samples of its own"
    ((source, step),) = ran_dry(run_dir)
    assert source == "digits" and 0 < step < 8
    return found


def test_a_stopped_and_a_killed_stage_go_on_as_if_nothing_had_happened(straight, tmp_path: Path) -> None:
    killed, seldom = tmp_path / "s1_encoders", (*LIMITED, "save_every_steps=100")
    command = stage_command("s1_encoders", killed, *seldom, "data.num_workers=1")
    steps = kill_command(command, killed, lambda: num_steps_logged(killed) >= 3, signal.SIGTERM, 85)
    (saved,) = (killed / "checkpoints").glob("step_*/COMMIT")  # the workers were told too, as by torchrun and Slurm
    assert int(saved.read_text()) == steps < 8, "a stage that is told to stop saves its last step"

    assert 9 <= kill_when("s1_encoders", killed, lambda: num_steps_logged(killed) >= 9, *LIMITED) < NUM_STEPS
    assert_same(finish("s1_encoders", killed, *LIMITED), straight)
    assert len(ran_dry(killed)) == 1, "before the checkpoint that it went on from: told once"

    (killed / "DONE").unlink()  # as if killed in its last evaluation
    shutil.rmtree(killed / "export")
    newest = sorted((killed / "checkpoints").glob("step_*/COMMIT"))[-1]
    before = newest.stat().st_ino
    assert_same(finish("s1_encoders", killed, *seldom), straight)
    assert newest.stat().st_ino == before, "what is committed is not written again"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "stage, precision", [("s1_encoders", "fp32"), ("s2_general", "bf16"), ("s3_long_context", "fp32")]
)
def test_kills_at_random_points_and_during_a_save_leave_no_trace(stage: str, precision: str, tmp_path: Path) -> None:
    extra = (f"engine.precision={precision}",)
    straight = finish(stage, tmp_path / "straight" / stage, *extra)
    killed = tmp_path / "killed" / stage
    draw = random.Random(stage)
    first = draw.randint(1, 4)
    steps = [kill_when(stage, killed, lambda: num_steps_logged(killed) >= first, *extra)]

    steps.append(kill_when(stage, killed, lambda: is_saving(killed) and num_steps_logged(killed) >= 4, *extra))
    is_cut_short = is_saving(killed)
    later = draw.randint(steps[-1] + 1, NUM_STEPS - 2)
    steps.append(kill_when(stage, killed, lambda: num_steps_logged(killed) >= later, *extra))
    print(f"\n{stage}: killed after steps {steps}, the second while saving (left uncommitted: {is_cut_short})")
    assert_same(finish(stage, killed, *extra), straight)
    assert not is_saving(killed), "folders of interrupted saves are removed"


SHORT = ("stage.context=32", "stage.total_tokens=448")
"""Seven steps of 64 codec frames."""
ADVERSARIES = ("+stage.components.discriminator={lr: 2e-4, weight_decay: 0.0}", "stage.reconstruction.adversarial=0.1")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_codec_and_code2wav_with_both_optimizers_and_the_average_go_on_too(tmp_path: Path) -> None:
    codec = finish("codec", tmp_path / "straight" / "codec", *SHORT)
    killed = tmp_path / "killed" / "codec"
    kill_command(stage_command("codec", killed, *SHORT), killed, lambda: num_steps_logged(killed) >= 3)
    assert_same(finish("codec", killed, *SHORT), codec)
    extra = (*SHORT, f"+init.codec_encoder={tmp_path / 'straight' / 'codec' / 'export'}", *ADVERSARIES)
    code2wav = finish("code2wav", tmp_path / "straight" / "code2wav", *extra)
    assert {"loss/discriminator", "grad_norm/code2wav", "grad_norm/discriminators"} <= set(code2wav[0][0])
    killed = tmp_path / "killed" / "code2wav"
    kill_command(stage_command("code2wav", killed, *extra), killed, lambda: num_steps_logged(killed) >= 5)
    assert_same(finish("code2wav", killed, *extra), code2wav)
