"""What the loop knows of a stage, and what a stage is put together from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from omni_train.config import RunConfig
from omni_train.data.contracts import Pack
from omni_train.data.loader import StepLoader
from omni_train.engine.parallel import Ranks
from omni_train.models.components import Inventory
from omni_train.objectives.terms import Losses


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
    ``before_export`` when the last checkpoint is saved. ``references`` are frozen models that the objective asks (a
    teacher), no part of what the stage exports.
    """

    engines: dict[str, Any]
    frozen: dict[str, nn.Module]
    forward: Callable[[Pack], dict[str, Tensor]]
    losses: Callable[[Pack, Tensor | None], Losses]
    counts: Callable[[Pack], dict[str, int]]
    inventory: list[Inventory]
    references: dict[str, nn.Module] = field(default_factory=dict)
    router_shape: tuple[int, int] | None = None  # layers, experts
    before_export: Callable[[], None] = nothing
    batches: Callable[[StepLoader], BatchSource] = lambda packs: packs
    stateful: dict[str, Stateful] = field(default_factory=dict)
    after_step: Callable[[], None] = nothing

    def modules(self) -> dict[str, nn.Module]:
        """The modules of all engines by name."""
        return {name: engine.module for name, engine in self.engines.items()} | self.frozen


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a stage is put together from: its engines and frozen models, as DeepSpeed made them."""

    config: RunConfig
    tokenizer: PreTrainedTokenizerBase
    ranks: Ranks
    engines: dict[str, Any]
    frozen: dict[str, nn.Module]
    references: dict[str, nn.Module]
    inventory: list[Inventory]

    def stage(self, **others: Any) -> Stage:
        """A stage of these parts with what its objective adds."""
        return Stage(
            engines=self.engines,
            frozen=self.frozen,
            references=self.references,
            inventory=self.inventory,
            **others,
        )
