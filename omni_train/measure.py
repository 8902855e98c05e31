"""Measure exports: those of a recipe's run folder as the recipe asks, or one folder as the command says.

recipe, run folder ──jobs_of_run───▶ jobs ──measure, on all ranks──▶ a printed line a task, results.json
export folder ───────job_of_export─▶
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omni_train import config as configuration
from omni_train.config import ConfigError, Objective, RunConfig
from omni_train.recipe import Measurement, Recipe, base_overrides, stage_overrides

if TYPE_CHECKING:
    from omni_train.engine.parallel import Ranks
    from omni_train.evaluation.capabilities import Answers


SPEECH = (Objective.codec, Objective.code2wav, Objective.talker, Objective.talker_dpo)
"""Objectives whose exports are measured by what is heard, on what they train on."""


@dataclass(slots=True)
class Job:
    """One measurement, ready to run: the export, the configuration of the stage that wrote it, {task: source}, and for
    speech the export of Code2Wav that it is heard ``through``."""

    config: RunConfig
    folder: Path
    tasks: dict[str, str]
    measurement: Measurement
    through: Path | None = None


def jobs_of_run(recipe: Recipe, run_dir: Path, only_stage: str | None, overrides: list[str]) -> list[Job]:
    """What the recipe asks of a run folder's finished stages. Raises ConfigError when there is nothing to measure."""
    jobs = []
    for stage in [recipe.stage(only_stage)] if only_stage else recipe.stages:
        for measurement in stage.evaluate:
            writer = recipe.stage(measurement.of or stage.stage)
            folder = run_dir / writer.stage / "export"
            if folder.is_dir():
                config = configuration.load(writer.stage, stage_overrides(recipe, writer, run_dir, overrides))
                if made := recipe.made_for(writer):  # the first holds all samples, pairs of them those that differ
                    config.data.root = str(run_dir / "data" / made[0])
                if measurement.thinker:
                    config.init["thinker"] = str(run_dir / measurement.thinker / "export")
                check_through(config, measurement.through)
                through = run_dir / measurement.through / "export" if measurement.through else None
                jobs.append(Job(config, folder, tasks_of(recipe, measurement), measurement, through))
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
    through: Path | None = None,
) -> Job:
    """One measurement of an export folder, by default of all tasks, with answers as long as the recipe asks of any.

    The stage that wrote it is ``stage``, else the folder above it, else the last one that writes such exports.
    """
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    is_aut = kind == "omni_train_transcription"
    if window_sec and not is_aut:
        raise ConfigError(f"--window-sec has no effect on '{folder}': it is no AuT export; leave it out")
    known = [stage.stage for stage in recipe.stages]
    above = folder.resolve().parent.name
    objective = Objective.next_token.name if kind == "qwen3_omni_moe_thinker" else str(kind).removeprefix("omni_train_")
    alike = (n for n in reversed(known) if configuration.load(n, []).stage.objective.name == objective)
    writer = recipe.stage(stage or (above if above in known else next(alike, known[-1])))
    config = configuration.load(writer.stage, [*base_overrides(recipe, writer), *overrides])
    own = {source: tasks for source, tasks in recipe.tasks.items() if source in config.mixture}
    asked_of = own if config.stage.objective in SPEECH else recipe.tasks
    every = [task for tasks in asked_of.values() for task in tasks if not is_aut or task.startswith("spoken")]
    windows = (window_sec or [1, 8]) if is_aut else []
    measurement = Measurement(tasks=tasks or every, use_yarn=use_yarn, window_sec=windows)
    asked = [own.max_new_tokens for stage in recipe.stages for own in stage.evaluate]
    measurement.max_new_tokens = max([measurement.max_new_tokens, *asked])
    check_through(config, through)
    return Job(config, folder, tasks_of(recipe, measurement), measurement, through)


def tasks_of(recipe: Recipe, measurement: Measurement) -> dict[str, str]:
    """{task: source} of a measurement."""
    return {task: recipe.source_of(task) for task in measurement.tasks}


def check_through(config: RunConfig, through: str | Path | None) -> None:
    """Raise ConfigError for a Talker without the Code2Wav that it is heard through, or another stage with one."""
    is_talker = config.stage.objective in (Objective.talker, Objective.talker_dpo)
    if is_talker and not through:
        raise ConfigError(
            f"{config.stage.name} is heard through Code2Wav: name its stage in the recipe's evaluate.through, or give "
            "--through EXPORT"
        )
    if through and not is_talker:
        raise ConfigError(f"'through' has no effect on {config.stage.name}, which is no Talker's stage; leave it out")


