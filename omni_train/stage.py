"""A stage put together: trained engines by name, frozen models by name, a batch source, an objective.

next_token, LLM trained          engine "thinker" (or "llm" when only the LLM trains)
next_token, LLM frozen (S1)      engine "towers", frozen "llm" under expert parallelism
transcription, captioning        engine "aut" or "captioner"
codec                            engine "codec"; frozen "aut" where the first codebook is drawn to its features
code2wav                         engines "code2wav" and, with adversaries, "discriminators"; frozen "codec"
talker                           engine "talker", frozen "thinker" under expert parallelism
talker_dpo                       the same with frozen "reference", a copy of the Talker that the stage starts from
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from omni_train.config import ConfigError, Objective, RunConfig
from omni_train.data.contracts import MODALITIES, Pack
from omni_train.data.tokenizer import media_token_ids, token_spelling
from omni_train.engine.deepspeed import build_engine
from omni_train.engine.parallel import Ranks, gather_over_ranks, sum_over_ranks
from omni_train.models.build import (
    build_decoder,
    build_encoder,
    build_talker,
    build_thinker,
    talker_config,
    thinker_config,
)
from omni_train.models.code2wav import WeightAverage, build_code2wav, start_from_codebooks
from omni_train.models.codec import Codec, CodeStatistics, FrozenCodec, SpeechFeatures
from omni_train.models.components import Inventory, freeze_all_but
from omni_train.models.discriminators import Discriminators, judge
from omni_train.models.encoder_decoder import EncoderDecoder
from omni_train.models.talker import Talker, ThinkerStates, states_for_talker
from omni_train.models.thinker import Thinker, compose
from omni_train.models.weights import load_components
from omni_train.objectives import dpo
from omni_train.objectives import talker as talker_objective
from omni_train.objectives.code2wav import code2wav_losses, multi_scale_mel_loss
from omni_train.objectives.codec import codec_losses, mel_regression, num_frames
from omni_train.objectives.dpo import talker_dpo_losses
from omni_train.objectives.next_token import counts, next_token_losses
from omni_train.objectives.talker import talker_losses
from omni_train.objectives.terms import Losses

TALKER_OBJECTIVES = (Objective.talker, Objective.talker_dpo)
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
    ``forward`` maps a pack to the model's output, for held-out losses. ``after_step`` runs when all optimizers moved,
    ``before_export`` when the last checkpoint is saved.
    """

    engines: dict[str, Any]
    frozen: dict[str, nn.Module]
    forward: Callable[[Pack], dict[str, Tensor]]
    losses: Callable[[Pack, Tensor | None], Losses]
    counts: Callable[[Pack], dict[str, int]]
    inventory: list[Inventory]
    router_shape: tuple[int, int] | None = None  # layers, experts
    before_export: Callable[[], None] = nothing
    batches: Callable[[BatchSource], BatchSource] = lambda packs: packs
    stateful: dict[str, Stateful] = field(default_factory=dict)
    after_step: Callable[[], None] = nothing

    def modules(self) -> dict[str, nn.Module]:
        """The modules of all engines by name, without a reference: its parameters have the names of the trained."""
        frozen = {name: module for name, module in self.frozen.items() if name != "reference"}
        return {name: engine.module for name, engine in self.engines.items()} | frozen


def build_modules(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, nn.Module]:
    """The unsharded fp32 modules of a stage by engine name, weights loaded from ``config.init``."""
    model, objective = config.model, config.stage.objective
    modules: dict[str, nn.Module]
    if objective in TALKER_OBJECTIVES:
        modules = {"thinker": new_thinker(config, tokenizer), "talker": new_talker(config, tokenizer)}
    elif objective is Objective.next_token:
        thinker = new_thinker(config, tokenizer)
        trained = set(config.stage.components)
        if trained == {"llm"}:
            modules = {"llm": thinker.llm}
        elif "llm" in trained:
            modules = {"thinker": thinker}
        else:
            modules = {"towers": thinker.towers, "llm": thinker.llm}
    elif objective in (Objective.codec, Objective.code2wav):
        modules = speech_modules(config)
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
    load_init(modules, config.init)
    if objective is Objective.code2wav and "code2wav" not in config.init:
        start_from_codebooks(modules["code2wav"], modules["codec"].codec_encoder.quantizer, seed=config.seed)
    return modules


