"""What a run is: typed schema in Python, values in ``conf/*.yaml`` composed by Hydra.

    omni-train train s2_general model=tiny engine=cpu2 stage.total_tokens=1e6

``load(stage, overrides)`` returns a plain ``RunConfig``; after it no ``DictConfig`` is left. What a user can get wrong
is a ``ConfigError`` naming the key, the rule and the nearest valid choice.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import asdict, dataclass, field, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from omni_train.config.model import AudioModelConfig as AudioModelConfig
from omni_train.config.model import Code2WavModelConfig as Code2WavModelConfig
from omni_train.config.model import CodecModelConfig as CodecModelConfig
from omni_train.config.model import ConfigError, ModelConfig, nearest
from omni_train.config.model import DecoderModelConfig as DecoderModelConfig
from omni_train.config.model import TextModelConfig as TextModelConfig
from omni_train.config.model import VisionModelConfig as VisionModelConfig
from omni_train.config.model import WaveHead as WaveHead
from omni_train.config.reconstruction import ReconstructionConfig as ReconstructionConfig
from omni_train.config.stage import COMPONENTS as COMPONENTS
from omni_train.config.stage import THINKER_COMPONENTS as THINKER_COMPONENTS
from omni_train.config.stage import THINKER_OBJECTIVES as THINKER_OBJECTIVES
from omni_train.config.stage import TRAINABLE as TRAINABLE
from omni_train.config.stage import ComponentConfig as ComponentConfig
from omni_train.config.stage import LossOn as LossOn
from omni_train.config.stage import Objective as Objective
from omni_train.config.stage import Schedule as Schedule
from omni_train.config.stage import StageConfig as StageConfig
from omni_train.config.talker import CodecTokens as CodecTokens
from omni_train.config.talker import MtpConfig as MtpConfig
from omni_train.config.talker import TalkerDecoderConfig as TalkerDecoderConfig
from omni_train.config.talker import TalkerModelConfig as TalkerModelConfig

CONF_DIR = Path(__file__).resolve().parents[2] / "conf"


class Precision(Enum):
    fp32 = "fp32"
    bf16 = "bf16"


class Control(Enum):
    """What a control hides from the model; its figure must then fall to chance."""

    media_swapped = "media_swapped"  # all media are those of another item
    sound_swapped = "sound_swapped"  # the sound alone, of a video or beside a picture, is another item's
    frames_shuffled = "frames_shuffled"  # a video's frames in random order
    frames_frozen = "frames_frozen"  # a video's first frame in place of all
    system_left_out = "system_left_out"  # the turns that say how to answer


LAYOUTS: dict[str, tuple[str, ...]] = {
    "messages": (),
    "pairs": ("prompt", "text_field", "use_audio_in_video"),
    "text": ("text_field",),
}
"""What a sample can look like (omni_train/data/layouts.py), and which settings of LayoutConfig each layout reads."""


@dataclass(kw_only=True, slots=True)
class LayoutConfig:
    """What the samples of a source look like: messages (our own), pairs (a medium and its text) or text."""

    layout: str = "messages"
    prompt: str = ""  # pairs: what the user says after the medium; "" says nothing
    text_field: str = ""  # pairs, text: the json field with the text; "" reads KEY.txt, else the json's text or caption
    use_audio_in_video: bool = False  # pairs: the sound of a video is heard too

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ConfigError(f"a source's layout '{self.layout}' is unknown; {nearest(self.layout, LAYOUTS)}")
        for name in ("prompt", "text_field", "use_audio_in_video"):
            if getattr(self, name) and name not in LAYOUTS[self.layout]:
                readers = " or ".join(layout for layout, settings in LAYOUTS.items() if name in settings)
                raise ConfigError(
                    f"a source's {name} ({getattr(self, name)!r}) has no effect on layout {self.layout}; "
                    f"leave it out, or set layout to {readers}"
                )


@dataclass(kw_only=True, slots=True)
class ShardsConfig(LayoutConfig):
    """Shard globs or brace patterns (relative to data.root), and what their samples look like."""

    shards: list[str]


@dataclass(kw_only=True, slots=True)
class SourceConfig(ShardsConfig):
    """One source of a mixture, its weight in tokens."""

    weight: float
    max_epochs: float | None = None


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Where the data lies and how a step is cut: lanes × packs_per_lane packs, for any number of ranks."""

    root: str
    tokenizer: str  # a transformers folder
    lanes: int
    packs_per_lane: int = 1
    seed: int = 0
    num_workers: int = 0
    block_size: int = 64
    resume_policy: str = "strict"  # what a resume may change in the mixture: strict, reweight, add, add_remove
    # How many bad samples a run leaves out, each a line in its bad_samples.jsonl, before it stops: a number, or below 1
    # a share of all samples of mixture and validation.
    max_bad_samples: float = 0.0

    def __post_init__(self) -> None:
        policies = ("strict", "reweight", "add", "add_remove")
        if self.resume_policy not in policies:
            raise ConfigError(
                f"data.resume_policy '{self.resume_policy}' is unknown; {nearest(self.resume_policy, policies)}"
            )
        if self.lanes < 1 or self.packs_per_lane < 1:
            raise ConfigError("data.lanes and data.packs_per_lane must be at least 1")
        if not (
            0 <= self.max_bad_samples < 1 or (self.max_bad_samples >= 1 and float(self.max_bad_samples).is_integer())
        ):
            raise ConfigError(
                f"data.max_bad_samples ({self.max_bad_samples:g}) must be a whole number of samples, or a share below 1"
            )


