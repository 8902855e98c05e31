"""Post-training through the real command: two ranks that share experts, killed inside a cycle; a teacher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from corpus import omni_train, overrides
from test_resume import assert_same, kill_command, num_steps_logged, outcome

# An untrained model answers at random: what it can earn is that some letter is missing.
SIGNAL = "{right: {rule: format, pattern: '[^e]*'}}"
SMALL = ("data.packs_per_lane=4", "stage.rollout.max_new_tokens=10", "stage.rollout.group_size=4")
GSPO = (
    f"stage.gspo.rewards={SIGNAL}",
    "~stage.gspo.rewards.short",
    "stage.gspo.kl_weight=0.1",
    *SMALL,
    "stage.rollout.updates_per_cycle=4",
)


def records_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def command(stage: str, run_dir: Path, *extra: str) -> list[str]:
    return ["train", stage, *overrides(run_dir, *extra)]


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_gspo_killed_inside_a_cycle_goes_on_bit_for_bit(tmp_path: Path) -> None:
    values = (*GSPO, "stage.total_tokens=2400", "save_every_steps=3")
    done = omni_train(*command("thinker_gspo", tmp_path / "straight" / "gspo", *values))
    assert done.returncode == 0, done.stdout + done.stderr
    straight = outcome(tmp_path / "straight" / "gspo")
    records = straight[0]
    assert len(records) > 6 and any("reward" not in record for record in records[:-1]), "cycles of several steps"
    assert any(abs(record["gspo/ratio"] - 1) > 1e-6 for record in records[:-1]), "later steps of a cycle are off policy"
    assert all(record["gspo/kl"] >= 0 for record in records[:-1])
    killed = tmp_path / "killed" / "gspo"
    kill_command(command("thinker_gspo", killed, *values), killed, lambda: num_steps_logged(killed) >= 4)
    newest = sorted((killed / "checkpoints").glob("step_*/COMMIT"))[-1].parent
    waiting = torch.load(newest / "rank_0.pt", weights_only=True)["rollouts"]["waiting"]
    print(f"\nkilled; {newest.name} has {len(waiting)} updates waiting")
    assert waiting, "the kill is inside a cycle"
    done = omni_train(*command("thinker_gspo", killed, *values))
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same(outcome(killed), straight)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a Thinker twice as wide, after a step."""
    run_dir = tmp_path_factory.mktemp("teacher") / "s2_general"
    wider = ("model.text.hidden_size=64", "model.text.num_experts=8", "stage.total_tokens=400")
    done = omni_train(*command("s2_general", run_dir, *wider))
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir / "export"


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("stage", ["thinker_distill_on", "thinker_distill_off"])
def test_distillation_from_a_wider_teacher(stage: str, teacher: Path, tmp_path: Path) -> None:
    values = (f"+init.teacher={teacher}", "data.packs_per_lane=4", "stage.rollout.max_new_tokens=6")
    done = omni_train(*command(stage, tmp_path / stage, *values, "stage.total_tokens=900"))
    assert done.returncode == 0, done.stdout + done.stderr
    *records, _ = records_of(tmp_path / stage)
    assert len(records) >= 2 and all(record["loss"] > 0 for record in records)
    for record in records:  # an untrained model rarely ends an answer
        assert 4 < record["rollout/tokens"] <= 6 and record["rollout/truncated"] > 0.5
        assert record["loss/next_token"] > record["loss"] / 10
    from transformers import AutoConfig

    assert AutoConfig.from_pretrained(tmp_path / stage / "export").text_config.hidden_size == 32, "the student's"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_missing_teacher_and_one_of_another_kind_are_named(teacher: Path, tmp_path: Path) -> None:
    done = omni_train(*command("thinker_distill_on", tmp_path / "run", "data.packs_per_lane=4"))
    assert done.returncode == 2 and "thinker_distill_on needs a teacher: +init.teacher=FOLDER" in done.stderr
    done = omni_train(*command("thinker_gspo", tmp_path / "run", *GSPO, f"+init.teacher={teacher}"))
    assert done.returncode == 2 and "init: no component is called 'teacher'" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_fifty_live_steps_with_answers_of_different_lengths_do_not_hang(tmp_path: Path) -> None:
    done = omni_train(*command("thinker_gspo", tmp_path / "gspo", *GSPO, "stage.total_tokens=22000"), timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    *records, _ = records_of(tmp_path / "gspo")
    assert len(records) >= 50
    lengths = [record["rollout/tokens"] for record in records if "rollout/tokens" in record]
    assert min(lengths) < 10, "some answers end early"