def speech_modules(config: RunConfig) -> dict[str, nn.Module]:
    """Modules of codec and code2wav, randomly initialised."""
    model, weights = config.model, config.stage.reconstruction
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.stage.objective is Objective.codec:
            semantic_dim = model.audio.d_model if weights.semantic > 0 else 0
            modules: dict[str, nn.Module] = {"codec": Codec(model.codec, semantic_dim)}
            if semantic_dim:
                modules["aut"] = SpeechFeatures(build_encoder(model, "audio", seed=config.seed))
            return modules
        modules = {"code2wav": build_code2wav(model, seed=config.seed), "codec": FrozenCodec(model.codec)}
        if weights.adversarial > 0:
            modules["discriminators"] = Discriminators(weights.discriminator_channels)
        return modules


def codec_stage(
    config: RunConfig, engines: dict[str, Any], frozen: dict[str, nn.Module], inventory: list[Inventory]
) -> Stage:
    """The codec's stage: the codebooks move after each step, by the statistics of all ranks."""
    codec, weights = engines["codec"], config.stage.reconstruction
    quantizer = codec.module.codec_encoder.quantizer

    def forward(pack: Pack) -> dict[str, Tensor]:
        output = codec(pack)
        mel = mel_regression(output["predicted"], output["mel"], output["is_mel"])
        return {"losses": mel, "modality": pack.doc_modality.new_full((len(mel),), MODALITIES.index("audio"))}

    def losses(pack: Pack, _: Tensor | None) -> Losses:
        output = codec(pack)
        if weights.semantic > 0:
            output["teacher"] = frozen["aut"](pack)
        return codec_losses(output, weights)

    def move_codebooks() -> None:
        mine = quantizer.take_statistics()
        everywhere = CodeStatistics(
            sum_over_ranks(mine.counts), sum_over_ranks(mine.sums), gather_over_ranks(mine.candidates)
        )
        quantizer.update(everywhere, config.seed)

    return Stage(
        engines=engines,
        frozen=frozen,
        forward=forward,
        losses=losses,
        counts=num_frames,
        inventory=inventory,
        after_step=move_codebooks,
    )


def code2wav_stage(
    config: RunConfig, engines: dict[str, Any], frozen: dict[str, nn.Module], inventory: list[Inventory]
) -> Stage:
    """Code2Wav's stage: what is measured and exported is the average of its weights."""
    code2wav, codec, weights = engines["code2wav"], frozen["codec"], config.stage.reconstruction
    average = WeightAverage(code2wav.module, weights.average_decay)

    def forward(pack: Pack) -> dict[str, Tensor]:
        output = torch.func.functional_call(code2wav.module, average.average, (pack, codec(pack)))
        mel = multi_scale_mel_loss(output["wave"], output["target"], output["lengths"])
        return {"losses": mel, "modality": pack.doc_modality.new_full((len(mel),), MODALITIES.index("audio"))}

    def losses(pack: Pack, _: Tensor | None) -> Losses:
        output = code2wav(pack, codec(pack))
        judged = judge(engines["discriminators"], output["wave"], output["target"]) if weights.adversarial > 0 else None
        return code2wav_losses(output, weights, judged)

    return Stage(
        engines=engines,
        frozen=frozen,
        forward=forward,
        losses=losses,
        counts=num_frames,
        inventory=inventory,
        stateful={"average": average},
        after_step=average.update,
        before_export=average.install,
    )


