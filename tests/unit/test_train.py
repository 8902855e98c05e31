import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import (
    Case,
    Ranks,
    component_hashes_of,
    make_trainer,
    packs_of_rank,
    run_config,
    run_config_in,
    run_ranks,
    tokenizer_folder,
)

from omni_train.config import ComponentConfig, Schedule
from omni_train.data.bad_samples import BadSampleLog
from omni_train.data.contracts import BadSample
from omni_train.data.shard import DataError
from omni_train.data.tokenizer import load_tokenizer, token_ids
from omni_train.engine import parallel
from omni_train.engine.deepspeed import non_finite_gradients, set_learning_rates
from omni_train.objectives.terms import Losses, LossTerm
from omni_train.train import NonFiniteError, StepSums, learning_rate_scale


def stage(**changes):
    values = {"warmup_tokens": 100.0, "total_tokens": 1100.0, "min_lr_ratio": 0.1, **changes}
    return dataclasses.replace(run_config(Case()).stage, **values)


@pytest.mark.parametrize(
    "schedule, tokens, expected",
    [
        (Schedule.cosine, 0, 0.01),  # the first step is not lost: as if after one token
        (Schedule.cosine, 50, 0.5),
        (Schedule.cosine, 100, 1.0),
        (Schedule.cosine, 350, 0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5))),  # a quarter of the way: cos 45°
        (Schedule.cosine, 600, 0.55),
        (Schedule.cosine, 1100, 0.1),
        (Schedule.cosine, 5000, 0.1),
        (Schedule.linear, 350, 0.775),
        (Schedule.linear, 600, 0.55),
        (Schedule.linear, 1100, 0.1),
        (Schedule.constant, 50, 0.5),
        (Schedule.constant, 600, 1.0),
        (Schedule.constant, 5000, 1.0),
    ],
)
def test_learning_rate_scale(schedule, tokens, expected):
    assert learning_rate_scale(stage(schedule=schedule), tokens) == pytest.approx(expected)


def test_learning_rate_without_warm_up_starts_at_its_maximum():
    assert learning_rate_scale(stage(warmup_tokens=0.0, schedule=Schedule.linear), 0) == 1.0


def test_each_group_gets_its_components_rate():
    groups = [{"component": name, "lr": 9.0} for name in ("llm", "audio_adapter", "llm")]
    components = {"llm": ComponentConfig(lr=1e-3), "audio_adapter": ComponentConfig(lr=4e-3)}
    set_learning_rates(SimpleNamespace(optimizer=SimpleNamespace(param_groups=groups)), components, 0.5)
    assert [group["lr"] for group in groups] == [5e-4, 2e-3, 5e-4]


def losses(nats, labels, router, assignments):
    """An objective's answer for a pack: ``nats`` over ``labels`` of text, audio and image, router loss and counts."""
    reported = {
        f"loss/{name}": torch.tensor(pair) for name, *pair in zip(("text", "audio", "image"), nats, labels, strict=True)
    }
    terms = [
        LossTerm("thinker", "next_token", torch.tensor(sum(nats)), "labels"),
        LossTerm("thinker", "router", torch.tensor(router), "tokens", 0.1),
    ]
    return Losses(terms, reported, None if assignments is None else torch.tensor(assignments))


def two_packs():
    sums = StepSums()
    sums.add(losses([6.0, 0.0, 3.0], [2, 0, 1], 5.0, [[1.0, 3.0]]))
    sums.add(losses([1.0, 0.0, 0.0], [2, 0, 0], 7.0, [[2.0, 2.0]]))
    return sums


def test_step_sums_weigh_tokens_not_packs():
    sums = two_packs()
    found = sums.means({"labels": 5.0, "tokens": 8.0})
    # 10 nats over 5 labels; the mean of the packs' means would be 1.75.
    assert found == {"loss": 2.0, "loss/router": 1.5, "loss/text": 1.75, "loss/image": 3.0}
    assert sums.router_counts.tolist() == [[3.0, 5.0]]


