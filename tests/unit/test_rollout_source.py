"""Rollouts as a batch source, with a sampler made by hand: groups, filtering, updates, bad samples, state."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import tokenizer_folder

from omni_train.config.post_training import RewardConfig, RolloutConfig
from omni_train.data.contracts import BadSample, Document, DocumentPlan, Prompt
from omni_train.data.encode import collate, dummy_pack
from omni_train.data.media_tokens import MediaGeometry
from omni_train.data.mixture import OutOfData
from omni_train.data.tokenizer import load_tokenizer, token_ids
from omni_train.rollout.rewards import Rewards
from omni_train.rollout.sample import Answer
from omni_train.rollout.source import MAX_IDLE_CYCLES, RolloutSource, continued, pack_answers
from omni_train.stage.post_training import answers_a_pack, packs_a_step

GEOMETRY = MediaGeometry()


def prompt(number: int, **more) -> Prompt:
    tokens = np.arange(3) + number
    document = Document(f"s/{number}", "text", tokens, np.full(3, -100), np.tile(np.arange(3), (3, 1)))
    plan = DocumentPlan("s", 0, number, 0, 1)
    return Prompt(document, reference="7", plan=plan, place=("x.tar", f"k{number}", 512 * number), **more)


class Prompts:
    """Two lanes of two slots; numbers count up. ``bad`` numbers could not be decoded."""

    def __init__(self, steps: int = 1000, bad: tuple[int, ...] = ()) -> None:
        self.steps, self.bad, self.number = steps, bad, 0

    def next_step(self) -> list[Prompt]:
        if self.number >= 4 * self.steps:
            raise OutOfData("the end")
        found = []
        for _ in range(4):
            own = prompt(self.number)
            if self.number in self.bad:
                own = Prompt(own.document, plan=None, bad=[BadSample("x.tar", f"k{self.number}", 0, "broken")])
            found.append(own)
            self.number += 1
        return found


class Sampler:
    """Answers ``[digit]`` of three: those of prompt n are 7 where its row of the table says so."""

    def __init__(self, rows: dict[int, list[int]]) -> None:
        self.rows, self.keys = rows, []

    def __call__(self, prompts, keys, copies):
        self.keys.append(list(keys))
        found = []
        for own in prompts:
            row = self.rows.get(int(own.document.sample_id[2:]), [1, 0, 0])
            answers = [
                Answer(np.array([70 + n, right]), np.array([-0.5, -n / 4], np.float32), is_ended=n < 2)
                for n, right in enumerate(row)
            ]
            found.append(answers[:copies])
        return found


def source_of(sampler, prompts=None, rules=None, rewards=True, per_pack=2, **config) -> RolloutSource:
    rules = rules or {"right": lambda answers: [float(answer.text == "right") for answer in answers]}
    settings = {name: RewardConfig(rule="exact") for name in rules}
    ids = token_ids(load_tokenizer(tokenizer_folder()))
    return RolloutSource(
        prompts or Prompts(),
        sampler,
        Rewards(rules, settings, ["s"]) if rewards else None,
        RolloutConfig(max_new_tokens=4, group_size=3, **config),
        slots=2,
        per_pack=per_pack,
        scale_advantages=False,
        seed=5,
        decode=lambda tokens: "right" if tokens[1] else "wrong",
        collate=lambda documents: collate(documents, patch_dim=GEOMETRY.patch_dim),
        make_dummy=lambda: dummy_pack(GEOMETRY, ids),
        load_prompt=lambda plan: prompt(plan.documents[0].index),
    )


NO_SIGNAL = [0, 0, 0]


def prompts_of(packs) -> list[str]:
    """The prompts whose answers lie in the packs, in order."""
    return list(dict.fromkeys(name.split("#")[0] for pack in packs for name in pack.sample_ids))


def test_an_answer_goes_on_from_its_prompt_with_labels_and_log_probabilities_in_place():
    own = prompt(0).document
    own.position_ids = np.array([[0, 1, 5], [0, 1, 2], [0, 1, 2]])
    answer = Answer(np.array([70, 1]), np.array([-0.5, -0.25], np.float32), True)
    document = continued(own, answer, "s/0#0")
    assert document.input_ids.tolist() == [0, 1, 2, 70, 1] and document.labels.tolist() == [-100] * 3 + [70, 1]
    assert document.position_ids[:, 3:].tolist() == [[6, 7]] * 3
    pack = pack_answers([(document, answer, 0.5)] * 2, lambda found: collate(found, patch_dim=GEOMETRY.patch_dim))
    assert pack.shift_labels.tolist() == [-100, -100, 70, 1, -100] * 2
    assert pack.sampled_log_probabilities.tolist() == [0, 0, -0.5, -0.25, 0] * 2
    assert pack.advantages.tolist() == [0.5, 0.5]


def test_a_step_has_a_fixed_number_of_packs_with_centred_advantages():
    packs = source_of(Sampler({1: NO_SIGNAL})).next_step()
    assert [pack.sample_ids for pack in packs] == [
        ["s/0#0", "s/0#1"], ["s/0#2", "s/2#0"], ["s/2#1", "s/2#2"], ["s/3#0", "s/3#1"], ["s/3#2"], [],
    ]  # fmt: skip
    assert packs[0].advantages.tolist() == pytest.approx([2 / 3, -1 / 3])
    assert packs[1].advantages.tolist() == pytest.approx([-1 / 3, 2 / 3])
    reported = {name: pair.tolist() for name, pair in packs[0].statistics.items()}
    assert reported == {
        "rollout/tokens": [24, 12],
        "rollout/truncated": [4, 12],
        "reward": [3, 12],
        "rollout/useful_groups": [3, 4],
        "reward/right": [3, 12],
        "reward/source/s": [3, 12],
    }
    for pack in packs[1:]:
        assert set(pack.statistics) == set(reported) and all(pair.sum() == 0 for pair in pack.statistics.values())


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("per_pack", [1, 2, 5, 100])
def test_a_step_has_the_packs_that_the_engine_waits_for(per_pack: int, updates: int) -> None:
    more = {"max_prompt_tokens": 6, "updates_per_cycle": updates}
    source = source_of(Sampler({1: NO_SIGNAL}), per_pack=per_pack, **more)
    stage = SimpleNamespace(rollout=source.config, context=10 * per_pack + 9)
    assert answers_a_pack(source.config, stage.context) == per_pack
    assert len(source.next_step()) == packs_a_step(SimpleNamespace(stage=stage), num_prompts=4)


def test_groups_without_signal_are_drawn_anew_from_their_own_lane():
    sampler = Sampler({1: NO_SIGNAL, 4: NO_SIGNAL})
    packs = source_of(sampler, max_draws=3).next_step()
    assert prompts_of(packs) == ["s/0", "s/5", "s/2", "s/3"]  # lane 0 had 0 and 1; its next are 4 and 5
    assert sampler.keys == [
        ["5/0/0/s/0", "5/0/0/s/1", "5/0/0/s/2", "5/0/0/s/3"],
        ["5/0/1/s/4", "5/0/1/s/5", "5/0/1/s/6", "5/0/1/s/7"],
    ]


def test_what_was_drawn_is_trained_on_when_the_prompts_end_within_a_cycle():
    packs = source_of(Sampler({1: NO_SIGNAL}), Prompts(steps=1), max_draws=3).next_step()
    assert prompts_of(packs) == ["s/0", "s/2", "s/3"]


def test_a_cycle_is_dealt_to_its_updates_by_slot_and_one_without_answers_is_passed():
    source = source_of(Sampler({0: NO_SIGNAL, 2: NO_SIGNAL}), updates_per_cycle=2)
    packs = source.next_step()  # the first update has slot 0 of each lane: nothing to learn
    assert prompts_of(packs) == ["s/1", "s/3"]
    assert packs[0].statistics["rollout/useful_groups"].tolist() == [2, 4]
    packs = source.next_step()
    assert prompts_of(packs) == ["s/4", "s/6"]
    packs = source.next_step()
    assert prompts_of(packs) == ["s/5", "s/7"]
    assert packs[0].statistics["reward"].tolist() == [0, 0], "a cycle is reported once"


def test_truncated_answers_can_be_left_out_of_the_loss_but_count_in_the_mean():
    packs = source_of(Sampler({}), drop_truncated=True).next_step()
    assert [pack.sample_ids for pack in packs[:2]] == [["s/0#0", "s/0#1"], ["s/1#0", "s/1#1"]]
    assert [len(pack.sample_ids) for pack in packs] == [2, 2, 2, 2, 0, 0]
    assert packs[0].advantages.tolist() == pytest.approx([2 / 3, -1 / 3])


@pytest.mark.parametrize(
    "rule, error",
    [
        (lambda answers: [float("nan")] * 3, "reward 'right' is not finite for the answer 'right'"),
        (lambda answers: [][0], "reward 'right' failed: IndexError"),
    ],
)
def test_a_sample_whose_reward_fails_is_written_down_and_left_out(rule, error):
    def fails_once(answers):
        fails_once.calls += 1
        return rule(answers) if fails_once.calls == 2 else [1.0, 0.0, 0.0]

    fails_once.calls = 0
    packs = source_of(Sampler({}), rules={"right": fails_once}).next_step()
    assert prompts_of(packs) == ["s/0", "s/2", "s/3"]
    (bad,) = packs[0].bad_samples
    assert (bad.shard, bad.key, bad.offset) == ("x.tar", "k1", 512) and error in bad.error


def test_a_prompt_that_could_not_be_decoded_is_written_down_and_left_out():
    packs = source_of(Sampler({}), Prompts(bad=(2,))).next_step()
    assert [bad.key for bad in packs[0].bad_samples] == ["k2"] and prompts_of(packs) == ["s/0", "s/1", "s/3"]


def test_without_rewards_every_answer_is_learned_from():
    packs = source_of(Sampler({0: NO_SIGNAL}), rewards=False).next_step()
    assert sum(len(pack.sample_ids) for pack in packs) == 12
    assert set(packs[0].statistics) == {"rollout/tokens", "rollout/truncated"}


def test_prompts_that_teach_nothing_stop_the_run_and_their_end_ends_it():
    source = source_of(Sampler({n: NO_SIGNAL for n in range(4 * MAX_IDLE_CYCLES)}))
    with pytest.raises(
        ValueError, match=f"in {MAX_IDLE_CYCLES} cycles in a row all answers to a prompt earned the same"
    ):
        source.next_step()
    source = source_of(Sampler({}), Prompts(steps=1))
    source.next_step()
    with pytest.raises(OutOfData):
        source.next_step()


def same(a, b) -> bool:
    tensors = ("input_ids", "shift_labels", "position_ids", "sampled_log_probabilities", "advantages", "cu_seqlens")
    return a.sample_ids == b.sample_ids and all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors)


def test_what_waits_is_restored_through_a_file_bit_for_bit(tmp_path):
    straight = source_of(Sampler({1: NO_SIGNAL}), updates_per_cycle=2)
    straight.next_step()
    torch.save(straight.state_dict(), tmp_path / "state.pt")
    prompts = Prompts()
    prompts.next_step()  # the planner's own state says so
    resumed = source_of(Sampler({}), prompts, updates_per_cycle=2)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(3):
        for ours, theirs in zip(resumed.next_step(), straight.next_step(), strict=True):
            assert same(ours, theirs) and ours.statistics.keys() == theirs.statistics.keys()
            assert all(torch.equal(ours.statistics[name], theirs.statistics[name]) for name in ours.statistics)
    assert resumed.sampler.keys == straight.sampler.keys[1:], "random numbers go on with the cycle"
