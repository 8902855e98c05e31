"""Stages of the Talker: on codes, or on preferences, beside a frozen Thinker."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from omni_train.config import Objective, RunConfig
from omni_train.data.contracts import Pack
from omni_train.models.build import build_talker, talker_config
from omni_train.models.talker import Talker, ThinkerStates, states_for_talker
from omni_train.objectives import dpo
from omni_train.objectives import talker as talker_objective
from omni_train.objectives.dpo import talker_dpo_losses
from omni_train.objectives.talker import talker_losses
from omni_train.objectives.terms import Losses
from omni_train.stage.contract import Parts, Stage
from omni_train.stage.thinker import new_thinker


def talker_modules(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, nn.Module]:
    """Thinker and Talker, initialised from the run's seed."""
    assert config.model.talker is not None
    stock = talker_config(config.model, tokenizer)
    talker = Talker(build_talker(stock, seed=config.seed, embedding_std=config.model.talker.embedding_std))
    return {"thinker": new_thinker(config, tokenizer), "talker": talker}


def talker_stage(parts: Parts) -> Stage:
    """A stage that trains the Talker beside a frozen Thinker, on codes or, with a frozen reference, on preferences."""
    thinker, talker = parts.frozen["thinker"], parts.engines["talker"]
    stage, sizes = parts.config.stage, parts.config.model.talker
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
            reference = parts.references["reference"](pack.speech, seen)
        weights = stage.router_aux_coef, stage.dpo_beta, stage.dpo_sft_weight
        return talker_dpo_losses(output, reference, pack, "talker", fractions, *weights)

    return parts.stage(
        forward=forward,
        losses=losses,
        counts=dpo.counts if is_dpo else talker_objective.counts,
        router_shape=(sizes.decoder.num_hidden_layers, sizes.decoder.num_experts),
    )


def heldout_output(output: dict[str, Tensor], pack: Pack, every: int) -> dict[str, Tensor]:
    """First codes of every ``every``-th sequence (of pairs the chosen ones) as LanguageModel.forward returns tokens."""
    assert pack.speech is not None
    is_kept = output["sequence"] % every == 0
    document = pack.speech.document[output["sequence"][is_kept]]
    kept = {name: output[name][is_kept] for name in ("losses", "predictions", "labels")}
    return kept | {"document": document, "modality": pack.doc_modality[document]}
