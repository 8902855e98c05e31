"""A recipe: an ordered list of stages, each started from exports of the ones before, and what to measure at its end."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from omni_train import config as configuration
from omni_train.config import ConfigError, Control, nearest


@dataclass(kw_only=True, slots=True)
class Measurement:
    """Tasks to measure on an export when the stage that lists it has ended.

    ``of`` names another, earlier stage whose export to take. A ``name`` makes it a comparison: its figures are printed
    beside the task's own, as ``TASK_exact/NAME``. ``window_sec`` are the attention windows of an AuT export.
    ``by_lang`` prints the figures by language too and keeps them in results.json. An answer ends after
    ``max_new_tokens``. What a Talker says is heard ``through`` the Code2Wav of that stage. ``thinker`` names the stage
    whose Thinker takes the place of the one that the measured stage started from: to speak beside, or to compare with.
    """

    tasks: list[str]
    of: str = ""
    through: str = ""
    thinker: str = ""
    name: str = ""
    use_yarn: bool = True
    by_lang: bool = False
    max_new_tokens: int = 24
    window_sec: list[int] = field(default_factory=list)
    control: Control = Control.media_swapped


@dataclass(kw_only=True, slots=True)
class MadeData:
    """Shards that a recipe makes on the way, of those of the corpus (or of the data ``of``) that ``only`` matches.

    With ``codec``: ``omni-train data codes`` by the codec of that stage. With ``talker``: ``omni-train data pairs`` of
    replies by the Talker of that stage, heard ``through`` a Code2Wav and ranked by the AuT of stage ``judge``:
    a reply with each ``heat`` to each sample, the best of them at least ``margin`` better than the worst; without, as
    the command would.
    """

    only: str
    of: str = ""
    codec: str = ""
    talker: str = ""
    through: str = ""
    judge: str = ""
    heat: list[float] | None = None
    margin: float | None = None

    @property
    def stages(self) -> dict[str, str]:
        """{role: stage} of the exports that it needs."""
        roles = {name: getattr(self, name) for name in ("codec", "talker", "through", "judge")}
        return {role: stage for role, stage in roles.items() if stage}

    def __post_init__(self) -> None:
        if set(self.stages) not in ({"codec"}, {"talker", "through", "judge"}):
            raise ConfigError(
                "data made on the way needs either 'codec', to write codes, or 'talker', 'through' and 'judge', to "
                f"write pairs; it has {', '.join(self.stages) or 'none'}"
            )
        if self.codec and (self.heat is not None or self.margin is not None):
            raise ConfigError("'heat' and 'margin' are of pairs, without effect on data of a 'codec'; leave them out")


@dataclass(kw_only=True, slots=True)
class RecipeStage:
    """One stage: overrides of its YAML, and for each component the stage (or folder) whose export it starts from.

    ``data`` names data of the recipe that it trains on in place of the corpus.
    """

    stage: str
    overrides: list[str] = field(default_factory=list)
    data: str = ""
    init: dict[str, str] = field(default_factory=dict)
    evaluate: list[Measurement] = field(default_factory=list)


@dataclass(kw_only=True, slots=True)
class Recipe:
    """A whole run.

    ``corpus`` names a folder of data/ that is prepared when it is missing, and that every stage takes (conf/corpus/);
    ``data`` what is made of it on the way; ``tasks`` says which of its sources holds which held-out tasks, {source:
    [task]}; ``bars`` are printed beside the figures of these names; held-out losses of the
    stages after ``baseline`` as changes since that stage too.
    """

    name: str
    stages: list[RecipeStage]
    corpus: str = ""
    overrides: list[str] = field(default_factory=list)
    data: dict[str, MadeData] = field(default_factory=dict)
    tasks: dict[str, list[str]] = field(default_factory=dict)
    bars: dict[str, float] = field(default_factory=dict)
    baseline: str = ""

    def stage(self, name: str) -> RecipeStage:
        """The stage of this name. Raises ConfigError for one that the recipe does not have."""
        for stage in self.stages:
            if stage.stage == name:
                return stage
        choices = [stage.stage for stage in self.stages]
        raise ConfigError(f"recipe '{self.name}' has no stage '{name}'; {nearest(name, choices)}")

    def made_for(self, stage: RecipeStage) -> list[str]:
        """The data that must be made before a stage can train, in order. Raises ConfigError for unknown data."""
        names: list[str] = []
        name = stage.data
        while name:
            if name not in self.data or name in names:
                raise ConfigError(
                    f"recipe '{self.name}', for stage {stage.stage}: no data '{name}' to train on or to make other "
                    f"data of; {nearest(name, self.data) if self.data else 'it has none'}"
                )
            names.insert(0, name)
            name = self.data[name].of
        return names

    def source_of(self, task: str) -> str:
        """The source that holds a task. Raises ConfigError for a task that the recipe does not have."""
        for source, tasks in self.tasks.items():
            if task in tasks:
                return source
        known = [task for tasks in self.tasks.values() for task in tasks]
        hint = nearest(task, known) if known else "list it under 'tasks'"
        raise ConfigError(f"recipe '{self.name}' has no task '{task}'; {hint}")


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe. Raises ConfigError naming a wrong key, stage or init."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not path.is_file():
        folder = sorted(str(p) for p in Path("recipes").glob("*.yaml"))
        raise ConfigError(f"no recipe '{path}'; {nearest(str(path), folder) if folder else 'give a YAML file'}")
    try:
        values = OmegaConf.create(yaml.safe_load(path.read_text()))
        recipe: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), values))
    except OmegaConfBaseException as error:
        raise ConfigError(f"recipe '{path}': {configuration.explain(error)}") from error
    names = [stage.stage for stage in recipe.stages]
    if recipe.baseline and recipe.baseline not in names:
        raise ConfigError(
            f"recipe '{path}': baseline '{recipe.baseline}' is none of its stages; {nearest(recipe.baseline, names)}"
        )
    before: list[str] = []
    for stage in recipe.stages:
        if stage.stage not in (known := configuration.available()):
            raise ConfigError(f"recipe '{path}': no stage '{stage.stage}'; {nearest(stage.stage, known)}")
        for component, source in stage.init.items():
            if source not in before and not Path(source).is_dir():
                raise ConfigError(
                    f"recipe '{path}': {stage.stage}.init.{component} = '{source}' is neither an earlier stage "
                    f"({', '.join(before)}) nor a folder"
                )
        for name in recipe.made_for(stage):
            for role, source in recipe.data[name].stages.items():
                if source not in before:
                    raise ConfigError(
                        f"recipe '{path}': data.{name}.{role} '{source}' is no stage before {stage.stage}, which "
                        f"trains on it ({', '.join(before)})"
                    )
        before.append(stage.stage)
        for measurement in stage.evaluate:
            for task in measurement.tasks:
                recipe.source_of(task)
            if measurement.max_new_tokens < 1:
                raise ConfigError(
                    f"recipe '{path}': {stage.stage}.evaluate.max_new_tokens ({measurement.max_new_tokens}) must be at "
                    "least 1; leave it out for 24"
                )
            if measurement.name and measurement.by_lang:
                raise ConfigError(
                    f"recipe '{path}': {stage.stage}.evaluate.by_lang has no effect on the comparison "
                    f"'{measurement.name}'; leave it out"
                )
            for other in (measurement.of, measurement.through, measurement.thinker):
                if other and other not in before:
                    raise ConfigError(
                        f"recipe '{path}': {stage.stage}.evaluate takes the export of '{other}', which is no stage up "
                        f"to it; {nearest(other, before)}"
                    )
    return recipe


def base_overrides(recipe: Recipe, stage: RecipeStage) -> list[str]:
    """Hydra overrides that a recipe gives a stage wherever it runs: its corpus, its own, the stage's own."""
    return [*([f"corpus={recipe.corpus}"] if recipe.corpus else []), *recipe.overrides, *stage.overrides]


def stage_overrides(recipe: Recipe, stage: RecipeStage, run_dir: Path, extra: list[str]) -> list[str]:
    """Hydra overrides of one stage of a recipe."""
    init = []
    for component, source in stage.init.items():
        folder = source if Path(source).is_dir() else run_dir / source / "export"
        init.append(f"+init.{component}={folder}")
    made = [f"data.root={run_dir / 'data' / stage.data}"] if stage.data else []
    return [*base_overrides(recipe, stage), *extra, *made, *init, f"run_dir={run_dir / stage.stage}"]
