"""What an objective returns for a pack: sums, which the loop divides by counts over all ranks and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(slots=True)
class LossTerm:
    """One summand of a trained engine's loss: ``weight`` × ``sum`` / (global count ``per``).

    ``name`` is its own in the objective and stands in the logs as ``loss/<name>``; the first is the ``loss``.
    """

    engine: str
    name: str
    sum: Tensor
    per: str
    weight: float = 1.0


@dataclass(slots=True)
class Losses:
    """An objective on one pack. Every pack of a stage has the same terms and reports, in the same order.

    ``reported``: further metrics by their name in the logs, each a float64 [2] of sum and count, logged as their ratio
    over all ranks where something was counted. ``router_counts`` [L, E]: tokens that went to each expert; None without.
    """

    terms: list[LossTerm]
    reported: dict[str, Tensor] = field(default_factory=dict)
    router_counts: Tensor | None = None
