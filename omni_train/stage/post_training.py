"""Post-training of the Thinker put together: the teacher or reference, the rollouts, the objective of a stage.

distillation, no rollout    packs of the data; divergence from the teacher on their replies
distillation, rollout       packs of answers that the teacher (off policy) or the student (on policy) writes meanwhile
gspo                        packs of the student's answers, with the advantages of their rewards
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen3OmniMoeThinkerConfig

from omni_train.config import ConfigError, Objective, RunConfig
from omni_train.config.post_training import RolloutConfig
from omni_train.data.contracts import Document, Pack, Prompt
from omni_train.data.encode import Encoder, collate, dummy_pack
from omni_train.data.loader import StepLoader
from omni_train.data.pipeline import media_geometry
from omni_train.data.tokenizer import fingerprint, load_tokenizer
from omni_train.engine import parallel
from omni_train.engine.deepspeed import build_engine
from omni_train.engine.parallel import Ranks
from omni_train.models.head import token_losses_at
from omni_train.models.thinker import Thinker
from omni_train.models.weights import load_thinker
from omni_train.objectives.distillation import distillation_losses, divergence_from, states_of
from omni_train.objectives.gspo import gspo_losses
from omni_train.objectives.terms import Losses
from omni_train.rollout.rewards import Rewards, build_rule
from omni_train.rollout.sample import ThinkerSampler
from omni_train.rollout.source import RolloutSource


def frozen(module: nn.Module, config: RunConfig, ranks: Ranks) -> nn.Module:
    """A model that is asked only, its experts sharded as the engine says."""
    return build_engine(module, config.engine, config.stage, None, micro_batches=1).eval().to(ranks.device)


def load_teacher(folder: Path, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Thinker:
    """The exported Thinker in ``folder``, of its own size. Raises ConfigError where it cannot teach this student."""
    description = folder / "config.json"
    kind = json.loads(description.read_text()).get("model_type") if description.is_file() else "none"
    if kind != Qwen3OmniMoeThinkerConfig.model_type:
        raise ConfigError(f"init.teacher '{folder}' holds a model of type '{kind}'; give the export of a Thinker")
    if fingerprint(load_tokenizer(folder)) != fingerprint(tokenizer):
        raise ConfigError(
            f"init.teacher '{folder}' has another tokenizer than data.tokenizer ('{config.data.tokenizer}'); "
            "distillation compares token by token: take a teacher trained with this one"
        )
    stock = Qwen3OmniMoeThinkerConfig.from_pretrained(folder, local_files_only=True)
    vision, own = stock.vision_config, config.model.vision
    for name in ("patch_size", "temporal_patch_size", "spatial_merge_size"):
        if getattr(vision, name) != getattr(own, name):
            raise ConfigError(
                f"init.teacher '{folder}' cuts pictures with {name} {getattr(vision, name)}, model.vision with "
                f"{getattr(own, name)}; both see the same patches, so they must agree"
            )
    return load_thinker(folder)


def build_references(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, ranks: Ranks, modules: dict[str, nn.Module]
) -> dict[str, nn.Module]:
    """The frozen models that the objective asks, by name; a reference is a copy of what the stage starts from."""
    stage = config.stage
    if stage.objective is Objective.distillation:
        return {"teacher": frozen(load_teacher(Path(config.init["teacher"]), config, tokenizer), config, ranks)}
    if stage.gspo is not None and stage.gspo.kl_weight > 0:
        return {"reference": frozen(copy.deepcopy(modules["thinker"]), config, ranks)}
    if stage.objective is Objective.talker_dpo:
        return {"reference": frozen(copy.deepcopy(modules["talker"]), config, ranks)}
    return {}


def answers_a_pack(rollout: RolloutConfig, context: int) -> int:
    """How many documents share a pack: as many as fit the context at their longest."""
    longest = rollout.max_prompt_tokens or context - rollout.max_new_tokens
    return max(1, context // (longest + rollout.max_new_tokens))


def packs_a_step(config: RunConfig, num_prompts: int) -> int:
    """Packs of an optimizer step on a rank that samples answers to ``num_prompts`` prompts a cycle."""
    rollout = config.stage.rollout
    assert rollout is not None
    num_answers = num_prompts // rollout.updates_per_cycle * rollout.group_size
    return math.ceil(num_answers / answers_a_pack(rollout, config.stage.context))


def rollout_source(
    prompts: StepLoader[Prompt], thinker: nn.Module, config: RunConfig, tokenizer: PreTrainedTokenizerBase, ranks: Ranks
) -> RolloutSource:
    """The batch source of a stage that samples answers with ``thinker``."""
    stage, rollout = config.stage, config.stage.rollout
    assert rollout is not None
    encoder = Encoder(tokenizer, media_geometry(config.model.vision))

    def is_any(flag: bool) -> bool:
        return parallel.any_rank(flag, ranks.device)

    def to_pack(documents: list[Document]) -> Pack:
        windows = [stage.audio_window_sec[1]] * sum(len(document.mels) for document in documents)
        return collate(documents, windows, patch_dim=encoder.geometry.patch_dim)

    rewards = None
    if stage.gspo is not None:
        settings = stage.gspo.rewards
        rules = {name: build_rule(name, own, rollout.max_new_tokens, ranks.device) for name, own in settings.items()}
        rewards = Rewards(rules, settings, list(config.mixture))
    return RolloutSource(
        prompts,
        ThinkerSampler(
            thinker,
            rollout,
            lambda documents: to_pack(documents).to(ranks.device),
            stop_id=encoder.ids.im_end,
            batch=rollout.sample_batch,
            is_open_anywhere=is_any,
        ),
        rewards,
        rollout,
        slots=config.data.packs_per_lane,
        per_pack=answers_a_pack(rollout, stage.context),
        scale_advantages=stage.gspo is not None and stage.gspo.scale_advantages,
        seed=config.seed,
        decode=partial(tokenizer.decode, skip_special_tokens=True),
        collate=to_pack,
        make_dummy=lambda: dummy_pack(encoder.geometry, encoder.ids),
        load_prompt=prompts.load_pack,
        is_any=is_any,
    )


def distillation_objective(
    engine: Any, name: str, teacher: nn.Module, config: RunConfig
) -> Callable[[Pack, Tensor | None], Losses]:
    """The losses of a pack for the student in ``engine``."""
    settings = config.stage.distillation
    assert settings is not None

    def losses(pack: Pack, fractions: Tensor | None) -> Losses:
        output = engine(pack, divergence_from(states_of(teacher, pack), settings.beta, settings.temperature))
        return distillation_losses(output, pack, name, fractions, config.stage.router_aux_coef)

    return losses


def gspo_objective(
    engine: Any, name: str, reference: nn.Module | None, config: RunConfig
) -> Callable[[Pack, Tensor | None], Losses]:
    """The losses of a pack of rollouts for the policy in ``engine``; log-probabilities are at the temperature that the
    answers were sampled at."""
    settings, rollout = config.stage.gspo, config.stage.rollout
    assert settings is not None and rollout is not None
    score = token_losses_at(rollout.temperature)

    def losses(pack: Pack, fractions: Tensor | None) -> Losses:
        reference_K = None
        if reference is not None:
            with torch.no_grad():
                reference_K = -reference(pack, score)["losses"]
        return gspo_losses(
            engine(pack, score),
            pack,
            name,
            fractions,
            config.stage.router_aux_coef,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            reference_K=reference_K,
            kl_weight=settings.kl_weight,
        )

    return losses