def test_step_sums_without_router_or_labels():
    sums = StepSums()
    sums.add(losses([0.0] * 3, [0] * 3, 0.0, None))
    assert sums.means({"labels": 1.0, "tokens": 1.0}) == {"loss": 0.0, "loss/router": 0.0}
    assert sums.router_counts is None


def reduced(ranks: Ranks):
    sums = two_packs()
    if ranks.rank == 1:  # this rank has audio besides
        sums.add(losses([0.0, 8.0, 0.0], [0, 2, 0], 1.0, [[0.0, 1.0]]))
    sums.reduce()
    assert sums.are_finite()
    return sums.means({"labels": 12.0, "tokens": 10.0}), sums.router_counts.tolist()


def test_step_sums_over_ranks():
    means = {"loss": 28 / 12, "loss/router": 2.5, "loss/text": 1.75, "loss/audio": 4.0, "loss/image": 3.0}
    assert run_ranks(2, reduced) == [(means, [[6.0, 11.0]])] * 2


def one_rank_is_bad(ranks: Ranks, value: float):
    sums = two_packs()
    if ranks.rank == 1:
        sums.add(losses([0.0, value, 0.0], [0, 2, 0], 1.0, [[0.0, 1.0]]))
    sums.reduce()
    return sums.are_finite()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_every_rank_knows_of_a_loss_that_is_not_finite(value):
    assert run_ranks(2, one_rank_is_bad, value) == [False, False]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_gradients_are_named_while_one_looks(value):
    engine = SimpleNamespace(module=torch.nn.Linear(2, 1))
    with non_finite_gradients([engine]) as found:
        engine.module(torch.tensor([1.0, 2.0])).sum().backward()
        assert found == []
        engine.module(torch.tensor([1.0, value])).sum().backward()
    engine.module(torch.tensor([1.0, value])).sum().backward()
    assert [what for _, what in found] == ["gradient of weight"]


def poisoned(ranks: Ranks, folder: str, kind: str, zero_stage: int, precision: str):
    """A good step, then one that is broken on rank 1: the error, whether the weights stayed, and the step.

    ``loss``: a clip of NaN. ``gradient``: the loss stays as it is, with the root of zero added.
    """
    kinds, expert_parallel = ("text", "text", "text", "audio"), 2 if zero_stage < 3 else 1
    case = Case(kinds=kinds, world=2, expert_parallel=expert_parallel, zero_stage=zero_stage, precision=precision)
    config, ids = run_config_in(case, folder), token_ids(load_tokenizer(folder))
    trainer = make_trainer(config, ranks, 2)
    trainer.step(packs_of_rank(case, config, ids, 0, ranks.rank))
    before = component_hashes_of(trainer)
    packs = packs_of_rank(case, config, ids, 1, ranks.rank)
    if ranks.rank == 1 and kind == "loss":
        packs[1].mel[0, 0] = math.nan
    if ranks.rank == 1 and kind == "gradient":
        usual = trainer.stage.losses

        def losses(pack, fractions):
            found = usual(pack, fractions)
            if pack.sample_ids == packs[1].sample_ids:
                term = found.terms[0]
                zero = term.sum - term.sum.detach()
                found.terms[0] = dataclasses.replace(term, sum=term.sum + zero.sqrt())
            return found

        trainer.stage.losses = losses
    try:
        trainer.step(packs)
    except NonFiniteError as error:
        return str(error), component_hashes_of(trainer) == before, trainer.position.step
    return "no error", False, trainer.position.step