WANDB_MODES = ("online", "offline", "disabled")


@dataclass(kw_only=True, slots=True)
class CorpusConfig:
    """A corpus of data/ as conf/corpus/NAME.yaml has it.

    ``corpus=NAME`` alone moves every stage to it: the stages' mixture and validation are ``${corpus}_STAGE``.
    """

    root: str
    vocab_size: int  # of the tokenizer trained over its texts


@dataclass(kw_only=True, slots=True)
class EngineConfig:
    """How a step is computed. num_processes counts for local starts only; torchrun's environment wins."""

    device: str = "cpu"  # cpu | cuda
    num_processes: int = 1
    expert_parallel: int = 1
    zero_stage: int = 1
    precision: Precision = Precision.fp32
    recompute: bool = False
    threads: int = 1  # CPU threads a process
    timeout_sec: float = 600.0

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"engine.device '{self.device}' is unknown; {nearest(self.device, ['cpu', 'cuda'])}")
        if self.zero_stage not in (1, 2, 3):  # DeepSpeed reports no gradient norm at stage 0 in fp32
            raise ConfigError(f"engine.zero_stage ({self.zero_stage}) must be 1, 2 or 3")
        if self.expert_parallel < 1:
            raise ConfigError(f"engine.expert_parallel ({self.expert_parallel}) must be at least 1")


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """One stage of one run."""

    stage: StageConfig
    model: ModelConfig
    mixture: dict[str, SourceConfig]
    data: DataConfig
    engine: EngineConfig
    corpus: CorpusConfig
    run_dir: str
    validation: dict[str, ShardsConfig] = field(default_factory=dict)  # modality-named sources for the held-out loss
    # component → local transformers folder; "thinker" for all of the Thinker's, "all" for every one
    init: dict[str, str] = field(default_factory=dict)
    seed: int = 0
    save_every_steps: int = 200
    keep_checkpoints: int = 2
    eval_every_steps: int = 0  # 0: at the end of the stage only
    eval_tokens: int = 20_000  # per validation source
    wandb_project: str = "omni-train"
    wandb_mode: str = "offline"  # online | offline | disabled

    def __post_init__(self) -> None:
        if self.wandb_mode not in WANDB_MODES:
            raise ConfigError(f"wandb_mode '{self.wandb_mode}' is unknown; {nearest(self.wandb_mode, WANDB_MODES)}")
        if self.save_every_steps < 1 or self.keep_checkpoints < 1:
            raise ConfigError("save_every_steps and keep_checkpoints must be at least 1")
        ep = self.engine.expert_parallel
        sharded = {"model.text": self.model.text.num_experts}
        if "talker" in self.stage.components and self.model.talker is not None:
            sharded["model.talker.decoder"] = self.model.talker.decoder.num_experts
        for part, experts in sharded.items():
            if experts % ep:
                divisors = [n for n in range(1, experts + 1) if experts % n == 0]
                best = min(divisors, key=lambda n: abs(n - ep))
                raise ConfigError(
                    f"engine.expert_parallel ({ep}) must divide {part}.num_experts ({experts}); try {best}"
                )
        if self.stage.objective in (Objective.talker, Objective.talker_dpo) and self.model.talker is None:
            raise ConfigError(
                f"stage {self.stage.name} needs a Talker, which model preset '{self.model.name}' lacks; "
                "add model.talker, or choose a preset with one"
            )
        if self.engine.num_processes % ep and self.engine.num_processes > 1:
            raise ConfigError(
                f"engine.expert_parallel ({ep}) must divide the number of processes ({self.engine.num_processes})"
            )
        if self.data.lanes < self.engine.num_processes:
            raise ConfigError(
                f"data.lanes ({self.data.lanes}) must be at least the number of ranks ({self.engine.num_processes}); "
                f"try data.lanes={self.engine.num_processes}"
            )
        is_codec = self.stage.objective in (Objective.codec, Objective.code2wav)
        if is_codec and (self.engine.zero_stage == 3 or self.engine.precision is Precision.bf16):
            raise ConfigError(
                f"engine.zero_stage ({self.engine.zero_stage}) and engine.precision ({self.engine.precision.name}): "
                f"{self.stage.objective.name} needs whole fp32 weights; try engine.zero_stage=2 engine.precision=fp32"
            )
        is_distilled = self.stage.objective is Objective.distillation
        known = (*COMPONENTS, "thinker", "all", *(["teacher"] if is_distilled else []))
        for name in self.init:
            if name not in known:
                raise ConfigError(f"init: no component is called '{name}'; {nearest(name, known)}")
        rollout = self.stage.rollout
        if rollout is not None and self.data.packs_per_lane % rollout.updates_per_cycle:
            raise ConfigError(
                f"stage.rollout.updates_per_cycle ({rollout.updates_per_cycle}) must divide data.packs_per_lane "
                f"({self.data.packs_per_lane}), the prompts of a lane in a cycle"
            )


