"""Post-training steps are the same however they are cut: 20 steps on the same packs, EP 2 on two ranks against one.

The packs are what rollouts leave: documents of every modality, their log-probabilities when sampled, advantages. A loss
of advantages passes through zero, so deviations are relative to the largest value of a trajectory: 1e-5, gradient norms
1e-4.
"""

from __future__ import annotations

import numpy as np
import pytest
from support import (
    Case,
    Trajectory,
    component_hashes_of,
    make_trainer,
    packs_of_rank,
    run_config_in,
    run_ranks,
    teacher_folder,
    tokenizer_folder,
    trajectory,
)

from omni_train.data.tokenizer import load_tokenizer, token_ids
from omni_train.engine.export import component_hashes, full_state_dict
from omni_train.engine.parallel import Ranks

TOLERANCE, NORM_TOLERANCE = 1e-5, 1e-4
GSPO = Case(objective="gspo", kl_weight=0.1, lr=1e-3)
DISTILLATION = Case(objective="distillation", beta=0.5, lr=1e-3)
EP_2 = {"world": 2, "expert_parallel": 2}


def deviation(a: Trajectory, b: Trajectory) -> dict[str, float]:
    """By metric, the largest |Δ| over the steps relative to the largest value."""
    names = [name for name in b if name.startswith(("loss", "gspo", "grad_norm"))]
    return {name: float(np.abs(a[name] - b[name]).max() / max(np.abs(b[name]).max(), 1e-3)) for name in names}


def check(case: Case, reference: Case) -> None:
    found = deviation(trajectory(case), trajectory(reference))
    print("\n", {name: f"{value:.1e}" for name, value in found.items()})
    allowed = {name: NORM_TOLERANCE if name.startswith("grad_norm") else TOLERANCE for name in found}
    wrong = {name: value for name, value in found.items() if not value <= allowed[name]}
    assert not wrong, wrong


def changed(case: Case, **how) -> Case:
    return Case(**{**{name: getattr(case, name) for name in case.__dataclass_fields__}, **how})


@pytest.mark.parametrize(
    "case", [pytest.param(GSPO, id="gspo"), pytest.param(DISTILLATION, id="distillation", marks=pytest.mark.slow)]
)
def test_two_ranks_with_shared_experts_take_the_same_steps(case):
    check(changed(case, **EP_2), case)


@pytest.mark.parametrize(
    "case", [pytest.param(GSPO, id="gspo"), pytest.param(DISTILLATION, id="distillation", marks=pytest.mark.slow)]
)
def test_packed_documents_take_the_same_steps_as_separate_ones(case):
    check(changed(case, documents_per_pack=4), case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [GSPO, DISTILLATION], ids=["gspo", "distillation"])
def test_zero_3_takes_the_same_steps(case):
    check(changed(case, world=2, zero_stage=3, shards_all=True), case)


def test_a_wrong_divisor_would_show():
    found = deviation(trajectory(changed(GSPO, world=2, mutation="local_counts")), trajectory(GSPO))
    assert max(found.values()) > 100 * TOLERANCE


def test_distillation_falls_and_gspo_moves_its_ratio():
    losses = trajectory(DISTILLATION)["loss"]
    assert losses[-3:].mean() < 0.95 * losses[:3].mean()
    found = trajectory(GSPO)
    assert np.abs(np.diff(found["gspo/ratio"])).max() > 0.01 and found["gspo/kl"][0] < 1e-6 < found["gspo/kl"][-1]


def train_and_hash(ranks: Ranks, case: Case, folder: str, teacher: str) -> tuple[dict, dict, dict]:
    """Hashes of the student, and of the model asked, before and after two steps."""
    config = run_config_in(case, folder, teacher)
    ids = token_ids(load_tokenizer(folder))
    trainer = make_trainer(config, ranks, len(packs_of_rank(case, config, ids, 0, ranks.rank)))
    (asked,) = trainer.stage.references.values()
    assert not any(parameter.requires_grad for parameter in asked.parameters())
    before, asked_before = component_hashes_of(trainer), component_hashes(full_state_dict(asked))
    for step in range(2):
        trainer.step(packs_of_rank(case, config, ids, step, ranks.rank))
    after, asked_after = component_hashes_of(trainer), component_hashes(full_state_dict(asked))
    assert all(before[name] != after[name] for name in before), "the student trains"
    return before, asked_before, asked_after


@pytest.mark.parametrize("case", [GSPO, DISTILLATION], ids=["gspo", "distillation"])
def test_the_model_that_is_asked_never_moves_and_is_not_exported(case):
    case = changed(case, **EP_2)
    teacher = teacher_folder() if case is not GSPO else ""
    for before, asked_before, asked_after in run_ranks(2, train_and_hash, case, tokenizer_folder(), teacher):
        assert asked_before == asked_after
        assert (before == asked_before) == (case.objective == "gspo"), "the reference is where the policy started"