@pytest.mark.parametrize("kind, found", [("loss", "loss next_token"), ("gradient", "gradient of llm.lm_head.weight")])
@pytest.mark.parametrize(
    "zero_stage, precision",
    [
        (1, "fp32"),
        (1, "bf16"),
        pytest.param(2, "fp32", marks=pytest.mark.slow),
        pytest.param(2, "bf16", marks=pytest.mark.slow),
        pytest.param(3, "fp32", marks=pytest.mark.slow),
    ],
)
def test_what_is_not_finite_stops_every_rank_before_the_optimizer(kind, found, zero_stage, precision):
    first, second = run_ranks(2, poisoned, tokenizer_folder(), kind, zero_stage, precision)
    assert first == second
    message, is_unmoved, step = first
    assert message.startswith("step 2: not finite, and stopped before the optimizer step: ")
    assert f"{found} in pack 1 of rank 1, samples step1/3." in message and "rank 0" not in message
    assert is_unmoved and step == 1


def left_out(ranks: Ranks, folder: str, path: str, allowed: float):
    """Two steps; in the first, rank 1's packs left out a sample: the error, whether the weights stayed, the steps done,
    the samples counted, and the collectives of each step done."""
    case = Case(kinds=("text",) * 4, world=2)
    config, ids = run_config_in(case, folder), token_ids(load_tokenizer(folder))
    trainer = make_trainer(config, ranks, 2)
    trainer.bad_samples = BadSampleLog(Path(path), [], allowed)
    before, gather, sums = component_hashes_of(trainer), torch.distributed.all_gather_object, parallel.sum_over_ranks
    calls: list[str] = []
    torch.distributed.all_gather_object = lambda *args: (calls.append("gather"), gather(*args))[1]
    parallel.sum_over_ranks = lambda *args: (calls.append("sum"), sums(*args))[1]
    error, done = "", []
    for step in range(2):
        packs = packs_of_rank(case, config, ids, step, ranks.rank)
        if ranks.rank == 1 and step == 0:
            packs[1].bad_samples = [BadSample("s.tar", "k", 512, "broken")]
        try:
            trainer.step(packs)
        except DataError as found:
            error = str(found)
            break
        done.append([*calls])
        calls.clear()
    return error, component_hashes_of(trainer) == before, trainer.position.step, trainer.bad_samples.count, done


def test_a_sample_left_out_on_one_rank_is_logged_by_all_and_costs_other_steps_nothing(tmp_path):
    path = tmp_path / "bad_samples.jsonl"
    found = run_ranks(2, left_out, tokenizer_folder(), str(path), 1)
    assert found == [("", False, 2, 1, [["sum", "gather", "sum"], ["sum", "sum"]])] * 2
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1]


def test_a_sample_left_out_past_the_budget_stops_every_rank_before_the_optimizer(tmp_path):
    first, second = run_ranks(2, left_out, tokenizer_folder(), str(tmp_path / "bad_samples.jsonl"), 0)
    assert first == second and first[1:] == (True, 0, 1, [])
    assert first[0].startswith("s.tar: sample 'k': byte 512: broken; ") and "1 bad sample, 0 allowed" in first[0]


def digests(ranks: Ranks, folder: str):
    case = Case(kinds=("text",) * 4)
    config, ids = run_config_in(case, folder), token_ids(load_tokenizer(folder))
    trainer = make_trainer(config, ranks, 4 // ranks.world)
    packs = packs_of_rank(dataclasses.replace(case, world=ranks.world), config, ids, 0, ranks.rank)
    other = packs_of_rank(dataclasses.replace(case, world=ranks.world), config, ids, 1, ranks.rank)
    for pack in (*packs, *other):
        pack.sample_ids = [f"{name}/caf\udce9" for name in pack.sample_ids]  # as of a key that is Latin-1
    return [trainer._agree(part)[1] for part in (packs, packs[::-1], other)]


def test_the_digest_of_a_steps_samples_is_free_of_their_order_and_of_the_ranks():
    (one,), two = run_ranks(1, digests, tokenizer_folder()), run_ranks(2, digests, tokenizer_folder())
    assert two == [one, one]
    assert one[0] == one[1] != one[2]
    assert len(one[0]) == 14