def init_of(init: dict[str, str], component: str) -> str | None:
    """The folder that a component starts from: its own, else that of the Thinker's parts, else that of all."""
    names = [component, *(["thinker"] if component in THINKER_COMPONENTS else []), "all"]
    return next((init[name] for name in names if name in init), None)


def done_at(stage_dir: Path) -> int | None:
    """When a stage was finished, in nanoseconds, None where it was not: what was made of its export is out of date when
    that changes."""
    done = stage_dir / "DONE"
    return (written_at(done) or done.stat().st_mtime_ns) if done.exists() else None


def written_at(done: Path) -> int | None:
    """The time that a DONE file holds; None without one."""
    try:
        return int(json.loads(done.read_text())["time_ns"])
    except (OSError, ValueError, KeyError, TypeError):  # none, an older one's, or another program's
        return None


def origins_of(init: dict[str, str]) -> dict[str, int | None]:
    """{export that a stage starts from: when its stage was finished}, None for folders that no stage made."""
    return {folder: written_at(Path(folder).parent / "DONE") for folder in sorted(set(init.values()))}


def available(group: str = "") -> list[str]:
    """Names of the YAML files of a config group ('' for the stages)."""
    return sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))


def load(stage: str, overrides: list[str]) -> RunConfig:
    """The validated configuration of a stage with Hydra overrides applied."""
    if stage not in available():
        raise ConfigError(f"no stage is called '{stage}'; {nearest(stage, available())}")
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import MarkedYAMLError

    ConfigStore.instance().store(name="schema", node=RunConfig)
    GlobalHydra.instance().clear()
    # NOTE: Hydra assigns a new entry of a typed dict as a plain one, which OmegaConf refuses; a merge types it.
    is_added = re.compile(r"\+(mixture|validation|stage\.components)\.").match
    added = [override[1:] for override in overrides if is_added(override)]
    try:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            composed = compose(stage, [override for override in overrides if override[1:] not in added])
        OmegaConf.set_struct(composed, False)
        return OmegaConf.to_object(OmegaConf.merge(composed, OmegaConf.from_dotlist(added)))  # type: ignore[return-value]
    except MarkedYAMLError as error:
        where = error.problem_mark.get_snippet(indent=0).splitlines()[0] if error.problem_mark else "+mixture…"
        raise ConfigError(f"{where}: {error.problem}; put texts in quotes, as in prompt: 'what?'") from error
    except (HydraException, OmegaConfBaseException, ValueError, AttributeError) as error:
        raise ConfigError(explain(error)) from error


