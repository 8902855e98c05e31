"""The loop: the only one. next packs → forward → losses → backward → step → log → save.

    loss of a micro-batch = Σ over terms of weight × local sum / global count   (over all ranks and micro-batches)

so a step is the same for every split of its packs into ranks and micro-batches.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from omni_train.config import RunConfig, Schedule, StageConfig, origins_of, to_dict
from omni_train.data.contracts import BadSample, Pack
from omni_train.data.mixture import OutOfData
from omni_train.data.pipeline import DataPipeline
from omni_train.data.planner import exhausted
from omni_train.engine import checkpoint, parallel
from omni_train.engine.deepspeed import backward, non_finite_gradients, set_learning_rates
from omni_train.engine.export import export
from omni_train.engine.parallel import Ranks
from omni_train.evaluation.heldout import heldout_losses
from omni_train.launching.local import StopSignal
from omni_train.models.moe import expert_health
from omni_train.objectives.terms import Losses
from omni_train.reporting.environment import describe_environment
from omni_train.reporting.metrics import MetricsWriter
from omni_train.reporting.mixture import MixtureLog
from omni_train.reporting.progress import Progress
from omni_train.reporting.results import add_stage
from omni_train.stage import build_stage, origin
from omni_train.stage.post_training import packs_a_step


class NonFiniteError(ValueError):
    """A loss or gradient was NaN or infinite. The engine that it belongs to has not moved; nothing of it is saved."""


def learning_rate_scale(stage: StageConfig, tokens: float) -> float:
    """Factor on every component's rate after ``tokens`` of the stage: warm-up, then cosine, linear or constant."""
    if tokens < stage.warmup_tokens:
        return max(tokens, 1.0) / stage.warmup_tokens
    if stage.schedule is Schedule.constant:
        return 1.0
    progress = (tokens - stage.warmup_tokens) / max(stage.total_tokens - stage.warmup_tokens, 1.0)
    progress = min(progress, 1.0)
    shape = 0.5 * (1.0 + math.cos(math.pi * progress)) if stage.schedule is Schedule.cosine else 1.0 - progress
    return stage.min_lr_ratio + (1.0 - stage.min_lr_ratio) * shape


@dataclass(slots=True)
class Position:
    """How far a stage is: what a checkpoint holds besides engines, data cursors and router fractions."""

    step: int = 0
    tokens: float = 0.0
    seconds: float = 0.0


