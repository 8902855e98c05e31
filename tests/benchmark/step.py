"""How fast a training step is, loader included, beside a bare PyTorch loop and beside transformers' Trainer.

    PYTHONPATH=. python tests/benchmark/step.py [--stage s2_general] [--steps 20] [--rounds 3] [overrides ...]
    PYTHONPATH=. python tests/benchmark/step.py --stage s3_long_context ~mixture.long_video ~validation.long_video
    PYTHONPATH=. python tests/benchmark/step.py --stage thinker_sft --peer SFTTrainer ~mixture.long_video ...
    PYTHONPATH=. python tests/benchmark/step.py --ranks 2 --steps 4 --rounds 16 [data.packs_per_lane=2 ...]

All three read, decode and train on the same documents in the same order: ours and the bare loop as packs, Trainer as
one padded batch of a step's documents. They take turns, a few steps each, so that what else runs on the machine falls
on all; what is printed are ratios of useful tokens (padding does not count) a second. S3's documents differ most in
length. It and the SFT go without films, whose positions stock does not find in a padded batch.

``--ranks 2`` instead compares two ranks and expert parallelism 2 with one rank, on the same packs: with one that has
as many packs a step as each of the two (weak scaling: a rank's batch stays), and with one that has those of both
(strong scaling: the step's batch stays, so ZeRO has half as much to halve); and with two processes that know nothing
of each other, which is what the machine allows. Fresh routers load one rank's experts more than the other's;
``+init.all=runs/quickstart/s1_encoders/export`` takes the weights that S2 starts with.

The corpus must be there (``make corpus``).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import os
import platform
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from omni_train import config as configuration
from omni_train.config import RunConfig
from omni_train.data.contracts import IGNORE_INDEX, Document, PackPlan
from omni_train.data.loader import PackReader
from omni_train.data.pipeline import DataPipeline
from omni_train.engine.parallel import bind_to_processors
from omni_train.launching.local import free_port, quiet

STEP_OF_RANK = "OMNI_TRAIN_BENCHMARK_RANK"


def histogram(lengths: list[int]) -> str:
    """Documents by length in tokens, in powers of two."""
    found = Counter(1 << (length - 1).bit_length() for length in lengths)
    return "  ".join(f"≤{size}: {found[size]}" for size in sorted(found))


class Ours:
    """The real loop: loader, objective, engine; a planned step as ``parts`` steps, of its lanes one after another."""

    def __init__(self, config: RunConfig, parts: int = 1) -> None:
        from omni_train.engine import parallel
        from omni_train.train import Trainer

        data = replace(config.data, lanes=config.data.lanes // parts)
        self.trainer = Trainer(replace(config, data=data), parallel.start(config.engine))
        self.loader = self.trainer.loader if parts == 1 else DataPipeline.of(config).loader(0, 1)
        self.parts = parts

    def step(self) -> list[str]:
        packs = self.loader.next_step()
        size = len(packs) // self.parts
        for start in range(0, len(packs), size):
            self.trainer.step(packs[start : start + size])
        return [name for pack in packs for name in pack.sample_ids]


class Bare:
    """What one would write by hand: forward, summed loss over the labels, backward, clipping, AdamW."""

    def __init__(self, config: RunConfig) -> None:
        from omni_train.stage import build_modules

        self.data = DataPipeline.of(config)
        self.loader = self.data.loader(0, 1)
        (self.module,) = build_modules(config, self.data.tokenizer).values()
        self.coefficient = config.stage.router_aux_coef
        self.experts = config.model.text.num_experts
        self.clip = config.stage.grad_clip
        self.optimizer = torch.optim.AdamW(
            [p for p in self.module.parameters() if p.requires_grad], lr=1e-3, betas=tuple(config.stage.betas)
        )

    def step(self) -> list[str]:
        packs = self.loader.next_step()
        labels = sum(int((pack.shift_labels != IGNORE_INDEX).sum()) for pack in packs)
        tokens = sum(pack.num_tokens for pack in packs)
        for pack in packs:
            output = self.module(pack)
            loss = output["losses"].sum() / labels
            balance = self.experts * (output["router_probabilities"] / self.experts).sum() / tokens
            (loss + self.coefficient * balance).backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return [name for pack in packs for name in pack.sample_ids]


class Documents:
    """The documents of each step, read and encoded when asked for."""

    def __init__(self, data: DataPipeline, plans: list[list[PackPlan]], config: RunConfig) -> None:
        self.plans, self.encoder = plans, data.encoder
        shards = {name: data.indexed(source) for name, source in config.mixture.items()}
        self.reader = PackReader(shards, config.mixture)

    def __call__(self, rows: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        """One padded batch of the documents of a step: a collator of a dataset that holds the steps' numbers alone."""
        (row,) = rows
        return padded(self.read(row["step"]))

    def read(self, step: int) -> list[Document]:
        return [
            self.encoder.encode(self.reader.read(planned), planned.start, planned.stop)
            for plan in self.plans[step]
            for planned in plan.documents
        ]


