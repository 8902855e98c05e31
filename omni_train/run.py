"""Run a recipe, or one stage of it.

    run ──load_recipe──▶ configurations and shards checked ──▶ (make_data, start_stage, evaluate) ×n ──▶ table, report
    start_stage ──check_unchanged, check_origins, check_inputs──▶ ranks

A finished stage (its DONE file) is skipped, a half-done one resumes from its newest committed checkpoint; neither with
another configuration than it was started with.
"""

from __future__ import annotations

import fcntl
import json
import math
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from omni_train import config as configuration
from omni_train.config import (
    ConfigError,
    Objective,
    RunConfig,
    done_at,
    init_of,
    load_corpus,
    origins_of,
    to_dict,
)
from omni_train.measure import check_through
from omni_train.recipe import Recipe, RecipeStage, load_recipe, stage_overrides

MAY_CHANGE = (
    *("run_dir", "wandb_project", "wandb_mode", "save_every_steps", "keep_checkpoints"),
    *("eval_every_steps", "eval_tokens", "validation", "corpus", "data.num_workers", "data.resume_policy"),
    "data.max_bad_samples",
    *("engine.num_processes", "engine.threads", "engine.timeout_sec", "engine.recompute"),
)
"""Keys, with what lies below them, that do not change what a run learns. The ranks of a checkpoint are checked when it
is loaded; the mixture by the planner, where data.resume_policy allows a change."""


