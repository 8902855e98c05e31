"""Measure exports: those of a recipe's run folder as the recipe asks, or one folder as the command says.

recipe, run folder ──jobs_of_run───▶ jobs ──measure, on all ranks──▶ a printed line a task, results.json
export folder ───────job_of_export─▶
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omni_train import config as configuration
from omni_train.config import ConfigError, Objective, RunConfig
from omni_train.recipe import Measurement, Recipe, RecipeStage, base_overrides

if TYPE_CHECKING:
    from omni_train.evaluation.capabilities import Answers


@dataclass(slots=True)
class Job:
    """One measurement, ready to run: the export, the configuration of the stage that wrote it, {task: source}."""

    config: RunConfig
    folder: Path
    tasks: dict[str, str]
    measurement: Measurement


def jobs_of_run(recipe: Recipe, run_dir: Path, only_stage: str | None, overrides: list[str]) -> list[Job]:
    """What the recipe asks of a run folder's finished stages. Raises ConfigError when there is nothing to measure."""
    jobs = []
    for stage in [recipe.stage(only_stage)] if only_stage else recipe.stages:
        for measurement in stage.evaluate:
            writer = recipe.stage(measurement.of or stage.stage)
            if (run_dir / writer.stage / "export").is_dir():
                jobs.append(_job(recipe, writer, run_dir / writer.stage / "export", measurement, overrides))
    if not jobs:
        raise ConfigError(f"'{run_dir}' has no export of a stage that recipe '{recipe.name}' measures; train it first")
    return jobs


def job_of_export(
    recipe: Recipe,
    folder: Path,
    overrides: list[str],
    *,
    stage: str | None,
    tasks: list[str] | None,
    use_yarn: bool,
    window_sec: list[int] | None,
) -> Job:
    """One measurement of an export folder, by default of all tasks, with answers as long as the recipe asks of any.

    The stage that wrote it is ``stage``, else aut_pretrain for an AuT folder, else the folder above it, else the last.
    """
    is_aut = json.loads((folder / "config.json").read_text()).get("model_type") == "omni_train_transcription"
    if window_sec and not is_aut:
        raise ConfigError(f"--window-sec has no effect on '{folder}': it is no AuT export; leave it out")
    known = [stage.stage for stage in recipe.stages]
    above = folder.resolve().parent.name
    writer = recipe.stage(stage or ("aut_pretrain" if is_aut else above if above in known else known[-1]))
    every = [task for tasks in recipe.tasks.values() for task in tasks if not is_aut or task.startswith("spoken")]
    windows = (window_sec or [1, 8]) if is_aut else []
    measurement = Measurement(tasks=tasks or every, use_yarn=use_yarn, window_sec=windows)
    asked = [own.max_new_tokens for stage in recipe.stages for own in stage.evaluate]
    measurement.max_new_tokens = max([measurement.max_new_tokens, *asked])
    return _job(recipe, writer, folder, measurement, overrides)


def _job(recipe: Recipe, stage: RecipeStage, folder: Path, measurement: Measurement, overrides: list[str]) -> Job:
    config = configuration.load(stage.stage, [*base_overrides(recipe, stage), *overrides])
    return Job(config, folder, {task: recipe.source_of(task) for task in measurement.tasks}, measurement)


def measure(jobs: list[Job], split: str, run_dir: Path | None) -> None:
    """Run the jobs and print a line a task; figures go to ``run_dir``'s results.json. Collective: all ranks call it."""
    from omni_train.engine import parallel
    from omni_train.evaluation.capabilities import answer_tasks
    from omni_train.evaluation.speech import speech_figures
    from omni_train.evaluation.transcription import transcribe_tasks
    from omni_train.reporting.results import add_by_lang, add_capabilities

    ranks = parallel.start(jobs[0].config.engine)
    for job in jobs:
        wanted = job.measurement
        if job.config.stage.objective in (Objective.codec, Objective.code2wav):
            for found in speech_figures(job.config, job.folder, job.tasks, split, ranks, run_dir):
                if ranks.is_main:
                    print(_line(found.name, len(found.pairs), found.figures, found.controls), flush=True)
                    if run_dir is not None:
                        add_capabilities(run_dir, found.figures, found.controls)
            continue
        what = (job.config, job.folder, job.tasks, split, ranks, wanted.max_new_tokens)
        if wanted.window_sec:
            answered = transcribe_tasks(*what, wanted.window_sec)
        else:
            answered = answer_tasks(*what, use_yarn=wanted.use_yarn, control=None if wanted.name else wanted.control)
        for task in answered:
            figures, controls = _scores(task)
            if wanted.name:
                figures, controls = {}, {f"{name}/{wanted.name}": value for name, value in figures.items()}
            if ranks.is_main:
                print(_line(task.name, len(task.pairs), figures, controls), flush=True)
                for answer, reference in [pair for pair in task.pairs if pair[0] != pair[1]][:2]:
                    print(f"      heard or saw {reference!r}, answered {answer!r}", flush=True)
                by_lang = {lang: _scores(own) for lang, own in task.by_lang().items()} if wanted.by_lang else {}
                for line in _table(by_lang):
                    print(f"      {line}", flush=True)
                if run_dir is not None:
                    add_capabilities(run_dir, figures, controls)
                    add_by_lang(run_dir, _by_figure(by_lang))
    parallel.stop()


def _scores(task: Answers) -> tuple[dict[str, float], dict[str, float]]:
    """Figures of a task's answers and of their control. What is said or captioned has a character error rate."""
    from omni_train.evaluation.capabilities import score

    with_cer = ("spoken" in task.name or "caption" in task.name) and "digit" not in task.name
    figures = {task.named(key): value for key, value in score(task.pairs, with_cer).items()}
    return figures, {task.named(key): value for key, value in score(task.swapped, with_cer).items()}


def _by_figure(by_lang: dict[str, tuple[dict, dict]]) -> dict[str, dict[str, list[float | None]]]:
    found: dict[str, dict[str, list[float | None]]] = {}
    for lang, (figures, controls) in by_lang.items():
        for name, value in figures.items():
            found.setdefault(name, {})[lang] = [value, controls.get(name)]
    return found


def _table(by_lang: dict[str, tuple[dict, dict]]) -> list[str]:
    """A line a figure: its value by language, the control in brackets."""
    rows = []
    for name, values in _by_figure(by_lang).items():
        cells = [
            f"{lang or '-'} {value:.2f}" + ("" if control is None else f" ({control:.2f})")
            for lang, (value, control) in values.items()
        ]
        rows.append(f"{name} by language: " + ", ".join(cells))
    return rows


def _line(task: str, items: int, figures: dict[str, float], controls: dict[str, float]) -> str:
    parts = [
        f"{name} {value:.3f}" + (f" (control {controls[name]:.3f})" if name in controls else "")
        for name, value in figures.items()
    ]
    parts += [f"{name} {value:.3f}" for name, value in controls.items() if name not in figures]
    return f"  {task}, {items} items: {', '.join(parts)}"