def padded(documents: list[Document]) -> dict[str, torch.Tensor]:
    """One batch of documents as stock's processor would pad it."""
    rows = [torch.from_numpy(document.input_ids) for document in documents]
    labels = [torch.from_numpy(document.labels) for document in documents]
    pad = nn.utils.rnn.pad_sequence
    batch = {
        "input_ids": pad(rows, batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=IGNORE_INDEX),
        "attention_mask": pad([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True),
    }
    mels = [torch.from_numpy(mel).T for document in documents for mel in document.mels]
    if mels:
        batch["input_features"] = pad(mels, batch_first=True).transpose(1, 2).contiguous()
        batch["feature_attention_mask"] = pad(
            [torch.ones(len(mel), dtype=torch.long) for mel in mels], batch_first=True
        )
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        patches = [torch.from_numpy(p) for document in documents for p in getattr(document, f"{kind}_patches")]
        if patches:
            grids = [grid for document in documents for grid in getattr(document, f"{kind}_grids")]
            batch |= {name: torch.cat(patches), f"{kind}_grid_thw": torch.tensor(grids)}
    seconds = [value for document in documents for value in document.video_seconds_per_grid]
    return batch | ({"video_second_per_grid": torch.tensor(seconds)} if seconds else {})


def trainer_classes(peer: str) -> tuple[type, type, dict]:
    """(trainer, its arguments' class, further arguments) of transformers or TRL."""
    if peer == "SFTTrainer":
        from trl import SFTConfig, SFTTrainer

        return SFTTrainer, SFTConfig, {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None}
    from transformers import Trainer, TrainingArguments

    return Trainer, TrainingArguments, {}


def stock_seconds(config: RunConfig, plans: list[list[PackPlan]], peer: str) -> list[float]:
    """Seconds of each step but the first of a stock trainer with the stock Thinker on these documents."""
    import datasets
    from transformers import Qwen3OmniMoeThinkerForConditionalGeneration, TrainerCallback

    from omni_train.models.build import thinker_config

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_end(self, *args, **kwargs) -> None:
            self.times.append(time.perf_counter())

    data = DataPipeline.of(config)
    model = Qwen3OmniMoeThinkerForConditionalGeneration(thinker_config(config.model, data.tokenizer))
    clock = Clock()
    trainer_class, arguments_class, more_arguments = trainer_classes(peer)
    more = {"processing_class": data.tokenizer} if peer == "SFTTrainer" else {}
    with tempfile.TemporaryDirectory() as folder:
        arguments = arguments_class(
            output_dir=folder,
            use_cpu=True,
            per_device_train_batch_size=1,
            max_steps=len(plans),
            learning_rate=1e-3,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            train_sampling_strategy="sequential",
            **more_arguments,
        )
        steps = datasets.Dataset.from_dict({"step": list(range(len(plans)))})
        collator = Documents(data, plans, config)
        trainer = trainer_class(model, args=arguments, data_collator=collator, train_dataset=steps, **more)
        trainer.add_callback(clock)
        trainer.train()
    return [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)]


