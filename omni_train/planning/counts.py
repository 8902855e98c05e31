"""Parameters of a preset by component, counted on the meta device: what each includes, how many are active a token."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from omni_train.config import ModelConfig, RunConfig
from omni_train.models.build import build_decoder, build_omni
from omni_train.models.components import component_of
from omni_train.models.weights import canonical

# What a component includes: (regular expression on the canonical name, words). First match wins.
PARTS = (
    (r".*\.experts\.", "routed experts"),
    (r".*\.mlp\.(gate\.|router|shared_expert)", "routers and shared experts"),
    (r"model\.embed_tokens\.", "token embeddings"),
    (r"lm_head\.", "head"),
    (r"audio_tower\.conv", "convolutions"),
    (r"visual\.(patch_embed|pos_embed)", "patch and position embeddings"),
    (r"visual\.merger\.", "merger"),
    (r"visual\.(deepstack_)?merger_list\.", "DeepStack mergers"),
    (r"talker\.code_predictor\.model\.codec_embedding\.", "residual code embeddings"),
    (r"talker\.code_predictor\.lm_head\.", "residual code heads"),
    (r"talker\.(text|hidden)_projection\.", "text and media projections"),
    (r"talker\.(model\.codec_embedding|codec_head)\.", "first code's embedding and head"),
    (r"code2wav\.code_embedding\.", "code embedding"),
    (r"code2wav\.(upsample|decoder)\.", "causal ConvNet"),
    (r"audio_decoder\.(head|decoder\.embed_tokens)\.", "token embeddings and head"),
    (r"audio_tower\.proj", "projection to the LLM"),
    (r"", "transformer layers"),
)


@dataclass(frozen=True, slots=True)
class Count:
    """Parameters of one component. ``num_active``: those that one token of its own passes through (of routed experts
    the chosen ones; embeddings and heads count whole). ``parts``: the same parameters by what they are."""

    component: str
    num_parameters: int
    num_active: int
    parts: dict[str, int]

    @property
    def includes(self) -> str:
        """The parts in words, with millions of parameters."""
        return ", ".join(f"{words} {number / 1e6:,.1f} M" for words, number in self.parts.items())


def count_parameters(model: ModelConfig) -> dict[str, Count]:
    """Counts by component of the whole Qwen3-Omni model (the Thinker alone for a preset without a Talker), and of the
    decoder that AuT trains with, which no exported model holds."""
    omni = build_omni(model, device="meta")
    with torch.device("meta"):
        decoder = build_decoder(model, model.audio.d_model, seed=0)
    texts = {"llm": model.text, "talker": omni.config.talker_config.text_config}
    shares = {name: text.num_experts_per_tok / text.num_experts for name, text in texts.items()}
    totals: dict[str, Counter[str]] = {}
    active: Counter[str] = Counter()
    for name, parameter in named(omni, decoder):
        component, words = component_of(name), next(w for pattern, w in PARTS if re.match(pattern, name))
        totals.setdefault(component, Counter())[words] += parameter.numel()
        share = shares[component] if words == "routed experts" else 1.0
        active[component] += round(parameter.numel() * share)
    return {name: Count(name, sum(parts.values()), active[name], dict(parts)) for name, parts in totals.items()}


def named(omni: nn.Module, decoder: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of both modules by canonical name."""
    for name, parameter in omni.named_parameters():
        yield canonical(name), parameter
    for name, parameter in decoder.named_parameters():
        yield f"audio_decoder.{name}", parameter


def render_counts(model: ModelConfig) -> str:
    """A table of the components with totals, for people."""
    counts = count_parameters(model)
    lines = [f"{'component':<15}{'parameters':>16}{'active a token':>16}  includes"]
    for count in counts.values():
        lines.append(f"{count.component:<15}{count.num_parameters:>16,}{count.num_active:>16,}  {count.includes}")
    total = sum(count.num_parameters for count in counts.values() if count.component != "aut_decoder")
    lines.append(f"{'whole model':<15}{total:>16,}{'':>16}  all but aut_decoder, which serves AuT's pretraining alone")
    return "\n".join(lines)


def render_plan(config: RunConfig) -> str:
    """What a stage's run amounts to: the counts, and its steps."""
    stage, data = config.stage, config.data
    packs = data.lanes * data.packs_per_lane
    steps = -(-int(stage.total_tokens) // (packs * stage.context))
    trained = ", ".join(f"{name} at {component.lr:g}" for name, component in stage.components.items())
    return "\n".join(
        [
            render_counts(config.model),
            "",
            f"stage {stage.name}: trains {trained}",
            f"{packs} packs of {stage.context:,} tokens a step ({packs * stage.context:,} tokens)",
            f"{stage.total_tokens:,.0f} tokens: at least {steps:,} steps (packs are never quite full)",
        ]
    )
