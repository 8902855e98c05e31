"""Held-out capabilities of an exported Thinker by greedy generation, each beside a control that cannot know.

Every rank takes its share of the items; with expert parallelism they answer in lockstep.
"""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import jiwer
import torch
import torch.distributed as dist

from omni_train.config import THINKER_COMPONENTS, ConfigError, Control, RunConfig, ShardsConfig
from omni_train.data.bad_samples import LIST_THEM, bad_sample, check_budget, is_share
from omni_train.data.chatml import final_answer
from omni_train.data.contracts import BadSample, DocumentPlan, Pack, Sample
from omni_train.data.encode import Encoder, collate
from omni_train.data.index import ShardIndex
from omni_train.data.loader import PackReader
from omni_train.data.pipeline import DataPipeline
from omni_train.engine import parallel
from omni_train.engine.deepspeed import build_engine
from omni_train.engine.parallel import Ranks
from omni_train.evaluation.controls import changeable, changed, without_motion
from omni_train.models.build import build_thinker, thinker_config
from omni_train.models.thinker import Thinker, compose
from omni_train.models.weights import load_components, yarn_factor_of
from omni_train.rollout.generate import greedy

logger = logging.getLogger(__name__)

BATCH_TOKENS = 4096
CONTROL_ITEMS = 300


@dataclass(slots=True)
class Answers:
    """(answer, reference) of every item of a task, and of its control.

    ``langs`` and ``swapped_langs`` are those of the items in order, "" where a sample names none.
    """

    name: str
    pairs: list[tuple[str, str]]
    swapped: list[tuple[str, str]]
    suffix: str = ""
    langs: list[str] = field(default_factory=list)
    swapped_langs: list[str] = field(default_factory=list)

    def named(self, figure: str) -> str:
        """The name of a figure in results.json: TASK_FIGURE."""
        return f"{self.name}_{figure}{self.suffix}"

    def by_lang(self) -> dict[str, Answers]:
        """The same answers apart by language."""
        return {
            lang: Answers(
                self.name,
                [pair for pair, own in zip(self.pairs, self.langs, strict=True) if own == lang],
                [pair for pair, own in zip(self.swapped, self.swapped_langs, strict=True) if own == lang],
                self.suffix,
            )
            for lang in sorted(set(self.langs))
        }


def langs_of(samples: list[Sample]) -> list[str]:
    """The language that each sample names; "" for none."""
    return [str(sample.content.get("lang", "")) for sample in samples]


def load_frozen(config: RunConfig, folder: Path, ranks: Ranks, use_yarn: bool) -> tuple[Thinker, DataPipeline]:
    """The exported Thinker with the YaRN of its folder, experts sharded as the engine says, and its data pipeline."""
    data = DataPipeline.of(config)
    yarn = yarn_factor_of(folder) if use_yarn else 1.0
    thinker = compose(build_thinker(thinker_config(config.model, data.tokenizer, yarn), seed=0))
    load_components(thinker, folder, set(THINKER_COMPONENTS))
    module = build_engine(thinker, config.engine, config.stage, None, micro_batches=1)
    module.eval()
    return module.to(ranks.device), data


TryOut = Callable[[Sample], object]
"""What is done with a sample. Raises ValueError for one that cannot be decoded."""


class LeftOut:
    """The bad samples of a source that is measured: each is named, and one more than data.max_bad_samples allows raises
    DataError. A share is one of this source, rounded up."""

    def __init__(self, data: DataPipeline, shards: list[tuple[str, ShardIndex]]) -> None:
        self._bad = [sample for _, index in shards for sample in index.bad]
        num_samples = sum(index.num_samples + len(index.bad) for _, index in shards)
        allowed = data.config.data.max_bad_samples
        self.allowed = math.ceil(allowed * num_samples) if is_share(allowed) else allowed
        check_budget(self._bad, self.allowed, LIST_THEM)

    def add(self, bad: BadSample) -> None:
        """Takes note of a sample whose header is good."""
        self._bad.append(bad)
        logger.warning("left out, not measured: %s, sample %r: %s", bad.shard, bad.key, bad.error)
        check_budget(self._bad, self.allowed, "the others are listed above")


def read_all(
    data: DataPipeline, source: str, settings: ShardsConfig, try_out: TryOut, tasks: Collection[str] | None = None
) -> Iterator[Sample]:
    """The samples of a source, or of some tasks in it, in order, without those that are bad (see ``LeftOut``).

    Where any may be, ``try_out`` is done with each, so that none fails later. NOTE: on every rank, which costs what
    decoding them all does.
    """
    shards = data.indexed(settings)
    left_out = LeftOut(data, shards)
    reader = PackReader({source: shards}, {source: settings})
    for number, (_, index) in enumerate(shards):
        for position in range(len(index.samples)):
            plan = DocumentPlan(source, number, position, 0, 1)
            try:
                sample = reader.read(plan)
                if tasks is not None and sample.content.get("task") not in [*tasks]:
                    continue
                if left_out.allowed:
                    try_out(sample)
            except ValueError as error:
                left_out.add(bad_sample(reader.place(plan), error))
                continue
            yield sample