class Trainer:
    """One stage in flight: engines, data, and the state that a checkpoint restores."""

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.folder = Path(config.run_dir)
        self.data = DataPipeline.of(config)
        self.loader = self.data.loader(ranks.rank, ranks.world)
        for name, source in config.validation.items():  # nothing to measure on shows here, not after all the training
            self.data.validation_packs(name, source, config.eval_tokens)
        self.mixture = MixtureLog(self.folder, is_writer=ranks.is_main)
        self.bad_samples = self.data.bad_sample_log(self.folder / "bad_samples.jsonl")
        micro_batches = math.ceil(config.data.lanes / ranks.world) * config.data.packs_per_lane
        if config.stage.rollout is not None:  # what the planner's packs hold then are prompts
            micro_batches = packs_a_step(config, micro_batches)
        self.stage = build_stage(config, self.data.tokenizer, ranks, micro_batches)
        self.batches = self.stage.batches(self.loader)
        self.position = Position()
        self.saved_step = 0
        self.is_stopping = False
        self.fractions: Tensor | None = None  # [layers, experts], of the step before
        if self.stage.router_shape is not None:
            self.fractions = torch.full(self.stage.router_shape, 1.0 / self.stage.router_shape[1], device=ranks.device)

    def step(self, packs: list[Pack], wants_stop: bool = False) -> dict[str, Any]:
        """One optimizer step on this rank's packs; returns the step's metrics over all ranks.

        ``wants_stop`` on one rank sets ``is_stopping`` on all. Raises on every rank, before an optimizer moves:
        DataError past the budget for bad samples, NonFiniteError when a loss is not finite, or its engine's gradient.
        """
        for engine in self.stage.engines.values():  # else it would step within the packs, or not at all
            assert len(packs) == engine.gradient_accumulation_steps()
        left_out = [sample for pack in packs for sample in pack.bad_samples]
        divisors, samples, (self.is_stopping, is_any_left_out) = self._agree(packs, wants_stop, bool(left_out))
        if is_any_left_out:
            self.note_bad_samples(left_out, self.position.step + 1)
        scale = learning_rate_scale(self.config.stage, self.position.tokens)
        for engine in self.stage.engines.values():
            set_learning_rates(engine, self.config.stage.components, scale)
        sums = StepSums()
        for number, pack in enumerate(packs):
            sums.add(self._backward(pack, divisors))
            if number == len(packs) - 1:
                sums.reduce()
                if not sums.are_finite():
                    self._raise_non_finite(packs, divisors)
            for engine in self.stage.engines.values():
                engine.step()
        if not all(engine.was_step_applied() for engine in self.stage.engines.values()):
            self._raise_non_finite(packs, divisors)
        self.stage.after_step()
        return {**self._finish_step(sums, divisors, scale), "samples": samples}

    def _agree(self, packs: list[Pack], *flags: bool) -> tuple[dict[str, float], str, list[bool]]:
        """What all ranks know of a step before it, in one reduction: divisors, samples, each flag if set on one rank.

        Divisors: the objective's counts over all ranks and micro-batches (at least 1). Samples: 14 hex digits that name
        their set, a sum of hashes, free of order and of the split into ranks.
        """
        local = [self.stage.counts(pack) for pack in packs]
        names = list(local[0])
        hashes = [
            int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=7).digest(), "little")
            for pack in packs
            for name in pack.sample_ids
        ]
        total = sum(hashes)
        halves = [total % 2**28, (total >> 28) % 2**28]  # sums of such halves are exact in float64
        values = [sum(c[n] for c in local) for n in names] + halves + [*flags]
        sums = parallel.sum_over_ranks(torch.tensor(values, dtype=torch.float64, device=self.ranks.device)).tolist()
        divisors = {n: max(value, 1.0) for n, value in zip(names, sums[: len(names)], strict=True)}
        low, high, *is_set = sums[len(names) :]
        digest = (int(low) + (int(high) << 28)) % 2**56
        return divisors, f"{digest:014x}", [value > 0 for value in is_set]

    def note_bad_samples(self, found: list[BadSample], step: int) -> None:
        """Log what this rank's packs had to leave out. Collective; raises DataError on every rank past the budget."""
        self.bad_samples.add(step, sum(parallel.lists_of_ranks(found), []), self.ranks.is_main)

    def _backward(self, pack: Pack, divisors: dict[str, float]) -> Losses:
        """Losses of one micro-batch, their gradients added to what the engines hold."""
        losses = self.stage.losses(pack.to(self.ranks.device), self.fractions)
        for name, engine in self.stage.engines.items():
            terms = [t.weight * t.sum / divisors[t.per] for t in losses.terms if t.engine == name]
            backward(engine, torch.stack(terms).sum())
        return losses

    def _raise_non_finite(self, packs: list[Pack], divisors: dict[str, float]) -> None:
        """Goes over the step's packs once more to find the bad ones; raises NonFiniteError naming them. Collective."""
        bad: list[tuple[int, str]] = []  # how many gradients came before, what and where
        for number, pack in enumerate(packs):
            with non_finite_gradients(self.stage.engines.values()) as found:
                losses = self._backward(pack, divisors)
            found[:0] = [(-1, f"loss {t.name}") for t in losses.terms if not t.sum.isfinite()]
            where = f"pack {number} of rank {self.ranks.rank}, samples {', '.join(pack.sample_ids)}"
            bad += [(before, f"{what} in {where}") for before, what in found[:1]]
        bad = sum(parallel.lists_of_ranks(bad), [])
        first = min((before for before, _ in bad), default=0)  # through the experts it spoils those of other ranks
        places = "; ".join(where for before, where in bad if before == first) or "no pack alone"
        what = f"step {self.position.step + 1}: not finite, and stopped before the optimizer step"
        raise NonFiniteError(f"{what}: {places}. Look at these samples, or lower the learning rate")

    def _finish_step(self, sums: StepSums, divisors: dict[str, float], scale: float) -> dict[str, Any]:
        """Advance the position and the router fractions; metrics of the step."""
        self.position.step += 1
        self.position.tokens += divisors["tokens"]
        metrics: dict[str, Any] = sums.means(divisors)
        counts = sums.router_counts
        if self.fractions is not None and counts is not None and counts.sum() > 0:
            self.fractions = (counts / counts.sum(-1, keepdim=True).clamp(min=1)).float().to(self.ranks.device)
            metrics |= expert_health(counts)
        for engine_name, engine in self.stage.engines.items():
            metrics[f"grad_norm/{engine_name}"] = float(engine.get_global_grad_norm())
        for name, component in self.config.stage.components.items():
            metrics[f"lr/{name}"] = component.lr * scale
        return metrics

    def evaluate(self) -> dict[str, float]:
        """Held-out loss and exact match by validation source and modality."""
        metrics: dict[str, float] = {}
        for engine in (*self.stage.engines.values(), *self.stage.frozen.values()):
            engine.eval()
        for name, source in self.config.validation.items():
            plans = self.data.validation_packs(name, source, self.config.eval_tokens)
            builder = self.data.validation_builder(name, source)
            found, bad = heldout_losses(self.stage.forward, plans, builder, self.data.dummy, self.ranks)
            if parallel.any_rank(bool(bad), self.ranks.device):
                self.note_bad_samples(bad, self.position.step)
            metrics |= {f"eval/{key.split('/')[0]}/{name}": value for key, value in found.items()}
        for engine in (*self.stage.engines.values(), *self.stage.frozen.values()):
            engine.train()
        return metrics

    def save(self) -> None:
        """Commit a checkpoint of the current step."""
        state = {
            "world": self.ranks.world,
            "position": asdict(self.position),
            "planner": self.loader.state_dict(),
            "fractions": None if self.fractions is None else self.fractions.tolist(),
        }
        folder = self.folder / "checkpoints"
        parts = {name: part.state_dict() for name, part in self.stage.stateful.items()}
        self.saved_step = self.position.step
        checkpoint.save(
            folder, self.position.step, self.stage.engines, state, parts, self.ranks, self.config.keep_checkpoints
        )

    def resume(self) -> bool:
        """Continue from the newest committed checkpoint, if there is one."""
        found = checkpoint.load_newest(self.folder / "checkpoints", self.stage.engines, self.ranks)
        if found is None:
            return False
        state, parts = found
        for name, part in self.stage.stateful.items():
            part.load_state_dict(parts[name])
        self.position = Position(**state["position"])
        self.saved_step = self.position.step
        changes = self.loader.load_state_dict(state["planner"], self.config.data.resume_policy)
        dry = exhausted(self.loader.state_dict())
        self.mixture.resume(mixture_weights(self.config), self.position.step, changes, dry)
        if self.fractions is not None:
            self.fractions = torch.tensor(state["fractions"], device=self.ranks.device)
        return True


