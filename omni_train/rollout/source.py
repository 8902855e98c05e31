"""Rollouts as a batch source: prompts in, packs of sampled answers out.

    planner's prompts ──Sampler──▶ answers ──Rewards──▶ advantages ──▶ Groups ──updates of a cycle──▶ Packs

A cycle samples answers to data.lanes × packs_per_lane prompts with the weights of that moment; ``updates_per_cycle``
optimizer steps learn from them. What waits for its step is in ``state_dict``: answers as they are, prompts by the place
of their sample. Random numbers are keyed by (seed, cycle, draw, sample, copy), so a killed run goes on bit for bit.

Every rank makes equally many packs of equally many documents at most, whatever its answers are: an answer may fill
max_new_tokens, and so many such documents share a pack that they fit the context.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from omni_train.config.post_training import RolloutConfig
from omni_train.data.contracts import BadSample, Document, DocumentPlan, Pack, PackPlan, Prompt
from omni_train.data.mixture import OutOfData
from omni_train.objectives.gspo import group_advantages, has_signal
from omni_train.rollout.rewards import Answered, RewardError, Rewards
from omni_train.rollout.sample import Answer, Sampler

MAX_IDLE_CYCLES = 100
"""So many cycles in a row without a group whose rewards differ stop a run: nothing would be learned."""


class PromptSource(Protocol):
    """The planner's prompts (a StepLoader)."""

    def next_step(self) -> list[Prompt]: ...


@dataclass(slots=True)
class Group:
    """The answers to one prompt, with the advantage of each. Without answers it stands for nothing."""

    prompt: Prompt
    answers: list[Answer]
    advantages: np.ndarray


@dataclass(slots=True)
class Update:
    """What one optimizer step learns from on this rank: groups, and what is reported with them."""

    groups: list[Group]
    statistics: dict[str, Tensor]
    bad: list[BadSample]


def continued(prompt: Document, answer: Answer, name: str) -> Document:
    """The prompt with its answer, which is what carries labels."""
    tokens, length = answer.tokens, prompt.num_tokens
    first = int(prompt.position_ids.max()) + 1
    return dataclasses.replace(
        prompt,
        sample_id=name,
        input_ids=np.concatenate([prompt.input_ids, tokens]),
        labels=np.concatenate([np.full(length, -100), tokens]),
        position_ids=np.concatenate(
            [prompt.position_ids, np.tile(np.arange(first, first + len(tokens)), (3, 1))], axis=1
        ),
    )


def pack_answers(documents: list[tuple[Document, Answer, float]], collate: Callable[[list[Document]], Pack]) -> Pack:
    """The pack of (document, its answer, advantage), with the log-probabilities where the labels are."""
    pack = collate([document for document, _, _ in documents])
    rows = []
    for document, answer, _ in documents:
        row = np.zeros(document.num_tokens, dtype=np.float32)  # shifted like the labels: token n is predicted at n − 1
        row[-len(answer.tokens) - 1 : -1] = answer.log_probabilities
        rows.append(row)
    pack.sampled_log_probabilities = torch.from_numpy(np.concatenate(rows))
    pack.advantages = torch.tensor([advantage for _, _, advantage in documents], dtype=torch.float32)
    return pack


