"""Settings of post-training: how answers are sampled, what they earn, how a teacher is compared with."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum

from omni_train.config.model import ConfigError, nearest


@dataclass(kw_only=True, slots=True)
class SamplingConfig:
    """How an answer is sampled: of softmax(logits / temperature) the top_k tokens (0: all) that hold top_p of it."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature <= 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ConfigError(
                f"stage.rollout: max_new_tokens ({self.max_new_tokens}) must be at least 1, temperature "
                f"({self.temperature}) positive, top_p ({self.top_p}) within 0 and 1, top_k ({self.top_k}) 0 or more"
            )


class Writer(Enum):
    """Whose answers a stage learns from."""

    student = "student"  # the model in training, with its weights of that moment
    teacher = "teacher"  # the frozen init.teacher


@dataclass(kw_only=True, slots=True)
class RolloutConfig(SamplingConfig):
    """Answers sampled while training: data.lanes × packs_per_lane prompts a cycle, ``group_size`` answers each.

    A sample of more than ``max_prompt_tokens`` (0: what max_new_tokens leaves of the context) is left out; the fewer
    they are, the more answers share a pack. A cycle is learned from in ``updates_per_cycle`` optimizer steps.
    ``sample_batch`` answers are written at once on a rank. ``max_draws``: how often prompts whose answers all earned
    the same are replaced by new ones (1: never). ``drop_truncated`` leaves answers that ran into max_new_tokens out of
    the loss.
    """

    by: Writer = Writer.student
    max_prompt_tokens: int = 0
    group_size: int = 1
    updates_per_cycle: int = 1
    sample_batch: int = 64
    max_draws: int = 1
    drop_truncated: bool = False

    def __post_init__(self) -> None:
        SamplingConfig.__post_init__(self)
        for name in ("group_size", "updates_per_cycle", "sample_batch", "max_draws"):
            if getattr(self, name) < 1:
                raise ConfigError(f"stage.rollout.{name} ({getattr(self, name)}) must be at least 1")


REWARD_RULES = {
    "exact": (),
    "numeric": (),
    "word_accuracy": (),
    "character_accuracy": (),
    "format": ("pattern",),
    "overlong": ("buffer",),
    "model": ("folder",),
}
"""Rules of omni_train/rollout/rewards.py, and the settings that each needs."""


@dataclass(kw_only=True, slots=True)
class RewardConfig:
    """One summand of the reward: ``weight`` × what ``rule`` gives. With ``sources`` it counts for these only."""

    rule: str
    weight: float = 1.0
    sources: list[str] = field(default_factory=list)
    pattern: str = ""  # format: the regular expression that the whole answer has to match
    buffer: int = 0  # overlong: the last tokens before max_new_tokens over which the penalty grows
    folder: str = ""  # model: a local transformers sequence classifier with one output

    def __post_init__(self) -> None:
        if self.rule not in REWARD_RULES:
            raise ConfigError(
                f"stage.gspo.rewards: no rule is called '{self.rule}'; {nearest(self.rule, REWARD_RULES)}"
            )
        for name in ("pattern", "buffer", "folder"):
            is_needed, is_given = name in REWARD_RULES[self.rule], bool(getattr(self, name))
            if is_needed != is_given:
                what = "needs" if is_needed else "has no use for"
                raise ConfigError(f"stage.gspo.rewards: rule {self.rule} {what} '{name}' ({getattr(self, name)!r})")
        if self.pattern:
            try:
                re.compile(self.pattern)
            except re.error as error:
                what = f"stage.gspo.rewards: pattern {self.pattern!r} is no regular expression"
                raise ConfigError(f"{what}: {error}") from error


@dataclass(kw_only=True, slots=True)
class GspoConfig:
    """Group Sequence Policy Optimization: clipping of the sequence ratio (the paper's), KL to the initial weights."""

    rewards: dict[str, RewardConfig]
    clip_low: float = 3e-4
    clip_high: float = 4e-4
    kl_weight: float = 0.0
    scale_advantages: bool = True  # by the standard deviation of the group

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ConfigError("stage.gspo.rewards is empty: nothing to learn from")
        if not (0 < self.clip_low < 1 and self.clip_high > 0 and self.kl_weight >= 0):
            raise ConfigError(
                f"stage.gspo: clip_low ({self.clip_low}) must lie within 0 and 1, clip_high ({self.clip_high}) be "
                f"positive, kl_weight ({self.kl_weight}) 0 or more"
            )


@dataclass(kw_only=True, slots=True)
class DistillationConfig:
    """Divergence from the teacher: beta 0 forward KL, 1 reverse KL, between them generalized Jensen–Shannon."""

    beta: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1 or self.temperature <= 0:
            raise ConfigError(
                f"stage.distillation: beta ({self.beta}) must lie within 0 and 1, temperature ({self.temperature}) be "
                "positive"
            )


def check_post_training(
    objective: str,
    context: int,
    rollout: RolloutConfig | None,
    distillation: DistillationConfig | None,
    gspo: GspoConfig | None,
) -> None:
    """Raises ConfigError where a stage lacks settings that its objective needs, or has some without effect on it."""
    for name, settings in (("distillation", distillation), ("gspo", gspo)):
        if (objective == name) != (settings is not None):
            needs = "needs its settings in" if objective == name else "has no use for"
            raise ConfigError(f"stage.objective {objective} {needs} stage.{name}")
    if rollout is None:
        if gspo is not None:
            raise ConfigError("stage.objective gspo learns from sampled answers; give stage.rollout")
        return
    if gspo is None and distillation is None:
        raise ConfigError(f"stage.rollout has no effect on objective {objective}; leave it out")
    if rollout.max_new_tokens + max(rollout.max_prompt_tokens, 1) > context:
        raise ConfigError(
            f"stage.rollout: a prompt of {max(rollout.max_prompt_tokens, 1):,} tokens (max_prompt_tokens) and an "
            f"answer of {rollout.max_new_tokens:,} (max_new_tokens) do not fit stage.context ({context:,} tokens)"
        )
    if gspo is None:
        if rollout.max_draws > 1:
            raise ConfigError("stage.rollout.max_draws has no effect on distillation: it has no rewards; leave it out")
    elif rollout.by is not Writer.student:
        raise ConfigError("stage.rollout.by: objective gspo learns from the student's own answers; leave it out")
    elif rollout.group_size < 2:
        raise ConfigError("stage.rollout.group_size must be at least 2: an advantage compares the answers of a group")
    elif any(0 < reward.buffer >= rollout.max_new_tokens for reward in gspo.rewards.values()):
        raise ConfigError("stage.gspo.rewards: the buffer of rule overlong must be below stage.rollout.max_new_tokens")