@dataclass(slots=True)
class StepSums:
    """Sums over the packs of a step: loss terms with what each is divided by, reports, expert assignments [L, E]."""

    terms: dict[str, Tensor] = field(default_factory=dict)
    per: dict[str, str] = field(default_factory=dict)
    reported: dict[str, Tensor] = field(default_factory=dict)
    router_counts: Tensor | None = None

    def add(self, losses: Losses) -> None:
        for term in losses.terms:
            self.terms[term.name] = self.terms.get(term.name, 0.0) + term.sum.detach().double()
            self.per[term.name] = term.per
        for name, pair in losses.reported.items():
            self.reported[name] = self.reported.get(name, 0.0) + pair.detach().double()
        if losses.router_counts is not None:
            counts = losses.router_counts.double()
            self.router_counts = counts if self.router_counts is None else self.router_counts + counts

    def reduce(self) -> None:
        """Sum over ranks, in one reduction, and bring the sums to the host, in one copy."""
        parts = [*self.terms.values(), *self.reported.values()]
        if self.router_counts is not None:
            parts.append(self.router_counts)
        flat = parallel.sum_over_ranks(torch.cat([part.flatten() for part in parts])).cpu()
        sums = flat.split([part.numel() for part in parts])
        shaped = iter([new.view_as(part) for new, part in zip(sums, parts, strict=True)])
        self.terms = {name: next(shaped) for name in self.terms}
        self.reported = {name: next(shaped) for name in self.reported}
        self.router_counts = next(shaped, None)

    def are_finite(self) -> bool:
        """Whether every loss is."""
        return all(map(math.isfinite, self.terms.values()))

    def means(self, divisors: dict[str, float]) -> dict[str, float]:
        """Metrics of the step by name in the logs: the first term is ``loss``, reports without a count are left out."""
        first, *others = self.terms
        mean = {name: float(total) / divisors[self.per[name]] for name, total in self.terms.items()}
        ratios = {name: pair.tolist() for name, pair in self.reported.items()}
        return (
            {"loss": mean[first]}
            | {f"loss/{name}": mean[name] for name in others}
            | {name: total / count for name, (total, count) in ratios.items() if count > 0}
        )


def train(config: RunConfig) -> None:
    """Run one stage to its token budget, from its newest checkpoint if there is one, and export it.

    Raises SystemExit(85) when a stop signal came: after saving, or at its end.
    """
    stop = StopSignal()
    ranks = parallel.start(config.engine)
    trainer = Trainer(config, ranks)
    with trainer.loader:  # NOTE: a process waits for its workers at its end, which wait for work unless told
        writer = begin(trainer)
        take_steps(trainer, writer, stop)
        finish(trainer, writer)
        is_stopping = parallel.any_rank(stop.seen, ranks.device)
    parallel.stop()
    if is_stopping:  # what would come after the stage waits too
        raise SystemExit(85)


