"""Stages of the Thinker: pretraining, S1 with its frozen LLM, and post-training."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from omni_train.config import THINKER_OBJECTIVES, Objective, RunConfig
from omni_train.data.contracts import Pack
from omni_train.data.loader import StepLoader
from omni_train.models.build import build_thinker, thinker_config
from omni_train.models.thinker import Thinker, compose
from omni_train.objectives import gspo
from omni_train.objectives.next_token import counts, next_token_losses
from omni_train.objectives.terms import Losses
from omni_train.stage import post_training
from omni_train.stage.contract import BatchSource, Parts, Stage


def new_thinker(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Thinker:
    """A Thinker initialised from the run's seed."""
    stock = thinker_config(config.model, tokenizer, config.stage.yarn_factor)
    return compose(build_thinker(stock, seed=config.seed, embedding_std=config.model.text.embedding_std))


def thinker_modules(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, nn.Module]:
    """The Thinker, in the pieces that the stage trains and freezes."""
    thinker, trained = new_thinker(config, tokenizer), set(config.stage.components)
    if trained == {"llm"} and config.stage.objective is Objective.next_token:
        return {"llm": thinker.llm}
    if "llm" in trained:
        return {"thinker": thinker}
    return {"towers": thinker.towers, "llm": thinker.llm}


def next_token_stage(parts: Parts) -> Stage:
    """A stage of one forward: the Thinker, towers before a frozen LLM, or an encoder with its decoder."""
    config, stage = parts.config, parts.config.stage
    everything = {**parts.engines, **parts.frozen}
    if "towers" in everything:
        towers, llm = everything["towers"], everything["llm"]

        def forward(pack: Pack) -> dict[str, Tensor]:
            return llm(pack, towers(pack))
    else:
        forward = next(iter(everything.values()))
    text, has_router = config.model.text, stage.objective in THINKER_OBJECTIVES
    built = parts.stage(
        forward=forward,
        losses=_losses(parts, forward),
        counts=gspo.counts if stage.objective is Objective.gspo else counts,
        router_shape=(text.num_hidden_layers, text.num_experts) if has_router else None,
    )
    if stage.rollout is not None:
        writer = parts.references.get(stage.rollout.by.name, everything["thinker"])

        def rollouts(prompts: StepLoader) -> BatchSource:
            source = post_training.rollout_source(
                prompts, getattr(writer, "module", writer), config, parts.tokenizer, parts.ranks
            )
            built.stateful["rollouts"] = source
            return source

        built.batches = rollouts
    return built


def _losses(parts: Parts, forward: Callable[[Pack], dict[str, Tensor]]) -> Callable[[Pack, Tensor | None], Losses]:
    config, stage, (name, engine) = parts.config, parts.config.stage, next(iter(parts.engines.items()))
    if stage.objective is Objective.distillation:
        return post_training.distillation_objective(engine, name, parts.references["teacher"], config)
    if stage.objective is Objective.gspo:
        return post_training.gspo_objective(engine, name, parts.references.get("reference"), config)

    def losses(pack: Pack, fractions: Tensor | None) -> Losses:
        return next_token_losses(forward(pack), name, fractions, stage.router_aux_coef, stage.ctc_weight)

    return losses
