"""What post-training of a Thinker changed: how near it came to its teacher, which rewards its answers get.

    start (config.init) ─┐                     ┌─ KL(teacher ‖ ·) on held-out replies ──▶ gap_closed
    export of the stage ─┴─ both, side by side ┴─ rewards of sampled answers ──▶ reward_start, reward_end

Figures are named after the stage without its ``thinker_``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from omni_train.config import ConfigError, RunConfig, ShardsConfig, init_of
from omni_train.data.contracts import Document, Pack, Prompt, Sample
from omni_train.data.encode import Encoder, collate
from omni_train.data.pipeline import DataPipeline
from omni_train.engine import parallel
from omni_train.engine.deepspeed import build_engine
from omni_train.engine.parallel import Ranks
from omni_train.evaluation.capabilities import LeftOut, gather, load_frozen, split_tasks
from omni_train.evaluation.heldout import heldout_losses
from omni_train.models.thinker import Thinker
from omni_train.models.weights import load_thinker
from omni_train.objectives.distillation import TeacherStates, divergence_from, states_of
from omni_train.rollout.rewards import Answered, Rewards, build_rule
from omni_train.rollout.sample import ThinkerSampler

TOKENS_A_SOURCE = 30_000
FORM = ("format", "overlong")
"""Rules that judge an answer's form: left out of what is reported as reward."""

Output = dict[str, Tensor]
Figures = tuple[str, dict[str, float], dict[str, float]]
"""Name of what was measured, figures, controls."""


def stage_figures(
    config: RunConfig, folder: Path, tasks: dict[str, str], split: str, ranks: Ranks
) -> Iterator[Figures]:
    """Figures of an export of a stage of distillation or GSPO, beside those of what the stage started from.

    Collective. Raises ConfigError where the configuration does not say what the stage started from.
    """
    start = init_of(config.init, "llm")
    if start is None:
        raise ConfigError(f"{config.stage.name} is measured against its start; add +init.thinker=ITS_EXPORT")
    before, data = load_frozen(config, Path(start), ranks, use_yarn=True)
    after, _ = load_frozen(config, folder, ranks, use_yarn=True)
    name = config.stage.name.removeprefix("thinker_")
    if config.stage.distillation is not None:
        teacher = load_thinker(Path(config.init["teacher"]))
        frozen = build_engine(teacher, config.engine, config.stage, None, micro_batches=1).eval().to(ranks.device)
        gap, left = divergences([before, after], frozen, data, tasks, split, ranks)
        closed = {f"{name}_gap_closed": 1 - left / gap, f"{name}_kl": left}
        yield name, closed, {f"{name}_kl": gap}
    else:
        yield from reward_figures(name, before, after, data, tasks, split, ranks)


def divergences(
    students: Sequence[Thinker],
    teacher: Thinker,
    data: DataPipeline,
    tasks: dict[str, str],
    split: str,
    ranks: Ranks,
) -> list[float]:
    """KL(teacher ‖ student) of each student in nats a token on the replies of a split, the mean over the sources of
    ``tasks``. The teacher reads them once. Collective."""

    @torch.no_grad()
    def forward(student: Thinker, said: list[TeacherStates], turn: Iterator[TeacherStates], pack: Pack) -> Output:
        if (states := next(turn, None)) is None:
            said.append(states := states_of(teacher, pack))
        output = student(pack, divergence_from(states, beta=0.0, temperature=1.0))
        return {"losses": output["divergences"], "modality": output["modality"]}

    found = []
    for source in sorted(set(tasks.values())):
        shards = ShardsConfig(shards=[f"{split}/{source}/*.tar"])
        plans = data.validation_packs(source, shards, TOKENS_A_SOURCE)
        said: list[TeacherStates] = []  # of this rank's packs, which every student meets in the same order
        row, left_out = [], LeftOut(data, data.indexed(shards))
        for student in students:
            score = partial(forward, student, said, iter([*said]))
            losses, bad = heldout_losses(score, plans, data.validation_builder(source, shards), data.dummy, ranks)
            if not losses:
                raise ConfigError(f"no sample in {split}/{source} can be read, or has a label")
            row.append(float(np.mean(list(losses.values()))))
        found.append(row)
        everywhere = itertools.chain.from_iterable(parallel.lists_of_ranks(bad))
        for one in sorted(everywhere, key=lambda one: (one.shard, one.offset)):
            left_out.add(one)
    return [float(value) for value in np.mean(found, axis=0)]


def reward_figures(
    name: str, before: Thinker, after: Thinker, data: DataPipeline, tasks: dict[str, str], split: str, ranks: Ranks
) -> Iterator[Figures]:
    """Mean rewards of one sampled answer to each prompt, rules of form left out, and the distance to the start.

    Tasks called ``…_unseen``, of which nothing was trained, are reported apart.
    """
    config = data.config
    assert config.stage.gspo is not None and config.stage.rollout is not None
    samples = split_tasks(data, tasks, split)
    settings = {key: own for key, own in config.stage.gspo.rewards.items() if own.rule not in FORM}
    longest = config.stage.rollout.max_new_tokens
    rules = {key: build_rule(key, own, longest, ranks.device) for key, own in settings.items()}
    rewards = Rewards(rules, settings, list(config.mixture))
    for suffix, is_unseen in (("", False), ("_unseen", True)):
        names = [task for task in samples if task.endswith("_unseen") is is_unseen]
        chosen = [(tasks[task], sample) for task in names for sample in samples[task]]
        if chosen:
            start, end = (mean_reward(thinker, data, chosen, rewards, ranks) for thinker in (before, after))
            figures = {f"{name}{suffix}_reward_start": start, f"{name}{suffix}_reward_end": end}
            if not is_unseen:
                figures[f"{name}_kl_to_start"] = divergences([before], after, data, tasks, split, ranks)[0]
            yield f"{name}{suffix}", figures, {}


def mean_reward(
    thinker: Thinker, data: DataPipeline, chosen: Sequence[tuple[str, Sample]], rewards: Rewards, ranks: Ranks
) -> float:
    """Mean reward of a sampled answer to each (source, sample). Ranks take equally many prompts. Collective."""
    rollout, encoder = data.config.stage.rollout, data.encoder
    assert rollout is not None and isinstance(encoder, Encoder)

    def to_pack(documents: list[Document]) -> Pack:
        return collate(documents, patch_dim=encoder.geometry.patch_dim).to(ranks.device)

    sampler = ThinkerSampler(
        thinker,
        rollout,
        to_pack,
        stop_id=encoder.ids.im_end,
        batch=rollout.sample_batch,
        is_open_anywhere=partial(parallel.any_rank, device=ranks.device),
    )
    mine = list(chosen[ranks.rank :: ranks.world])
    filled = mine + [chosen[0]] * (math.ceil(len(chosen) / ranks.world) - len(mine))
    prompts = [Prompt(*encoder.prompt_and_answer(sample)) for _, sample in filled]
    keys = [f"evaluation/{sample.id}" for _, sample in filled]
    found = []
    for (source, _), prompt, answers in zip(mine, prompts, sampler(prompts, keys, 1), strict=False):
        text = encoder.tokenizer.decode(answers[0].tokens, skip_special_tokens=True)
        answered = Answered(text, prompt.reference, prompt.question, len(answers[0].tokens), answers[0].is_ended)
        found.append((float(rewards(source, [answered])[0][0]), 0))
    return float(np.mean([reward for reward, _ in gather(found)]))
