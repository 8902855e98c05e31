"""A stage put together: trained engines by name, frozen models by name, a batch source, an objective.

next_token, LLM trained          engine "thinker" (or "llm" when only the LLM trains)
next_token, LLM frozen (S1)      engine "towers", frozen "llm" under expert parallelism
distillation, gspo               engine "thinker", asking "teacher" or "reference" (post_training.py)
transcription, captioning        engine "aut" or "captioner"
codec                            engine "codec"; frozen "aut" where the first codebook is drawn to its features
code2wav                         engines "code2wav" and, with adversaries, "discriminators"; frozen "codec"
talker                           engine "talker", frozen "thinker" under expert parallelism
talker_dpo                       the same with frozen "reference", a copy of the Talker that the stage starts from
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from omni_train.config import THINKER_COMPONENTS, ConfigError, Objective, RunConfig, init_of
from omni_train.data.tokenizer import media_token_ids, token_spelling
from omni_train.engine.deepspeed import build_engine
from omni_train.engine.parallel import Ranks
from omni_train.models.build import build_decoder, build_encoder
from omni_train.models.code2wav import start_from_codebooks
from omni_train.models.components import component_of, freeze_all_but
from omni_train.models.encoder_decoder import EncoderDecoder
from omni_train.models.weights import WAVE_HEAD, load_components, wave_head_of
from omni_train.stage import post_training
from omni_train.stage.codec import code2wav_stage, codec_modules, codec_stage
from omni_train.stage.contract import Parts
from omni_train.stage.contract import Stage as Stage
from omni_train.stage.talker import talker_modules, talker_stage
from omni_train.stage.thinker import next_token_stage, thinker_modules


def encoder_decoder_modules(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, nn.Module]:
    """AuT or the captioner: an encoder with the decoder that it learns with."""
    model, kind = config.model, "audio" if config.stage.objective is Objective.transcription else "vision"
    width = model.audio.d_model if kind == "audio" else model.vision.hidden_size
    has_ctc = config.stage.ctc_weight > 0
    whole = EncoderDecoder(
        build_encoder(model, kind, seed=config.seed),
        build_decoder(model, width, seed=config.seed + 1, has_ctc=has_ctc),
        kind,
        media_token_ids(tokenizer, kind),
        token_spelling(tokenizer, model.text.vocab_size) if has_ctc else None,
    )
    return {"aut" if kind == "audio" else "captioner": whole}


BUILDERS = {
    Objective.next_token: (thinker_modules, next_token_stage),
    Objective.distillation: (thinker_modules, next_token_stage),
    Objective.gspo: (thinker_modules, next_token_stage),
    Objective.transcription: (encoder_decoder_modules, next_token_stage),
    Objective.captioning: (encoder_decoder_modules, next_token_stage),
    Objective.codec: (codec_modules, codec_stage),
    Objective.code2wav: (codec_modules, code2wav_stage),
    Objective.talker: (talker_modules, talker_stage),
    Objective.talker_dpo: (talker_modules, talker_stage),
}
"""What an objective builds, and how its engines become a stage."""


def build_modules(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, nn.Module]:
    """The unsharded fp32 modules of a stage by engine name, weights loaded from ``config.init``."""
    modules = BUILDERS[config.stage.objective][0](config, tokenizer)
    load_init(modules, config)
    if config.stage.objective is Objective.code2wav and init_of(config.init, "code2wav") is None:
        start_from_codebooks(modules["code2wav"], modules["codec"].codec_encoder.quantizer, seed=config.seed)
    return modules


def load_init(modules: dict[str, nn.Module], config: RunConfig) -> None:
    """Load components from their folders; a component that no module of the stage has is an error.

    Of a Code2Wav with another head all but the head is taken.
    """
    present = {component_of(name) for module in modules.values() for name, _ in module.named_parameters()}
    for name in config.init:
        if name not in ("teacher", "all") and not present & {name, *(THINKER_COMPONENTS if name == "thinker" else ())}:
            raise ConfigError(f"init.{name}: this stage has no such component; it has {', '.join(sorted(present))}")
    for component in present:
        folder = init_of(config.init, component)
        if folder is None:
            continue
        leave_out = WAVE_HEAD if component == "code2wav" and has_other_head(config, folder) else None
        for module in modules.values():
            load_components(module, Path(folder), {component}, leave_out)


def has_other_head(config: RunConfig, code2wav: str) -> bool:
    """Whether an exported Code2Wav has another head than the preset."""
    return wave_head_of(Path(code2wav)) is not config.model.code2wav.head


def origin(config: RunConfig, component: str) -> str:
    """Where a component's weights start, in words; nothing for fresh ones."""
    folder = init_of(config.init, component)
    if folder is None:
        return ""
    return f"from {folder}" + (" but its head" if component == "code2wav" and has_other_head(config, folder) else "")


def build_stage(config: RunConfig, tokenizer: PreTrainedTokenizerBase, ranks: Ranks, micro_batches: int) -> Stage:
    """Engines of a stage, trainable parameters checked against the configuration."""
    modules = build_modules(config, tokenizer)
    components = config.stage.components
    references = post_training.build_references(config, tokenizer, ranks, modules)
    inventory = freeze_all_but(modules.values(), components)
    if config.engine.recompute:
        for module in modules.values():
            enable_recompute(module)
    engines: dict[str, Any] = {}
    frozen: dict[str, Any] = {}
    for name, module in modules.items():
        is_trained = any(parameter.requires_grad for parameter in module.parameters())
        built = build_engine(
            module, config.engine, config.stage, components if is_trained else None, micro_batches=micro_batches
        )
        (engines if is_trained else frozen)[name] = built
        built.train()
    parts = Parts(
        config=config,
        tokenizer=tokenizer,
        ranks=ranks,
        engines=engines,
        frozen=frozen,
        references=references,
        inventory=inventory,
    )
    return BUILDERS[config.stage.objective][1](parts)


def enable_recompute(module: nn.Module) -> None:
    """Activation checkpointing of every transformer layer. NOTE: the reentrant form gives wrong gradients here."""
    for child in module.modules():
        if hasattr(child, "gradient_checkpointing_enable"):
            child.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