def new_thinker(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Thinker:
    """A Thinker initialised from the run's seed."""
    stock = thinker_config(config.model, tokenizer, config.stage.yarn_factor)
    return compose(build_thinker(stock, seed=config.seed, embedding_std=config.model.text.embedding_std))


def new_talker(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Talker:
    """A Talker initialised from the run's seed."""
    assert config.model.talker is not None
    stock = talker_config(config.model, tokenizer)
    return Talker(build_talker(stock, seed=config.seed, embedding_std=config.model.talker.embedding_std))


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
    inventory = freeze_all_but(modules.values(), components)
    if config.engine.recompute:
        for module in modules.values():
            enable_recompute(module)
    if config.stage.objective is Objective.talker_dpo:
        modules["reference"] = copy.deepcopy(modules["talker"]).requires_grad_(False)
    engines, frozen = {}, {}
    for name, module in modules.items():
        is_trained = any(parameter.requires_grad for parameter in module.parameters())
        built = build_engine(
            module, config.engine, config.stage, components if is_trained else None, micro_batches=micro_batches
        )
        (engines if is_trained else frozen)[name] = built
        built.train()
    if config.stage.objective in TALKER_OBJECTIVES:
        return talker_stage(config, engines, frozen, inventory)
    everything = {**engines, **frozen}
    if config.stage.objective is Objective.codec:
        return codec_stage(config, engines, frozen, inventory)
    if config.stage.objective is Objective.code2wav:
        return code2wav_stage(config, engines, frozen, inventory)
    if "towers" in everything:
        towers, llm = everything["towers"], everything["llm"]

        def forward(pack: Pack) -> dict[str, Tensor]:
            return llm(pack, towers(pack))
    else:
        forward = next(iter(everything.values()))
    trained, stage, text = next(iter(engines)), config.stage, config.model.text

    def losses(pack: Pack, fractions: Tensor | None) -> Losses:
        return next_token_losses(forward(pack), trained, fractions, stage.router_aux_coef, stage.ctc_weight)

    has_router = stage.objective is Objective.next_token
    return Stage(
        engines=engines,
        frozen=frozen,
        forward=forward,
        losses=losses,
        counts=counts,
        inventory=inventory,
        router_shape=(text.num_hidden_layers, text.num_experts) if has_router else None,
    )


def talker_stage(
    config: RunConfig, engines: dict[str, Any], frozen: dict[str, nn.Module], inventory: list[Inventory]
) -> Stage:
    """A stage that trains the Talker beside a frozen Thinker, on codes or, with a frozen reference, on preferences."""
    thinker, talker, stage, sizes = frozen["thinker"], engines["talker"], config.stage, config.model.talker
    is_dpo = stage.objective is Objective.talker_dpo
    assert sizes is not None

    def states(pack: Pack) -> ThinkerStates:
        with torch.no_grad():
            return states_for_talker(thinker.llm, pack, thinker.towers(pack), sizes.accept_hidden_layer)

    def forward(pack: Pack) -> dict[str, Tensor]:
        return heldout_output(talker(pack.speech, states(pack)), pack, every=2 if is_dpo else 1)

    def losses(pack: Pack, fractions: Tensor | None) -> Losses:
        seen = states(pack)
        output = talker(pack.speech, seen)
        if not is_dpo:
            return talker_losses(output, pack, "talker", fractions, stage.router_aux_coef)
        with torch.no_grad():
            reference = frozen["reference"](pack.speech, seen)
        return talker_dpo_losses(output, reference, pack, "talker", fractions, stage.router_aux_coef, stage.dpo_beta)

    return Stage(
        engines=engines,
        frozen=frozen,
        forward=forward,
        losses=losses,
        counts=dpo.counts if is_dpo else talker_objective.counts,
        inventory=inventory,
        router_shape=(sizes.decoder.num_hidden_layers, sizes.decoder.num_experts),
    )


def heldout_output(output: dict[str, Tensor], pack: Pack, every: int) -> dict[str, Tensor]:
    """First codes of every ``every``-th sequence (of pairs the chosen ones) as LanguageModel.forward returns tokens."""
    assert pack.speech is not None
    is_kept = output["sequence"] % every == 0
    document = pack.speech.document[output["sequence"][is_kept]]
    kept = {name: output[name][is_kept] for name in ("losses", "predictions", "labels")}
    return kept | {"document": document, "modality": pack.doc_modality[document]}


def enable_recompute(module: nn.Module) -> None:
    """Activation checkpointing of every transformer layer. NOTE: the reentrant form gives wrong gradients here."""
    for child in module.modules():
        if hasattr(child, "gradient_checkpointing_enable"):
            child.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
