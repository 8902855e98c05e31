"""Which source the next document comes from: the one with the largest token deficit. No random numbers.

Every token drawn gives each source its weight in credit and costs the source that it came from one. A source's
credit is then its deficit in tokens, the credits sum to zero, and shares are exact to about one document. With constant
weights credit = weight × tokens drawn − tokens drawn of the source; with a schedule, the weights in force when each
token was drawn count, so a change of weights does not try to repair the past.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Weight = float | Sequence[tuple[float, float]]
"""A constant, or points (tokens, weight) of a schedule: linear between them, constant before and after them."""


class OutOfData(Exception):
    """Every source has reached its ``max_epochs`` and all documents were handed out."""


def weight_at(weight: Weight, tokens: float) -> float:
    """The weight of one source (not normalised) when ``tokens`` tokens were drawn from all sources."""
    if isinstance(weight, (int, float)):
        return float(weight)
    points = list(weight)
    if tokens <= points[0][0]:
        return float(points[0][1])
    for (left, low), (right, high) in zip(points, points[1:], strict=False):
        if tokens <= right:
            return low + (high - low) * (tokens - left) / (right - left)
    return float(points[-1][1])


def check_weight(name: str, weight: Weight) -> None:
    """Raises ValueError unless ``weight`` is a finite number >= 0, or points with rising tokens and such numbers."""
    points = [(0.0, weight)] if isinstance(weight, (int, float)) else list(weight)
    if not points:
        raise ValueError(f"source {name!r}: the weight schedule has no points; give at least one (tokens, weight)")
    if any(right[0] <= left[0] for left, right in zip(points, points[1:], strict=False)):
        raise ValueError(f"source {name!r}: the tokens of the weight schedule {points} must rise")
    if any(not math.isfinite(value) or value < 0 for _, value in points) or not any(value > 0 for _, value in points):
        raise ValueError(
            f"source {name!r}: weight {weight} must be finite, >= 0 and not always 0; remove the source instead"
        )


class WeightSchedule:
    """Weights of S sources as a function of the tokens drawn."""

    def __init__(self, weights: dict[str, Weight]):
        for name, weight in weights.items():
            check_weight(name, weight)
        self.weights = weights
        self.is_constant = all(isinstance(weight, (int, float)) for weight in weights.values())

    def weights_at(self, tokens: float) -> list[float]:
        """Weights [S] in the order of the sources, summing to 1. Raises ValueError where all are 0."""
        values = [weight_at(weight, tokens) for weight in self.weights.values()]
        total = sum(values)
        if total <= 0:
            raise ValueError(
                f"all {len(values)} source weights are 0 at {tokens:,.0f} tokens; give one a weight > 0 there"
            )
        return [value / total for value in values]


class TokenMixture:
    """The credits of S sources in one lane, in tokens: ``drawn`` int [S], ``credit`` float [S], ``active`` bool [S].

    ``overall_credit`` [S] is one list for all lanes and is updated in place: the sum of their credits. Drawing from the
    largest sum of both keeps the shares of a lane exact to about a document, and those of all lanes together as well.
    """

    def __init__(self, num_sources: int, overall_credit: list[float]):
        self.drawn = [0] * num_sources
        self.credit = [0.0] * num_sources
        self.active = [True] * num_sources
        self._overall_credit = overall_credit
        self._weights = [0.0] * num_sources
        self._target = [0.0] * num_sources

    def set_weights(self, weights: Sequence[float]) -> None:
        """Weights [S] from now on; shared out again over the active sources."""
        self._weights = list(weights)
        kept = [weight if active else 0.0 for weight, active in zip(weights, self.active, strict=True)]
        total = sum(kept)
        self._target = [weight / total if total > 0 else 0.0 for weight in kept]

    def choose(self) -> int:
        """Number of the source with the most credit (the first of equals) among those with a weight; -1: none."""
        best, best_credit = -1, -math.inf
        for number, (credit, overall) in enumerate(zip(self.credit, self._overall_credit, strict=True)):
            if credit + overall > best_credit and self._target[number] > 0:
                best, best_credit = number, credit + overall
        return best

    def charge(self, number: int, tokens: int) -> None:
        """Books ``tokens`` tokens drawn from source ``number``."""
        self.drawn[number] += tokens
        for other, share in enumerate(self._target):
            self.credit[other] += share * tokens
            self._overall_credit[other] += share * tokens
        self.credit[number] -= tokens
        self._overall_credit[number] -= tokens

    def retire(self, number: int) -> None:
        """Takes an exhausted source out of this lane; its weight is shared out over the others."""
        self.active[number] = False
        self.set_weights(self._weights)


class PackedShares:
    """Tokens of each source in the packs handed out (``packed`` [S]), held to the shares of the tokens drawn.

    A dozen open bins of 8,192 tokens hold a tenth of a million tokens a lane, so exact shares of the tokens drawn still
    leave those of the packs off by up to a point in the first millions of tokens. Which bin closes first settles it.
    """

    def __init__(self, num_sources: int):
        self.packed = [0] * num_sources
        self._shares = [0.0] * num_sources

    def set_shares(self, amounts: Sequence[float]) -> None:
        """Shares [S] to hold from now on, any scale."""
        total = sum(amounts)
        self._shares = [amount / total for amount in amounts]

    def imbalance(self, tokens: Sequence[int]) -> float:
        """Sum over sources of (tokens off the share)² if a pack of ``tokens`` [S] were handed out."""
        after = [packed + more for packed, more in zip(self.packed, tokens, strict=True)]
        total = sum(after)
        return sum((amount - share * total) ** 2 for amount, share in zip(after, self._shares, strict=True))

    def book(self, tokens: Sequence[int]) -> None:
        """Books a pack of ``tokens`` [S] as handed out."""
        for number, more in enumerate(tokens):
            self.packed[number] += more
