"""Named groups of parameters: each parameter belongs to exactly one; a stage trains the groups it lists, no other."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from omni_train.config import ComponentConfig, ConfigError, nearest

# First match wins. Names are those of our modules (models/thinker.py, models/encoder_decoder.py).
PATTERNS = (
    ("audio_adapter", r"(.*\.)?audio_tower\.(proj1|proj2)\."),
    ("audio_encoder", r"(.*\.)?audio_tower\."),
    ("vision_adapter", r"(.*\.)?visual\.(merger|merger_list|deepstack_merger_list)\."),
    ("vision_encoder", r"(.*\.)?visual\."),
    ("aut_decoder", r"audio_decoder\."),
    ("vision_decoder", r"vision_decoder\."),
    ("mtp", r"talker\.code_predictor\."),
    ("talker", r"talker\."),
    ("code2wav", r"code2wav\."),
    ("codec_encoder", r"codec_encoder\."),
    ("codec_decoder", r"codec_decoder\."),
    ("discriminator", r"discriminator\."),
    ("llm", r"(llm\.)?(model|lm_head)\."),
)


def component_of(name: str) -> str:
    """The group of a parameter name. Raises ConfigError for a name that no group claims."""
    for component, pattern in PATTERNS:
        if re.match(pattern, name):
            return component
    raise ConfigError(f"parameter '{name}' belongs to no component; add a pattern to omni_train/models/components.py")


@dataclass(slots=True)
class Inventory:
    """Parameters of one component: how many, how many of them train, and at what rate (0 when frozen)."""

    component: str
    num_parameters: int
    is_trained: bool
    lr: float


def freeze_all_but(modules: Iterable[nn.Module], components: dict[str, ComponentConfig]) -> list[Inventory]:
    """Set requires_grad by component over all modules and return the inventory.

    Raises ConfigError when a listed component matches no parameter of these modules.
    """
    counts: dict[str, int] = {}
    for module in modules:
        for name, parameter in module.named_parameters():
            component = component_of(name)
            parameter.requires_grad_(component in components)
            counts[component] = counts.get(component, 0) + parameter.numel()
    for name in components:
        if name not in counts:
            hint = nearest(name, counts)
            raise ConfigError(f"stage.components.{name} matches no parameter of this stage's model; {hint}")
    return [
        Inventory(name, count, name in components, components[name].lr if name in components else 0.0)
        for name, count in sorted(counts.items())
    ]


def parameter_groups(module: nn.Module, components: dict[str, ComponentConfig]) -> list[dict]:
    """Optimizer groups of the trained parameters: matrices decay, vectors (norms, biases) do not.

    ``component`` is our key: DeepSpeed renames groups that hold experts, custom keys survive.
    """
    groups: dict[tuple[str, bool], dict] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        component, decays = component_of(name), parameter.ndim > 1
        settings = components[component]
        group = groups.setdefault(
            (component, decays),
            {
                "params": [],
                "name": f"{component}_{'decay' if decays else 'no_decay'}",
                "component": component,
                "lr": settings.lr,
                "weight_decay": settings.weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]