def split_tasks(
    data: DataPipeline, tasks: dict[str, str], split: str, try_out: TryOut | None = None, most: int | None = None
) -> dict[str, list[Sample]]:
    """Samples of ``tasks`` ({task: source}) in a split, of each source at ``most`` so many.

    ``try_out`` (see ``read_all``): encode the prompt, if not given.

    Raises ConfigError for a task without any.
    """
    found: dict[str, list[Sample]] = {task: [] for task in tasks}
    for source in sorted(set(tasks.values())):
        own = [task for task in tasks if tasks[task] == source]
        shards = ShardsConfig(shards=[f"{split}/{source}/*.tar"])
        found_here = read_all(data, source, shards, try_out or data.message_encoder.prompt_and_answer, own)
        for sample in itertools.islice(found_here, most):
            found[sample.content["task"]].append(sample)
    for task, samples in found.items():
        if not samples:
            raise ConfigError(f"no sample of task '{task}' in {split}/{tasks[task]}; see the corpus's card.yaml")
    return found


def answer_all(
    thinker: Thinker,
    encoder: Encoder,
    samples: list[Sample],
    ranks: Ranks,
    max_new_tokens: int,
    control: Control | None = None,
) -> list[tuple[str, str]]:
    """(answer, reference) of this rank's share of the samples, or of a control on them; reasoning is left out.

    In the order of the samples. Collective: ranks run equally many batches.
    """
    mine = (changed(samples, control) if control else samples)[ranks.rank :: ranks.world]
    prompts = [encoder.prompt_and_answer(sample) for sample in mine]
    if control:
        prompts = [(without_motion(prompt, control, encoder.geometry), answer) for prompt, answer in prompts]
    filler = encoder.prompt_and_answer(samples[0])[0]  # for a rank that has run out of samples
    order = sorted(range(len(prompts)), key=lambda n: prompts[n][0].num_tokens)
    longest = max([filler.num_tokens, *(prompt.num_tokens for prompt, _ in prompts)])
    size = max(1, BATCH_TOKENS // longest)
    counts = torch.tensor([math.ceil(len(order) / size), size], device=ranks.device)
    dist.all_reduce(counts, op=dist.ReduceOp.MAX)
    found: dict[int, str] = {}
    for batch in range(int(counts[0])):
        chosen = order[batch * size : (batch + 1) * size]
        documents = [prompts[n][0] for n in chosen] or [filler]
        pack: Pack = collate(documents, patch_dim=encoder.geometry.patch_dim).to(ranks.device)
        answers = greedy(
            thinker.llm,
            pack,
            thinker.towers(pack),
            stop_id=encoder.ids.im_end,
            max_new_tokens=max_new_tokens,
            is_open_anywhere=lambda is_open: parallel.any_rank(is_open, ranks.device),
        )
        said = [final_answer(encoder.tokenizer.decode(row)).strip() for row in answers]
        found |= dict(zip(chosen, said, strict=False))
    return [
        compared(found[n], reference.strip(), sample.content.get("pattern"))
        for n, ((_, reference), sample) in enumerate(zip(prompts, mine, strict=True))
    ]


def compared(answer: str, reference: str, pattern: str | None) -> tuple[str, str]:
    """(answer, reference), equal where the answer is right. A sample with a ``pattern`` (a regular expression) asks for
    the form of the answer alone: what fits it whole counts as the reference."""
    fits = pattern is not None and re.fullmatch(pattern, answer) is not None
    return (reference if fits else answer, reference) if pattern is None or fits else (answer, f"like {pattern}")


def score(pairs: list[tuple[str, str]], with_cer: bool) -> dict[str, float]:
    """{"exact": fraction, "cer": character error rate of the whole set} over (answer, reference); {} without pairs."""
    if not pairs:
        return {}
    scores = {"exact": sum(a == r for a, r in pairs) / len(pairs)}
    if with_cer:
        scores["cer"] = float(jiwer.cer([r for _, r in pairs], [a or " " for a, _ in pairs]))
    return scores


Found = TypeVar("Found")


def gather(found: list[Found]) -> list[Found]:
    """What all ranks found on every rank, in the order of the samples that the ranks took in turn."""
    return [one for turn in itertools.zip_longest(*parallel.lists_of_ranks(found)) for one in turn if one is not None]


def answer_tasks(
    config: RunConfig,
    folder: Path,
    tasks: dict[str, str],
    split: str,
    ranks: Ranks,
    max_new_tokens: int,
    *,
    use_yarn: bool = True,
    control: Control | None = None,
) -> Iterator[Answers]:
    """Answers of an export to ``tasks`` ({task: source}) of a split, task by task, and of the control. Collective."""
    thinker, data = load_frozen(config, folder, ranks, use_yarn)
    for task, samples in split_tasks(data, tasks, split).items():
        pairs = gather(answer_all(thinker, data.message_encoder, samples, ranks, max_new_tokens))
        first = changeable(samples[:CONTROL_ITEMS], control) if control else []
        swapped = []
        if first:
            swapped = gather(answer_all(thinker, data.message_encoder, first, ranks, max_new_tokens, control))
        yield Answers(task, pairs, swapped, langs=langs_of(samples), swapped_langs=langs_of(first))