def load_corpus(name: str) -> CorpusConfig:
    """The values of conf/corpus/NAME.yaml. Raises ConfigError for a name without one."""
    from omegaconf import OmegaConf

    if name not in available("corpus"):
        raise ConfigError(f"no corpus is called '{name}'; {nearest(name, available('corpus'))}")
    values = OmegaConf.load(CONF_DIR / "corpus" / f"{name}.yaml")
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(CorpusConfig), values))  # type: ignore[return-value]


def model_of(values: dict[str, Any]) -> ModelConfig:
    """The sizes that ``to_dict`` made ``values`` of."""
    from omegaconf import OmegaConf

    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), values))  # type: ignore[return-value]


def explain(error: BaseException) -> str:
    """One readable message for what Hydra and OmegaConf report, with the nearest valid choice."""
    chain = [error]
    # NOTE: under a tracer (a debugger, coverage) OmegaConf raises an error as its own cause: stop at the first repeat.
    while (following := chain[-1].__cause__ or chain[-1].__context__) and following not in chain:
        chain.append(following)
    for ours in (link for link in chain if isinstance(link, ConfigError)):
        return str(ours)
    text = "\n".join(map(str, chain))
    if match := re.search(r"Could not find '(\w+)/([^']+)'", text):
        return f"no {match[1]} preset is called '{match[2]}'; {nearest(match[2], available(match[1]))}"
    if match := re.search(r"Could not override '([^']+)'|Key '(\w+)'|has no attribute '(\w+)'", text):
        key = next(filter(None, match.groups()))
        return f"unknown key '{key}'; {nearest_key(key)}"
    if match := re.search(r"(.+)\n\s*full_key: (\S+)", text):
        return f"{match[2]}: {match[1]}"
    return " ".join(line for line in str(error).splitlines() if "hydra.cc" not in line)


def nearest_key(key: str) -> str:
    """The existing dotted key whose last name is most like that of ``key``, as the end of an error message."""
    paths = {path: path.rpartition(".")[2] for path in key_paths(RunConfig)}
    close = difflib.get_close_matches(key.rpartition(".")[2], set(paths.values()), n=1, cutoff=0.5)
    matches = difflib.get_close_matches(key, [path for path in paths if paths[path] in close], n=1, cutoff=0.0)
    return f"did you mean '{matches[0]}'?" if matches else f"top-level keys: {', '.join(RunConfig.__slots__)}"


def key_paths(schema: type, prefix: str = "") -> list[str]:
    """Dotted names of all keys of a configuration class, groups included; what stands below a dict is free."""
    paths = []
    for name, kind in get_type_hints(schema).items():
        paths.append(prefix + name)
        inner = get_args(kind)[1] if get_origin(kind) is dict else kind
        inner = next((part for part in get_args(inner) if is_dataclass(part)), inner)  # of "X | None"
        if isinstance(inner, type) and is_dataclass(inner):
            paths += key_paths(inner, f"{prefix}{name}." + ("*." if get_origin(kind) is dict else ""))
    return paths


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration, or a part of one, as plain JSON-able values (enums by name)."""
    return asdict(config, dict_factory=lambda items: {k: v.name if isinstance(v, Enum) else v for k, v in items})
