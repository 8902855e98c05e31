"""What a stage trains, with which objective, for how long."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from omni_train.config.errors import ConfigError, nearest
from omni_train.config.post_training import DistillationConfig, GspoConfig, RolloutConfig, check_post_training
from omni_train.config.reconstruction import ReconstructionConfig

COMPONENTS = (
    "llm", "audio_encoder", "audio_adapter", "vision_encoder", "vision_adapter",
    "talker", "mtp", "code2wav", "codec_encoder", "aut_decoder", "vision_decoder", "codec_decoder", "discriminator",
)  # fmt: skip
"""Names of the parameter groups, used in configuration, logs and errors."""


class Objective(Enum):
    """What a stage optimises, and with it which modules it builds."""

    next_token = "next_token"  # the Thinker: text positions of packed documents
    transcription = "transcription"  # AuT: audio encoder + decoder, sequence to sequence
    captioning = "captioning"  # vision encoder + a throw-away decoder, sequence to sequence
    codec = "codec"  # speech codec: encoder, residual quantiser, a throw-away mel decoder
    code2wav = "code2wav"  # Code2Wav on the codes of a frozen codec, with or without adversaries
    talker = "talker"  # Talker and MTP beside a frozen Thinker: the codes of a reply
    talker_dpo = "talker_dpo"  # the same on pairs of replies, against a frozen copy of themselves
    distillation = "distillation"  # the Thinker: next-token distributions of a frozen teacher, init.teacher
    gspo = "gspo"  # the Thinker: rewards of its own sampled answers


class LossOn(Enum):
    """Which tokens of a conversation carry loss; plain text always carries loss everywhere."""

    assistant = "assistant"
    last_turn = "last_turn"  # the replies to the last question: for reasoning, which earlier replies are without
    all_text = "all_text"


THINKER_COMPONENTS = ("llm", "audio_encoder", "audio_adapter", "vision_encoder", "vision_adapter")
THINKER_OBJECTIVES = (Objective.next_token, Objective.distillation, Objective.gspo)
"""Objectives of stages that build, train and export a Thinker."""

TRAINABLE = {
    Objective.next_token: THINKER_COMPONENTS,
    Objective.distillation: THINKER_COMPONENTS,
    Objective.gspo: THINKER_COMPONENTS,
    Objective.transcription: ("audio_encoder", "aut_decoder"),
    Objective.captioning: ("vision_encoder", "vision_decoder"),
    Objective.codec: ("codec_encoder", "codec_decoder"),
    Objective.code2wav: ("code2wav", "discriminator"),
    Objective.talker: ("talker", "mtp"),
    Objective.talker_dpo: ("talker", "mtp"),
}
"""Components that an objective's gradient reaches; a stage may train these and no others."""
NEEDED = {
    Objective.distillation: "llm",
    Objective.gspo: "llm",
    Objective.talker: "talker",  # DeepSpeed's optimizers want trained experts where there are experts
    Objective.talker_dpo: "talker",
}
"""The component without which a stage of an objective cannot train."""


class Schedule(Enum):
    cosine = "cosine"
    linear = "linear"
    constant = "constant"


@dataclass(kw_only=True, slots=True)
class ComponentConfig:
    """How one component trains in a stage."""

    lr: float
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ConfigError(f"stage.components.*.lr ({self.lr}) must be positive; to freeze a component leave it out")


@dataclass(kw_only=True, slots=True)
class StageConfig:
    """What a stage trains, with which objective, for how long. What is not in ``components`` is frozen."""

    name: str
    objective: Objective
    components: dict[str, ComponentConfig]
    context: int  # tokens a pack
    total_tokens: float  # budget of this stage
    loss_on: LossOn = LossOn.assistant
    router_aux_coef: float = 0.001
    schedule: Schedule = Schedule.cosine
    warmup_tokens: float = 0.0
    min_lr_ratio: float = 0.1
    grad_clip: float = 1.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    audio_window_sec: list[int] = field(default_factory=lambda: [8, 8])  # least and most, drawn per clip
    ctc_weight: float = 0.0  # transcription only: an auxiliary CTC loss on the encoder breaks the early plateau
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)  # codec and code2wav only
    code_noise: float = 0.0  # talker only: share of the codes read that are random; the key to unseen combinations
    dpo_beta: float = 0.1  # talker_dpo only: how far from the reference a preference may lead
    dpo_sft_weight: float = 0.0  # talker_dpo only: of the loss of the chosen replies, code by code
    yarn_factor: float = 1.0  # > 1 switches YaRN on: this many times model.text.max_position_embeddings
    rollout: RolloutConfig | None = None  # learn from sampled answers to the data's prompts, not from its replies
    distillation: DistillationConfig | None = None
    gspo: GspoConfig | None = None

    def __post_init__(self) -> None:
        if not self.components:
            raise ConfigError("stage.components is empty: a stage must train something")
        for name in self.components:
            if name not in COMPONENTS:
                raise ConfigError(f"stage.components: no component is called '{name}'; {nearest(name, COMPONENTS)}")
            if name not in TRAINABLE[self.objective]:
                raise ConfigError(
                    f"stage.components.{name}: stage {self.name} does not train '{name}' with objective "
                    f"{self.objective.name}; its components: {', '.join(TRAINABLE[self.objective])}"
                )
        needed = NEEDED.get(self.objective)
        if needed is not None and needed not in self.components:
            raise ConfigError(
                f"stage.components lacks '{needed}', which objective {self.objective.name} trains; "
                f"add stage.components.{needed}"
            )
        if not (len(self.audio_window_sec) == 2 and 1 <= self.audio_window_sec[0] <= self.audio_window_sec[1] <= 8):
            raise ConfigError(
                f"stage.audio_window_sec {self.audio_window_sec} must be [least, most] within 1 and 8 seconds"
            )
        if self.total_tokens <= 0 or self.context <= 0:
            raise ConfigError(
                f"stage.total_tokens ({self.total_tokens}) and stage.context ({self.context}) must be positive"
            )
        if self.ctc_weight and self.objective is not Objective.transcription:
            raise ConfigError(
                f"stage.ctc_weight ({self.ctc_weight}) has no effect on {self.objective.name}; leave it out"
            )
        self.reconstruction.check(self.objective.name, self.components)
        if not 0 <= self.code_noise < 1 or (self.code_noise and self.objective is not Objective.talker):
            raise ConfigError(
                f"stage.code_noise ({self.code_noise}) must lie in 0 … 1, and be 0 for another objective than talker"
            )
        if self.dpo_beta <= 0:
            raise ConfigError(f"stage.dpo_beta ({self.dpo_beta}) must be positive")
        if self.dpo_sft_weight < 0 or (self.dpo_sft_weight and self.objective is not Objective.talker_dpo):
            raise ConfigError(
                f"stage.dpo_sft_weight ({self.dpo_sft_weight}) must be at least 0, and 0 for another objective than "
                "talker_dpo"
            )
        if self.yarn_factor < 1:
            raise ConfigError(f"stage.yarn_factor ({self.yarn_factor}) must be 1 (off) or larger")
        check_post_training(self.objective.name, self.context, self.rollout, self.distillation, self.gspo)
