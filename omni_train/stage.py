"""A stage put together: trained engines by name, frozen models by name, a batch source, an objective.

next_token, LLM trained          engine "thinker" (or "llm" when only the LLM trains)
next_token, LLM frozen (S1)      engine "towers", frozen "llm" under expert parallelism
distillation, gspo               engine "thinker", asking "teacher" or "reference" (post_training.py)
transcription, captioning        engine "aut" or "captioner"
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from omni_train import post_training
from omni_train.config import THINKER_OBJECTIVES, ConfigError, Objective, RunConfig
from omni_train.data.contracts import Pack
from omni_train.data.loader import StepLoader
from omni_train.data.tokenizer import media_token_ids, token_spelling
from omni_train.engine.deepspeed import build_engine
from omni_train.engine.parallel import Ranks
from omni_train.models.build import build_decoder, build_encoder, build_thinker, thinker_config
from omni_train.models.components import Inventory, freeze_all_but
from omni_train.models.encoder_decoder import EncoderDecoder
from omni_train.models.thinker import compose
from omni_train.models.weights import load_components
from omni_train.objectives import gspo
from omni_train.objectives.next_token import counts, next_token_losses
from omni_train.objectives.terms import Losses

TOWER_COMPONENTS = {"audio_encoder", "audio_adapter", "vision_encoder", "vision_adapter"}


class BatchSource(Protocol):
    """Where the batches of a step come from: the planner's packs, or what the stage makes of them."""

    def next_step(self) -> list[Pack]:
        """This rank's packs of the next step. Raises OutOfData at the end of the data."""
        ...