def turns(config: RunConfig, num_steps: int, num_rounds: int, peer: str) -> None:
    """Ours, the bare loop and a stock trainer by turns on the same plan."""
    planner = DataPipeline.of(config).loader(0, 1).planner
    steps = [planner.next_step() for _ in range(2 + num_steps * num_rounds)]
    lengths = [document.num_tokens for plans in steps for plan in plans for document in plan.documents]
    print(f"{len(steps)} steps, {len(lengths)} documents, {sum(lengths):,} tokens; by length: {histogram(lengths)}")
    ours, bare = Ours(config), Bare(config)
    for _ in range(2):  # warm up
        assert ours.step() == bare.step(), "the loops must see the same documents"
    has_trainer = importlib.util.find_spec("accelerate") is not None
    by_round: list[dict[str, float]] = []
    by_step: list[float] = []
    for number in range(num_rounds):
        at = 2 + number * num_steps
        tokens = sum(d.num_tokens for plans in steps[at : at + num_steps] for plan in plans for d in plan.documents)
        seconds = {"ours": 0.0, "bare": 0.0}
        for turn in range(num_steps):  # who comes second finds the step's files and pages warm
            took = {}
            for name, loop in (("ours", ours), ("bare", bare))[:: 1 if turn % 2 else -1]:
                started = time.perf_counter()
                loop.step()
                took[name] = time.perf_counter() - started
                seconds[name] += took[name]
            by_step.append(took["ours"] / took["bare"])
        if has_trainer:
            seconds["stock"] = sum(stock_seconds(config, steps[at - 1 : at + num_steps], peer))
        by_round.append(seconds)
        print("  " + ", ".join(f"{name} {tokens / value:,.0f} tokens/s" for name, value in seconds.items()), flush=True)
    low, middle, high = statistics.quantiles(by_step, n=4, method="inclusive")
    print(f"our step / bare loop {middle:.3f}, the same step for both; quartiles {low:.3f} and {high:.3f}")
    if has_trainer:
        stock_ratio = statistics.median(s["stock"] / s["ours"] for s in by_round)
        print(f"our useful tokens/s / {peer} {stock_ratio:.2f}")
    else:
        print(f"{peer} was not measured: it needs `pip install accelerate`")


class Job:
    """Processes that each wait for a word to take steps: ``world`` ranks of one job, or of ``number`` jobs at once,
    which take a planned step in ``parts``."""

    def __init__(self, stage: str, overrides: list[str], number: int, world: int, parts: int) -> None:
        parallel = [f"engine.num_processes={world}", f"engine.expert_parallel={world}"]
        self.processes: list[subprocess.Popen] = []
        for job in range(number):
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
            own_folder = [f"run_dir={tempfile.mkdtemp()}"] if job else []
            for rank in range(world):
                place = {"RANK": str(rank), "LOCAL_RANK": str(rank), STEP_OF_RANK: f"{job}/{number}/{parts}"}
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, __file__, "--stage", stage, *overrides, *parallel, *own_folder],
                        env={**os.environ, **address, **place},
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        text=True,
                    )
                )
        self.world = world

    def __enter__(self) -> Job:
        try:
            self.rate(4)  # warm up
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def rate(self, num_steps: int) -> float:
        """Tokens a second of all its jobs over so many steps."""
        with contextlib.suppress(BrokenPipeError):  # a rank that has ended is found below
            for process in self.processes:
                print(num_steps, file=process.stdin, flush=True)
        lines = []
        for process in self.processes:
            while not select.select([process.stdout], [], [], 1.0)[0]:
                if any(other.poll() is not None for other in self.processes):
                    raise RuntimeError("a rank failed")
            lines.append(process.stdout.readline())
        if not all(lines):
            raise RuntimeError("a rank failed")
        return sum(map(float, lines[:: self.world]))