def begin(trainer: Trainer) -> MetricsWriter:
    """Resume where there is a checkpoint, and bring the files of the run folder to its step."""
    config, is_main = trainer.config, trainer.ranks.is_main
    is_resumed = trainer.resume()
    trainer.bad_samples.start(trainer.position.step, is_main)
    if is_main:
        describe_run(config, trainer, is_resumed)
    wandb = {"wandb_project": config.wandb_project, "wandb_mode": config.wandb_mode}
    writer = MetricsWriter(trainer.folder, **wandb, config=to_dict(config), is_writer=is_main)
    writer.truncate_after(trainer.position.step)
    return writer


def take_steps(trainer: Trainer, writer: MetricsWriter, stop: StopSignal) -> None:
    """Steps to the budget, or to the end of the data. Raises SystemExit(85) after saving when a stop signal came."""
    config, position = trainer.config, trainer.position
    stage, total = config.stage, int(config.stage.total_tokens)
    progress = Progress(stage.name, total, done_tokens=int(position.tokens), enabled=trainer.ranks.is_main)
    while position.tokens < total:
        started = time.perf_counter()
        try:
            packs = trainer.batches.next_step()
        except OutOfData:
            break
        trainer.mixture.note_exhausted(exhausted(trainer.loader.state_dict()), position.step)
        before = position.tokens
        metrics = trainer.step(packs, stop.seen)
        if config.eval_every_steps and position.step % config.eval_every_steps == 0:
            metrics |= trainer.evaluate()
        seconds = time.perf_counter() - started
        position.seconds += seconds
        tokens = position.tokens - before
        record = {"step": position.step, "tokens": position.tokens, "tokens_per_second": tokens / seconds, **metrics}
        if trainer.bad_samples.count:
            record["data/bad_samples"] = trainer.bad_samples.count
        writer.log(record, position.step)
        progress.update(int(tokens), metrics)
        if trainer.is_stopping:
            trainer.save()
            raise SystemExit(85)
        if position.step % config.save_every_steps == 0:
            trainer.save()
    progress.close()
    if position.step != trainer.saved_step:  # a kill during the last evaluation costs no step
        trainer.save()


def finish(trainer: Trainer, writer: MetricsWriter) -> None:
    """Last evaluation, export, and the stage's line in results.json."""
    config, position = trainer.config, trainer.position
    metrics = trainer.evaluate()
    writer.log({"step": position.step, "tokens": position.tokens, **metrics}, position.step)
    trainer.stage.before_export()
    modules = trainer.stage.modules()
    export(modules, config, trainer.data.tokenizer, trainer.folder / "export")
    if trainer.ranks.is_main:
        losses = starting_with("eval/loss/", metrics)
        exact = starting_with("eval/exact/", metrics)
        add_stage(
            trainer.folder.parent,
            {
                "name": config.stage.name,
                "tokens": int(position.tokens),
                "seconds": position.seconds,
                "tokens_per_second": position.tokens / max(position.seconds, 1e-9),
                "loss": losses,
                "exact": exact,
            },
        )
        done = {"step": position.step, "tokens": position.tokens, "time_ns": time.time_ns()}
        (trainer.folder / "DONE").write_text(json.dumps(done) + "\n")
    writer.close()


def starting_with(prefix: str, metrics: dict[str, float]) -> dict[str, float]:
    """The metrics whose name begins with ``prefix``, by the rest of their name."""
    return {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}


def mixture_weights(config: RunConfig) -> dict[str, Any]:
    """Weight or schedule of each source of the mixture."""
    return {name: source.weight for name, source in config.mixture.items()}


def describe_run(config: RunConfig, trainer: Trainer, is_resumed: bool) -> None:
    """Write the resolved configuration, the mixture and the environment into the run folder; print what trains."""
    folder = trainer.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
    if not is_resumed:
        trainer.mixture.start(mixture_weights(config), trainer.position.step)
        (folder / "origins.json").write_text(json.dumps(origins_of(config.init), indent=2) + "\n")
    (folder / "environment.json").write_text(json.dumps(describe_environment(), indent=2))
    for warning in trainer.data.too_long(trainer.loader.planner):
        print(f"  {warning}", flush=True)
    for line in trainer.stage.inventory:
        state = f"lr {line.lr:g}" if line.is_trained else "frozen"
        where = origin(config, line.component)
        print(f"  {line.component:<16} {line.num_parameters:>14,} parameters  {state:<10} {where}".rstrip(), flush=True)
