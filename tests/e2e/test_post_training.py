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