def ranks_in_turn(stage: str, overrides: list[str], num_ranks: int, num_steps: int, num_rounds: int) -> None:
    """By turns: one rank with a rank's packs a step and one with those of all, ``num_ranks`` with expert parallelism
    over them, and as many processes of one rank each that know nothing of each other."""
    kinds = {  # (jobs at once, ranks of each, steps for each planned one)
        "1 rank": (1, 1, num_ranks),
        f"1 rank with {num_ranks} × the packs": (1, 1, 1),
        f"{num_ranks} ranks": (1, num_ranks, 1),
        f"{num_ranks} apart": (num_ranks, 1, num_ranks),
    }
    rounds: list[dict[str, float]] = []
    with contextlib.ExitStack() as stack:
        jobs = {name: stack.enter_context(Job(stage, overrides, *kind)) for name, kind in kinds.items()}
        for number in range(num_rounds):
            rates = {name: jobs[name].rate(num_steps) for name in list(jobs)[:: 1 if number % 2 else -1]}
            rounds.append(rates)
            print("  " + ", ".join(f"{name} {rates[name]:,.0f}" for name in jobs) + " tokens/s", flush=True)
    one, one_of_all, ranks, apart = kinds
    for what, more, fewer in (
        ("expert parallelism / one rank, the same packs a rank and step (weak scaling)", ranks, one),
        ("expert parallelism / one rank, the same packs a step (strong scaling)", ranks, one_of_all),
        ("no connection / one rank, the same packs a rank and step", apart, one),
    ):
        ratios = [rates[more] / rates[fewer] for rates in rounds]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        print(f"{num_ranks} ranks, {what} {middle:.2f}; quartiles {low:.2f} and {high:.2f}")


def as_rank(config: RunConfig) -> None:
    """One process of a Job: at each number on its input, so many planned steps, and their rate in tokens a second."""
    job, number, parts = map(int, os.environ[STEP_OF_RANK].split("/"))
    bind_to_processors(job, number)  # jobs, as ranks are
    with contextlib.redirect_stdout(io.StringIO()):
        ours = Ours(config, parts)
    for line in sys.stdin:
        before, started = ours.trainer.position.tokens, time.perf_counter()
        for _ in range(int(line)):
            ours.step()
        print((ours.trainer.position.tokens - before) / (time.perf_counter() - started), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", default="s2_general")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--peer", choices=["Trainer", "SFTTrainer"], default="Trainer", help="transformers' or TRL's")
    parser.add_argument("overrides", nargs="*", help="e.g. model=small stage.context=2048")
    options = parser.parse_args()
    if options.ranks > 1 and options.rounds < 2:
        parser.error("--rounds must be at least 2: what is printed are quartiles of rounds")
    quiet()
    is_rank = STEP_OF_RANK in os.environ
    single = [] if is_rank else ["engine=cpu1"]
    run_dir = Path(tempfile.gettempdir()) / "omni-train-benchmark" / options.stage
    own = [*single, f"run_dir={run_dir}", "wandb_mode=disabled", *options.overrides]
    config = configuration.load(options.stage, own)
    if is_rank:
        return as_rank(config)
    print(f"{options.stage} {' '.join(own)}")
    print(f"python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores", flush=True)
    if config.data.lanes % options.ranks:
        parser.error(f"--ranks must divide the lanes: data.lanes={options.ranks} would do")
    if options.ranks > 1:
        return ranks_in_turn(options.stage, own, options.ranks, options.steps, options.rounds)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": str(free_port())}
    os.environ["OMP_NUM_THREADS"] = str(config.engine.threads)  # accelerate would take all cores, for what follows too
    torch.set_num_threads(config.engine.threads)
    return turns(config, options.steps, options.rounds, options.peer)


if __name__ == "__main__":
    main()