class Stateful(Protocol):
    """What a checkpoint holds besides the engines: tensors and plain values, this rank's own."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def nothing() -> None:
    """The hook of a stage that has none."""


@dataclass(slots=True, kw_only=True)
class Stage:
    """What the loop needs of a stage.

    ``losses`` is the objective: the losses of a pack, given the global expert fractions [L, E] of the step before (None
    without a router); ``counts`` is what a pack adds to the global divisors of its terms, "tokens" among them.
    ``forward`` maps a pack to the model's output, for held-out losses. ``after_step`` runs when all optimizers moved.
    ``references`` are frozen models that the objective asks (a teacher), no part of what the stage exports.
    """

    engines: dict[str, Any]
    frozen: dict[str, nn.Module]
    forward: Callable[[Pack], dict[str, Tensor]]
    losses: Callable[[Pack, Tensor | None], Losses]
    counts: Callable[[Pack], dict[str, int]]
    inventory: list[Inventory]
    references: dict[str, nn.Module] = field(default_factory=dict)
    router_shape: tuple[int, int] | None = None  # layers, experts
    batches: Callable[[BatchSource], BatchSource] = lambda packs: packs
    stateful: dict[str, Stateful] = field(default_factory=dict)
    after_step: Callable[[], None] = nothing

    def modules(self) -> dict[str, nn.Module]:
        """The modules of all engines by name."""
        return {name: engine.module for name, engine in self.engines.items()} | self.frozen


def build_modules(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, nn.Module]:
    """The unsharded fp32 modules of a stage by engine name, weights loaded from ``config.init``."""
    model, objective = config.model, config.stage.objective
    modules: dict[str, nn.Module]
    if objective in THINKER_OBJECTIVES:
        stock = thinker_config(model, tokenizer, config.stage.yarn_factor)
        thinker = compose(build_thinker(stock, seed=config.seed, embedding_std=model.text.embedding_std))
        trained = set(config.stage.components)
        if trained == {"llm"} and objective is Objective.next_token:
            modules = {"llm": thinker.llm}
        elif "llm" in trained:
            modules = {"thinker": thinker}
        else:
            modules = {"towers": thinker.towers, "llm": thinker.llm}
    else:
        kind = "audio" if objective is Objective.transcription else "vision"
        width = model.audio.d_model if kind == "audio" else model.vision.hidden_size
        has_ctc = config.stage.ctc_weight > 0
        modules = {
            "aut" if kind == "audio" else "captioner": EncoderDecoder(
                build_encoder(model, kind, seed=config.seed),
                build_decoder(model, width, seed=config.seed + 1, has_ctc=has_ctc),
                kind,
                media_token_ids(tokenizer, kind),
                token_spelling(tokenizer, model.text.vocab_size) if has_ctc else None,
            )
        }
    load_init(modules, {name: folder for name, folder in config.init.items() if name != "teacher"})
    return modules


def load_init(modules: dict[str, nn.Module], init: dict[str, str]) -> None:
    """Load components from their folders; a component that no module of the stage has is an error."""
    from omni_train.models.components import component_of

    present = {component_of(name) for module in modules.values() for name, _ in module.named_parameters()}
    chosen = {component: init["all"] for component in present} if "all" in init else {}
    chosen |= {name: folder for name, folder in init.items() if name != "all"}
    for component, folder in chosen.items():
        if component not in present:
            raise ConfigError(
                f"init.{component}: this stage has no such component; it has {', '.join(sorted(present))}"
            )
        for module in modules.values():
            load_components(module, Path(folder), {component})


def build_stage(config: RunConfig, tokenizer: PreTrainedTokenizerBase, ranks: Ranks, micro_batches: int) -> Stage:
    """Engines of a stage, trainable parameters checked against the configuration."""
    modules = build_modules(config, tokenizer)
    components = config.stage.components
    references = post_training.build_references(config, tokenizer, ranks, next(iter(modules.values())))
    if config.stage.rollout is not None:
        micro_batches = post_training.packs_a_step(config, micro_batches)
    inventory = freeze_all_but(modules.values(), components)
    if config.engine.recompute:
        for module in modules.values():
            enable_recompute(module)
    engines, frozen = {}, {}
    for name, module in modules.items():
        is_trained = any(parameter.requires_grad for parameter in module.parameters())
        built = build_engine(
            module, config.engine, config.stage, components if is_trained else None, micro_batches=micro_batches
        )
        (engines if is_trained else frozen)[name] = built
        built.train()
    everything = {**engines, **frozen}
    if "towers" in everything:
        towers, llm = everything["towers"], everything["llm"]

        def forward(pack: Pack) -> dict[str, Tensor]:
            return llm(pack, towers(pack))
    else:
        forward = next(iter(everything.values()))
    text, has_router = config.model.text, config.stage.objective in THINKER_OBJECTIVES
    stage = Stage(
        engines=engines,
        frozen=frozen,
        forward=forward,
        losses=build_losses(config, engines, forward, references),
        counts=gspo.counts if config.stage.objective is Objective.gspo else counts,
        inventory=inventory,
        references=references,
        router_shape=(text.num_hidden_layers, text.num_experts) if has_router else None,
    )
    if config.stage.rollout is not None:
        writer = references.get(config.stage.rollout.by.name, everything["thinker"])

        def rollouts(prompts: StepLoader) -> BatchSource:
            source = post_training.rollout_source(prompts, getattr(writer, "module", writer), config, tokenizer, ranks)
            stage.stateful["rollouts"] = source
            return source

        stage.batches = rollouts
    return stage


def build_losses(
    config: RunConfig,
    engines: dict[str, Any],
    forward: Callable[[Pack], dict[str, Tensor]],
    references: dict[str, nn.Module],
) -> Callable[[Pack, Tensor | None], Losses]:
    """The objective of a stage."""
    stage, (name, engine) = config.stage, next(iter(engines.items()))
    if stage.objective is Objective.distillation:
        return post_training.distillation_objective(engine, name, references["teacher"], config)
    if stage.objective is Objective.gspo:
        return post_training.gspo_objective(engine, name, references.get("reference"), config)

    def losses(pack: Pack, fractions: Tensor | None) -> Losses:
        return next_token_losses(forward(pack), name, fractions, stage.router_aux_coef, stage.ctc_weight)

    return losses


def enable_recompute(module: nn.Module) -> None:
    """Activation checkpointing of every transformer layer. NOTE: the reentrant form gives wrong gradients here."""
    for child in module.modules():
        if hasattr(child, "gradient_checkpointing_enable"):
            child.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
