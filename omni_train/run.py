"""A recipe: an ordered list of stages, each started from exports of the ones before, then the evaluation.

A finished stage (its DONE file) is skipped, a half-done one resumes from its newest committed checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import yaml

from omni_train import config as configuration
from omni_train.config import ConfigError, nearest


@dataclass(kw_only=True, slots=True)
class RecipeStage:
    """One stage: overrides of its YAML, and for each component the recipe stage (or folder) whose export it starts from."""

    stage: str
    overrides: list[str] = field(default_factory=list)
    init: dict[str, str] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class Evaluation:
    """What to measure on the export of ``stage``: {source: [task]} of the held-out split; ``bars`` are printed beside."""

    stage: str
    sources: dict[str, list[str]]
    bars: dict[str, float] = field(default_factory=dict)

    @property
    def tasks(self) -> list[str]:
        return [task for tasks in self.sources.values() for task in tasks]

    def source_of(self, task: str) -> str:
        for source, tasks in self.sources.items():
            if task in tasks:
                return source
        raise ConfigError(f"no task is called '{task}'; {nearest(task, self.tasks)}")


@dataclass(kw_only=True, slots=True)
class Recipe:
    """A whole run. ``corpus`` names a folder of data/ that is prepared when it is missing."""

    name: str
    stages: list[RecipeStage]
    evaluation: Evaluation | None = None
    corpus: str = ""
    overrides: list[str] = field(default_factory=list)

    def stage(self, name: str) -> RecipeStage:
        for stage in self.stages:
            if stage.stage == name:
                return stage
        raise ConfigError(f"recipe '{self.name}' has no stage '{name}'; {nearest(name, [s.stage for s in self.stages])}")


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe. Raises ConfigError naming a wrong key, stage or init."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not path.is_file():
        folder = sorted(str(p) for p in Path("recipes").glob("*.yaml"))
        raise ConfigError(f"no recipe '{path}'; {nearest(str(path), folder) if folder else 'give a YAML file'}")
    try:
        values = OmegaConf.create(yaml.safe_load(path.read_text()))
        recipe: Recipe = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), values))
    except OmegaConfBaseException as error:
        raise ConfigError(f"recipe '{path}': {configuration.explain(error)}") from error
    before: list[str] = []
    for stage in recipe.stages:
        if stage.stage not in configuration.available():
            raise ConfigError(f"recipe '{path}': no stage '{stage.stage}'; {nearest(stage.stage, configuration.available())}")
        for component, source in stage.init.items():
            if source not in before and not Path(source).is_dir():
                raise ConfigError(
                    f"recipe '{path}': {stage.stage}.init.{component} = '{source}' is neither an earlier stage "
                    f"({', '.join(before)}) nor a folder"
                )
        before.append(stage.stage)
    return recipe


def stage_overrides(recipe: Recipe, stage: RecipeStage, run_dir: Path, extra: list[str]) -> list[str]:
    """Hydra overrides of one stage of a recipe."""
    folders = {name: str(run_dir / source / "export") for name, source in stage.init.items() if not Path(source).is_dir()}
    folders |= {name: source for name, source in stage.init.items() if Path(source).is_dir()}
    init = [f"+init.{component}={folder}" for component, folder in folders.items()]
    return [*recipe.overrides, *stage.overrides, *extra, *init, f"run_dir={run_dir / stage.stage}"]


def run(path: Path, overrides: list[str]) -> int:
    """Run a recipe; 0, or the exit status of the stage that failed."""
    from omni_train.launching.local import run_ranks
    from omni_train.reporting.report import write_report
    from omni_train.reporting.results import load_results, render_table

    recipe = load_recipe(path)
    run_dir = Path(next((o.split("=", 1)[1] for o in overrides if o.startswith("run_dir=")), f"runs/{recipe.name}"))
    extra = [o for o in overrides if not o.startswith("run_dir=")]
    for stage in recipe.stages:  # every stage's configuration is checked before the first one starts
        configuration.load(stage.stage, stage_overrides(recipe, stage, run_dir, extra))
    if recipe.corpus:
        from omni_train.corpus import prepare_corpus

        prepare_corpus(recipe.corpus, Path(f".cache/corpus/{recipe.corpus}"), 1280)
    bars = recipe.evaluation.bars if recipe.evaluation else None
    for number, stage in enumerate(recipe.stages, 1):
        title = f"[{number}/{len(recipe.stages)}] {stage.stage}"
        if (run_dir / stage.stage / "DONE").exists():
            print(f"{title}: done before, skipped", flush=True)
            continue
        print(title, flush=True)
        arguments = stage_overrides(recipe, stage, run_dir, extra)
        config = configuration.load(stage.stage, arguments)
        status = run_ranks(["train", stage.stage, *arguments], config.engine.num_processes, config.engine.threads)
        if status:
            return status
        print(render_table(load_results(run_dir), None), flush=True)
    if recipe.evaluation:
        folder = run_dir / recipe.evaluation.stage / "export"
        command = ["eval", str(folder), "--recipe", str(path), "--results", str(run_dir), *extra]
        status = run_ranks(command, config_of(recipe, extra).engine.num_processes, 1)
        if status:
            return status
    print(render_table(load_results(run_dir), bars))
    print(f"report: {write_report(run_dir)}")
    return 0


def config_of(recipe: Recipe, extra: list[str]) -> configuration.RunConfig:
    """Configuration of the stage that the recipe evaluates."""
    assert recipe.evaluation is not None
    stage = recipe.stage(recipe.evaluation.stage)
    return configuration.load(stage.stage, [*recipe.overrides, *stage.overrides, *extra])