@dataclass(slots=True)
class Finding:
    """What a job found out about a task: figures and their controls by name, (answer, reference) of the items, and
    {by_lang or by_speaker: {figure: {group: [value, control]}}}."""

    name: str
    figures: dict[str, float]
    controls: dict[str, float]
    pairs: list[tuple[str, str]]
    apart: dict[str, dict[str, dict[str, list[float | None]]]]


def measure(jobs: list[Job], split: str, run_dir: Path | None) -> None:
    """Run the jobs and print a line a task; figures go to ``run_dir``'s results.json. Collective: all ranks call it."""
    from omni_train.engine import parallel
    from omni_train.reporting.results import add_apart, add_capabilities

    ranks = parallel.start(jobs[0].config.engine)
    for job in jobs:
        for found in findings(job, split, ranks, run_dir):
            if not ranks.is_main:
                continue
            if name := job.measurement.name:  # a comparison stands beside the task's own figures
                found.controls = {f"{key}/{name}": value for key, value in found.figures.items()}
                found.figures = {}
                for key, groups in found.apart.items():
                    found.apart[key] = {f"{figure}/{name}": values for figure, values in groups.items()}
            print(_line(found), flush=True)
            for answer, reference in [pair for pair in found.pairs if pair[0] != pair[1]][:2]:
                print(f"      expected {reference!r}, found {answer!r}", flush=True)
            for key, groups in found.apart.items():
                for line in _table(groups):
                    print(f"      {key.replace('_', ' ')}: {line}", flush=True)
            if run_dir is not None:
                add_capabilities(run_dir, found.figures, found.controls)
                for key, groups in found.apart.items():
                    add_apart(run_dir, key, groups)
    parallel.stop()


def findings(job: Job, split: str, ranks: Ranks, run_dir: Path | None) -> Iterator[Finding]:
    """What a job finds out, task by task. Collective.

    Of AuT its transcripts, of a Thinker its answers, of speech what is heard. Of distillation, GSPO and preferences
    what they changed; a comparison (``name``) of theirs is of answers, and of what is heard.
    """
    from omni_train.evaluation.capabilities import answer_tasks
    from omni_train.evaluation.post_training import stage_figures
    from omni_train.evaluation.speaking import preference_figures, talker_figures
    from omni_train.evaluation.speech import speech_figures
    from omni_train.evaluation.transcription import transcribe_tasks

    wanted, what = job.measurement, (job.config, job.folder, job.tasks, split, ranks)
    match job.config.stage.objective:
        case Objective.codec | Objective.code2wav:
            heard = speech_figures(*what, run_dir)
        case Objective.talker | Objective.talker_dpo as objective:
            assert job.through is not None  # check_through
            is_compared = objective is Objective.talker_dpo and not wanted.name
            heard = (preference_figures if is_compared else talker_figures)(*what, run_dir, job.through)
        case Objective.distillation | Objective.gspo if not wanted.name:
            for name, figures, controls in stage_figures(*what):
                yield Finding(name, figures, controls, [], {})
            return
        case _:
            if wanted.window_sec:
                answered = transcribe_tasks(*what, wanted.max_new_tokens, wanted.window_sec)
            else:
                control = None if wanted.name else wanted.control
                answered = answer_tasks(*what, wanted.max_new_tokens, use_yarn=wanted.use_yarn, control=control)
            for task in answered:
                own = {lang: _scores(part) for lang, part in task.by_lang().items()} if wanted.by_lang else {}
                apart = {"by_lang": _by_figure(own)} if own else {}
                yield Finding(task.name, *_scores(task), task.pairs, apart)
            return
    for speech in heard:
        apart = {"by_speaker": speech.by_speaker} if speech.by_speaker else {}
        yield Finding(speech.name, speech.figures, speech.controls, speech.pairs, apart)


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


def _table(by_figure: dict[str, dict[str, list[float | None]]]) -> list[str]:
    """A line a figure: its value by group, the control in brackets."""
    rows = []
    for name, values in by_figure.items():
        cells = [
            f"{lang or '-'} {value:.2f}" + ("" if control is None else f" ({control:.2f})")
            for lang, (value, control) in values.items()
        ]
        rows.append(f"{name} " + ", ".join(cells))
    return rows


def _line(found: Finding) -> str:
    parts = [
        f"{name} {value:.3f}" + (f" (control {found.controls[name]:.3f})" if name in found.controls else "")
        for name, value in found.figures.items()
    ]
    parts += [f"{name} {value:.3f}" for name, value in found.controls.items() if name not in found.figures]
    items = f", {len(found.pairs)} items" if found.pairs else ""
    return f"  {found.name}{items}: {', '.join(parts)}"