class RolloutSource:
    """Packs of answers, step by step. ``rewards`` None: every answer is learned from alike (distillation).

    ``slots`` prompts of a lane make a cycle; ``per_pack`` documents share a pack. ``decode`` writes tokens out as text,
    ``collate`` makes a pack of documents and ``make_dummy`` one of none, ``load_prompt`` reads a prompt again by its
    plan, ``is_any`` says whether something is true on one rank. All ranks call ``next_step`` together.
    """

    def __init__(
        self,
        prompts: PromptSource,
        sampler: Sampler,
        rewards: Rewards | None,
        config: RolloutConfig,
        *,
        slots: int,
        per_pack: int,
        scale_advantages: bool,
        seed: int,
        decode: Callable[[np.ndarray], str],
        collate: Callable[[list[Document]], Pack],
        make_dummy: Callable[[], Pack],
        load_prompt: Callable[[PackPlan], Prompt],
        is_any: Callable[[bool], bool] = bool,
    ) -> None:
        self.prompts, self.sampler, self.rewards, self.config = prompts, sampler, rewards, config
        self.slots, self.per_pack, self.scale_advantages, self.seed = slots, per_pack, scale_advantages, seed
        self.decode, self.collate, self.make_dummy = decode, collate, make_dummy
        self.load_prompt, self.is_any = load_prompt, is_any
        self.cycle = 0
        self.num_idle = 0
        self.waiting: list[Update] = []

    def next_step(self) -> list[Pack]:
        """This rank's packs of the next optimizer step; cycles are sampled until some rank has an answer to learn from.

        Raises OutOfData when the prompts end, ValueError when nothing could be learned for MAX_IDLE_CYCLES cycles.
        """
        passed: list[Update] = []
        while not passed or not self.is_any(any(group.answers for group in passed[-1].groups)):
            if not self.waiting:
                self.waiting = self._sample_cycle()
            passed.append(self.waiting.pop(0))
        packs = self._packs(passed[-1].groups)
        names = passed[-1].statistics
        for pack in packs:  # every pack reports the same names
            pack.statistics = {name: torch.zeros(2, dtype=torch.float64) for name in names}
        packs[0].statistics = {name: sum(update.statistics[name] for update in passed) for name in names}
        packs[0].bad_samples = [bad for update in passed for bad in update.bad]
        return packs

    def state_dict(self) -> dict[str, Any]:
        """What waits to be learned from, and where the cycles are: tensors and plain values, this rank's own."""
        return {
            "cycle": self.cycle,
            "num_idle": self.num_idle,
            "waiting": [
                {
                    "groups": [_group_state(group) for group in update.groups],
                    "statistics": update.statistics,
                    "bad": [dataclasses.asdict(bad) for bad in update.bad],
                }
                for update in self.waiting
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where ``state`` was taken; prompts that wait are read again."""
        self.cycle, self.num_idle = state["cycle"], state["num_idle"]
        self.waiting = [
            Update(
                [self._restore(group) for group in update["groups"]],
                update["statistics"],
                [BadSample(**bad) for bad in update["bad"]],
            )
            for update in state["waiting"]
        ]

    def _restore(self, state: dict[str, Any]) -> Group:
        if state["plan"] is None:
            return Group(self._nobody(), [], np.zeros(0))
        prompt = self.load_prompt(PackPlan(0, 0, 0, [DocumentPlan(**state["plan"])]))
        answers = [Answer(tokens.numpy(), logs.numpy(), ended) for tokens, logs, ended in state["answers"]]
        return Group(prompt, answers, state["advantages"].numpy())

    def _nobody(self) -> Prompt:
        return Prompt(Document("", "text", np.zeros(0, int), np.zeros(0, int), np.zeros((3, 0), int)))

    def _sample_cycle(self) -> list[Update]:
        """The updates of a new cycle: prompts drawn, answered and scored, those without signal drawn anew."""
        statistics = _Statistics(self.rewards)
        bad: list[BadSample] = []
        groups: list[Group | None] = []
        for number in range(self.config.max_draws):
            try:
                drawn = self._draw(number, statistics, bad)
            except OutOfData:  # on every rank; what is there already is trained on
                if number == 0:
                    raise
                break
            groups = drawn if not groups else self._fill(groups, drawn)
            if number + 1 == self.config.max_draws or not self.is_any(None in groups):
                break
        self.cycle += 1
        is_idle = not self.is_any(any(group is not None and group.answers for group in groups))
        self.num_idle = self.num_idle + 1 if is_idle else 0
        if self.num_idle >= MAX_IDLE_CYCLES:
            raise ValueError(
                f"in {self.num_idle} cycles in a row all answers to a prompt earned the same, so there is nothing to "
                "learn from: prompts too easy or too hard, too low a temperature, or too small a group_size"
            )
        kept = [group or Group(self._nobody(), [], np.zeros(0)) for group in groups]
        return self._updates(kept, statistics.pairs, bad)

    def _updates(self, groups: list[Group], statistics: dict[str, Tensor], bad: list[BadSample]) -> list[Update]:
        """The groups dealt to updates: of each lane's slots, an equal share to each."""
        share = self.slots // self.config.updates_per_cycle
        updates = []
        for number in range(self.config.updates_per_cycle):
            own = [group for n, group in enumerate(groups) if n % self.slots // share == number]
            first = number == 0
            zeros = {name: torch.zeros(2, dtype=torch.float64) for name in statistics}
            updates.append(Update(own, statistics if first else zeros, bad if first else []))
        return updates

    def _fill(self, groups: list[Group | None], drawn: list[Group | None]) -> list[Group | None]:
        """Groups without signal replaced by newly drawn ones of the same lane, in order."""
        found = list(groups)
        for first in range(0, len(groups), self.slots):
            spare = [group for group in drawn[first : first + self.slots] if group is not None]
            for n in range(first, first + self.slots):
                if found[n] is None and spare:
                    found[n] = spare.pop(0)
        return found

    def _draw(self, number: int, statistics: _Statistics, bad: list[BadSample]) -> list[Group | None]:
        """A group for each of the planner's next prompts; None where the rewards give no signal."""
        prompts = self.prompts.next_step()
        keys = [f"{self.seed}/{self.cycle}/{number}/{prompt.document.sample_id}" for prompt in prompts]
        answers = self.sampler(prompts, keys, self.config.group_size)
        return [self._group(*pair, statistics, bad) for pair in zip(prompts, answers, strict=True)]

    def _group(
        self, prompt: Prompt, answers: list[Answer], statistics: _Statistics, bad: list[BadSample]
    ) -> Group | None:
        bad += prompt.bad
        if prompt.plan is None:
            return Group(prompt, [], np.zeros(0))
        advantages = np.zeros(len(answers))
        if self.rewards is not None:
            source = prompt.plan.source
            answered = [
                Answered(self.decode(a.tokens), prompt.reference, prompt.question, len(a.tokens), a.is_ended)
                for a in answers
            ]
            try:
                total, by_rule = self.rewards(source, answered)
            except RewardError as error:
                shard, key, offset = prompt.place
                bad.append(BadSample(shard, key, offset, str(error)))
                return Group(dataclasses.replace(prompt, plan=None), [], np.zeros(0))
            rewards = torch.from_numpy(total)[None]
            is_useful = bool(has_signal(rewards)[0])
            statistics.add_rewards(source, total, by_rule, is_useful)
            advantages = group_advantages(rewards, self.scale_advantages)[0].numpy()
        statistics.add_answers(answers)
        if self.rewards is not None and not is_useful:
            return None
        if self.config.drop_truncated:
            is_kept = [answer.is_ended for answer in answers]
            answers = [answer for answer, kept in zip(answers, is_kept, strict=True) if kept]
            advantages = advantages[is_kept]
        return Group(prompt, answers, advantages)

    def _packs(self, groups: list[Group]) -> list[Pack]:
        """The answers of an update in as many packs as every rank has; dummies where there are fewer answers."""
        documents = [
            (
                continued(group.prompt.document, answer, f"{group.prompt.document.sample_id}#{n}"),
                answer,
                float(advantage),
            )
            for group in groups
            for n, (answer, advantage) in enumerate(zip(group.answers, group.advantages, strict=True))
        ]
        packs = []
        for first in range(0, len(groups) * self.config.group_size, self.per_pack):
            part = documents[first : first + self.per_pack]
            packs.append(pack_answers(part, self.collate) if part else self.make_dummy())
        return packs


class _Statistics:
    """Sums and counts over the answers of a cycle on this rank, by the name of the metric."""

    def __init__(self, rewards: Rewards | None) -> None:
        names = ["rollout/tokens", "rollout/truncated"]
        if rewards is not None:
            names += ["reward", "rollout/useful_groups"]
            names += [f"reward/{name}" for name in (*rewards.rules, *(f"source/{s}" for s in rewards.sources))]
        self.pairs = {name: torch.zeros(2, dtype=torch.float64) for name in names}

    def _add(self, name: str, values: np.ndarray) -> None:
        self.pairs[name] += torch.tensor([float(values.sum()), float(len(values))], dtype=torch.float64)

    def add_answers(self, answers: list[Answer]) -> None:
        self._add("rollout/tokens", np.array([len(answer.tokens) for answer in answers], dtype=float))
        self._add("rollout/truncated", np.array([not answer.is_ended for answer in answers], dtype=float))

    def add_rewards(self, source: str, total: np.ndarray, by_rule: dict[str, np.ndarray], is_useful: bool) -> None:
        self._add("reward", total)
        self._add(f"reward/source/{source}", total)
        self._add("rollout/useful_groups", np.array([float(is_useful)]))
        for name, values in by_rule.items():
            self._add(f"reward/{name}", values)


def _group_state(group: Group) -> dict[str, Any]:
    if not group.answers:
        return {"plan": None}
    assert group.prompt.plan is not None
    answers = [(torch.from_numpy(a.tokens), torch.from_numpy(a.log_probabilities), a.is_ended) for a in group.answers]
    return {
        "plan": dataclasses.asdict(group.prompt.plan),
        "answers": answers,
        "advantages": torch.from_numpy(group.advantages),
    }