def changed_keys(saved: dict[str, Any], now: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """{dotted key: (saved value, present value)} where two configurations differ, keys of MAY_CHANGE left out.

    A field that the saved one does not have yet is no change; an entry of a free dictionary (a component, a source) is.
    """
    is_free = prefix in ("stage.components.", "mixture.", "init.")
    changes: dict[str, tuple[Any, Any]] = {}
    for name in saved | now:
        key, before, after = prefix + name, saved.get(name), now.get(name)
        if key in MAY_CHANGE or before == after or (name not in saved and not is_free):
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            changes |= changed_keys(before, after, f"{key}.")
        else:
            changes[key] = (before, after)
    return changes


def is_begun(folder: Path) -> bool:
    """Whether a run folder holds a finished or half-done stage."""
    return (folder / "DONE").exists() or any(folder.glob("checkpoints/step_*/COMMIT"))


def check_unchanged(config: RunConfig) -> None:
    """Raise ConfigError when the run folder holds a finished or half-done stage of another configuration."""
    folder = Path(config.run_dir)
    is_done = (folder / "DONE").exists()
    if not (folder / "config.yaml").is_file() or not is_begun(folder):
        return
    changes = changed_keys(yaml.safe_load((folder / "config.yaml").read_text()), to_dict(config))
    if config.data.resume_policy != "strict" and not is_done:
        changes = {key: values for key, values in changes.items() if not key.startswith("mixture.")}
    if changes:
        listed = ", ".join(f"{key} ({before} → {after})" for key, (before, after) in changes.items())
        state = "finished" if is_done else "half-done"
        raise ConfigError(
            f"'{folder}' holds a {state} stage of another configuration: {listed}; "
            "set it back, or start anew with another run_dir"
        )


def check_origins(config: RunConfig, made: Collection[str] = ()) -> None:
    """Raise ConfigError when what a finished or half-done stage started from has been trained anew since, or will be:
    ``made`` are exports that are missing and will be there."""
    recorded = Path(config.run_dir) / "origins.json"
    if not recorded.exists() or not is_begun(recorded.parent):
        return
    now = origins_of(config.init)
    for folder, before in json.loads(recorded.read_text()).items():
        after = now.get(folder)
        if before is not None and (folder in made if after is None else after != before):
            raise ConfigError(
                f"'{config.run_dir}' was trained from '{folder}' as it was before that was trained anew; move "
                f"'{config.run_dir}' away to train it again too, or put '{folder}' back"
            )


def check_inputs(config: RunConfig, is_launched: bool = False) -> None:
    """Fail before any process starts when data that the run needs is missing or damaged, or has more bad samples than
    data.max_bad_samples; write missing indexes.

    ``is_launched``: the other ranks, and what they hold, are waiting already; then a missing index is an error too.
    """
    from omni_train.data.bad_samples import SampleCount, is_share
    from omni_train.data.index import expand, load_index
    from omni_train.data.layouts import layout_id
    from omni_train.data.rows import is_rows
    from omni_train.data.shard import DataError, is_url

    root = Path(config.data.root)
    if not root.exists():
        raise ConfigError(f"data.root '{root}' does not exist; make a small one: `omni-train data prepare tiny`")
    sources = [*config.mixture.values(), *config.validation.values()]
    found = [
        expand([pattern if "://" in pattern else str(root / pattern) for pattern in source.shards])
        for source in sources
    ]
    if not Path(config.data.tokenizer).is_dir():
        raise ConfigError(f"data.tokenizer '{config.data.tokenizer}' is no folder; give a Qwen3-Omni tokenizer folder")
    tokenizer = None
    if is_launched:
        from omni_train.data.tokenizer import fingerprint, load_tokenizer

        tokenizer = fingerprint(load_tokenizer(Path(config.data.tokenizer)))
    allowed, total = config.data.max_bad_samples, SampleCount()
    for source, shards in zip(sources, found, strict=True):
        try:
            indexes = [load_index(shard, tokenizer, layout_id(source)) for shard in shards]
        except DataError:  # missing or stale: only then are the heavy imports worth their seconds
            if is_launched and not any(is_url(shard) or is_rows(shard) for shard in shards):
                raise  # the error names `data index`, which makes those of local tars
            from omni_train.corpus import index_shards

            # A share is one of the samples of all sources, so a single source cannot tell.
            indexes = index_shards(
                shards, Path(config.data.tokenizer), source, math.inf if is_share(allowed) else allowed
            )
        for shard, index in zip(shards, indexes, strict=True):
            total.add(str(shard), index.num_samples + len(index.bad), index.bad)
    total.check(allowed)


def check_init(config: RunConfig) -> None:
    """Raise ConfigError when a folder that the stage starts from is not there, or one to learn from is not named."""
    if config.stage.distillation is not None and "teacher" not in config.init:
        raise ConfigError(f"{config.stage.name} needs a teacher: +init.teacher=FOLDER of an exported Thinker")
    teachers = {Objective.code2wav: "codec_encoder"}
    if config.stage.reconstruction.semantic > 0:
        teachers[Objective.codec] = "audio_encoder"
    teacher = teachers.get(config.stage.objective)
    if teacher and init_of(config.init, teacher) is None:
        raise ConfigError(f"init.{teacher}: {config.stage.name} learns from it; add +init.{teacher}=ITS_STAGE/export")
    for component, folder in config.init.items():
        if not Path(folder).is_dir():
            raise ConfigError(f"init.{component}: folder '{folder}' does not exist; give a local transformers folder")


def start_stage(config: RunConfig, arguments: list[str]) -> int:
    """Check a stage, then run ``omni-train train ARGUMENTS`` on its local ranks; the exit status."""
    from omni_train.launching.local import run_ranks

    check_unchanged(config)
    check_origins(config)
    if (Path(config.run_dir) / "DONE").exists():
        print(f"{config.stage.name}: finished before in {config.run_dir}, skipped", flush=True)
        return 0
    check_init(config)
    check_inputs(config)
    with held(Path(config.run_dir)):
        return run_ranks(["train", *arguments], config.engine)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a run folder for this process. Raises ConfigError while another command holds it; a dead one does not."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"another command is training in '{folder}'; wait for it, or give another run_dir"
            raise ConfigError(message) from None
        yield


def run(path: Path, overrides: list[str]) -> int:
    """Run a recipe; 0, or the exit status of the stage that failed."""
    from omni_train.reporting.report import write_report
    from omni_train.reporting.results import load_results, render_table

    recipe = load_recipe(path)
    run_dir = Path(next((o.split("=", 1)[1] for o in overrides if o.startswith("run_dir=")), f"runs/{recipe.name}"))
    extra = [o for o in overrides if not o.startswith("run_dir=")]
    arguments = [stage_overrides(recipe, stage, run_dir, extra) for stage in recipe.stages]
    configs = [configuration.load(stage.stage, own) for stage, own in zip(recipe.stages, arguments, strict=True)]
    root = load_corpus(recipe.corpus).root if recipe.corpus else ""
    if root and any(config.data.root == root for config in configs):
        from omni_train.corpus import prepare_corpus

        prepare_corpus(recipe.corpus, Path(root).parent)
    made = [str(Path(config.run_dir) / "export") for config in configs if done_at(Path(config.run_dir)) is None]
    for stage, config in zip(recipe.stages, configs, strict=True):
        check_unchanged(config)  # everything that can be known is checked before the first stage starts
        check_origins(config, made)
        for measurement in stage.evaluate:
            if not measurement.of:
                check_through(config, measurement.through)
        if not stage.data and not (Path(config.run_dir) / "DONE").exists():
            check_inputs(config)
    roots = {stage.stage: config.data.root for stage, config in zip(recipe.stages, configs, strict=True)}
    for number, (stage, config, own) in enumerate(zip(recipe.stages, configs, arguments, strict=True), 1):
        print(f"[{number}/{len(configs)}] {stage.stage}", flush=True)
        status = make_data(recipe, stage, config, run_dir, roots, own) or start_stage(config, [stage.stage, *own])
        if status:
            return status
        print(stage_line(load_results(run_dir), stage.stage, recipe.baseline), flush=True)
        status = evaluate_stage(path, stage, config, run_dir, extra)
        if status:
            return status
    print(render_table(load_results(run_dir), recipe.bars, recipe.baseline))
    print(f"report: {write_report(run_dir, recipe.bars, recipe.baseline)}")
    return 0


def check_made(recipe: Recipe, stage: RecipeStage, config: RunConfig, run_dir: Path) -> None:
    """Raise ConfigError when what made the shards that a stage has begun on has been trained anew since."""
    for name in recipe.made_for(stage):
        makers = {role: done_at(run_dir / maker) for role, maker in recipe.data[name].stages.items()}
        done = run_dir / "data" / name / "DONE"
        if done.exists() and json.loads(done.read_text())["done"] != makers:
            raise ConfigError(
                f"'{config.run_dir}' was trained on '{done.parent}', made by {', '.join(makers)} before one of them "
                f"was trained anew; move '{config.run_dir}' away to train it again too"
            )


def make_data(
    recipe: Recipe, stage: RecipeStage, config: RunConfig, run_dir: Path, roots: dict[str, str], own: list[str]
) -> int:
    """Make on local ranks the shards that a stage trains on, unless it is finished or they were made of the same; the
    exit status. ``roots``: the data.root of each stage, ``own``: the overrides of this one.
    Raises ConfigError as ``check_made`` does.
    """
    from omni_train.launching.local import run_ranks

    if is_begun(Path(config.run_dir)):
        check_made(recipe, stage, config, run_dir)
    if (Path(config.run_dir) / "DONE").exists():
        return 0
    for name in recipe.made_for(stage):
        made, folder = recipe.data[name], run_dir / "data" / name
        source = run_dir / "data" / made.of if made.of else Path(roots[made.codec or made.talker]).resolve()
        done = {role: done_at(run_dir / maker) for role, maker in made.stages.items()}
        made_of = json.dumps({**configuration.to_dict(made), "source": str(source), "done": done})
        if (folder / "DONE").exists() and (folder / "DONE").read_text() == made_of:
            continue
        shutil.rmtree(folder, ignore_errors=True)
        command = ["data", "codes" if made.codec else "pairs", str(source), "--out", str(folder), "--only", made.only]
        for role, maker in made.stages.items():
            command += [f"--{role}", str(run_dir / maker / "export")]
        if made.heat is not None:
            command += ["--heat", *map(str, made.heat)]
        if made.margin is not None:
            command += ["--margin", str(made.margin)]
        if made.talker:
            command += own
        status = run_ranks(command, config.engine)
        if status:
            return status
        (folder / "DONE").write_text(made_of)
    return 0


def evaluate_stage(path: Path, stage: RecipeStage, config: RunConfig, run_dir: Path, extra: list[str]) -> int:
    """Measure on local ranks what the recipe asks of a finished stage, unless that was done; the exit status."""
    from omni_train.launching.local import run_ranks

    if not stage.evaluate:
        return 0
    asked = [configuration.to_dict(measurement) for measurement in stage.evaluate]
    named = [name for own in stage.evaluate for name in (own.of, own.through, own.thinker) if name]
    wanted = json.dumps({"evaluate": asked, "done": {name: done_at(run_dir / name) for name in [stage.stage, *named]}})
    measured = run_dir / stage.stage / "measured.json"
    if measured.exists() and measured.read_text() == wanted:
        return 0
    command = ["eval", str(run_dir), "--recipe", str(path), "--stage", stage.stage, *extra]
    status = run_ranks(command, config.engine)
    if not status:
        measured.write_text(wanted)
    return status


def stage_line(results: dict[str, Any], name: str, baseline: str = "") -> str:
    """One line on a finished stage: tokens, time, and its held-out losses in nats, with their change since the stage
    ``baseline``."""
    from omni_train.reporting.formatting import format_change
    from omni_train.reporting.results import loss_changes

    stage = next((stage for stage in results["stages"] if stage["name"] == name), None)
    if stage is None:
        return f"  {name}: no results"
    changes = {
        key: f" ({format_change(value)})"
        for key, value in loss_changes(results["stages"], baseline).get(name, {}).items()
    }
    losses = " ".join(f"{key} {value:.3f}{changes.get(key, '')}" for key, value in stage["loss"].items())
    since = f", change since {baseline}" if changes else ""
    return f"  {name}: {stage['tokens']:,} tokens in {stage['seconds']:.0f} s; held-out loss{since}: {losses}"
