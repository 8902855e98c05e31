"""Packing of documents into sequences of at most ``context`` tokens.

(length, item) … ──BestFitPacker.add──▶ closed packs, online, a dozen open bins
[length, …]      ──first_fit──▶ bins of positions, offline, in order
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


class BestFitPacker:
    """Online best-fit packing over at most ``num_bins`` open bins of ``context`` tokens.

    A document goes to the bin that it leaves with the least room. A bin closes when it is exactly full; when more than
    ``num_bins`` are open, the fullest does, or, given a ``cost`` of a bin's items, the cheapest of those with at most
    ``slack`` tokens of room. Items are opaque; they come back in the order in which they were added.
    """

    def __init__(
        self, context: int, num_bins: int = 12, *, slack: int = 0, cost: Callable[[list[Any]], float] | None = None
    ):
        if context < 1 or num_bins < 1 or slack < 0:
            raise ValueError(f"context ({context} tokens), num_bins ({num_bins}) must be >= 1 and slack ({slack}) >= 0")
        self.context = context
        self.num_bins = num_bins
        self._slack = slack
        self._cost = cost
        self._room: list[int] = []
        self._items: list[list[Any]] = []

    def add(self, length: int, item: Any) -> list[Any] | None:
        """Places a document of ``length`` tokens; returns the items of the pack that this closes, or None."""
        if not 1 <= length <= self.context:
            raise ValueError(
                f"a document of {length} tokens does not fit a pack of {self.context}; cut or leave it out"
            )
        best, best_room = -1, self.context + 1
        for number, room in enumerate(self._room):
            if length <= room < best_room:
                best, best_room = number, room
        if best < 0:
            self._room.append(self.context)
            self._items.append([])
            best = len(self._room) - 1
        self._room[best] -= length
        self._items[best].append(item)
        if self._room[best] == 0:
            return self._close(best)
        return self.close_one() if len(self._room) > self.num_bins else None

    def close_one(self) -> list[Any] | None:
        """Closes the cheapest of the bins with at most ``slack`` room, else the fullest bin; None when none is open."""
        if not self._room:
            return None
        cost = self._cost
        if cost is None:
            return self._close(self._room.index(min(self._room)))
        limit = max(min(self._room), self._slack)
        ready = [number for number, room in enumerate(self._room) if room <= limit]
        return self._close(min(ready, key=lambda number: cost(self._items[number])))

    def _close(self, number: int) -> list[Any]:
        del self._room[number]
        return self._items.pop(number)

    @property
    def open_bins(self) -> list[tuple[int, list[Any]]]:
        """(tokens, items) of each open bin, oldest first."""
        return [(self.context - room, items) for room, items in zip(self._room, self._items, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Tokens and items of each open bin; JSON-able when the items are."""
        return {"bins": [[tokens, list(items)] for tokens, items in self.open_bins]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._room = [self.context - tokens for tokens, _ in state["bins"]]
        self._items = [list(items) for _, items in state["bins"]]
        if any(not 0 < room < self.context for room in self._room):
            raise ValueError(
                f"the state's open bins do not fit packs of {self.context} tokens: it is of another context"
            )


def first_fit(lengths: list[int], context: int) -> list[list[int]]:
    """Positions in ``lengths`` of each bin of at most ``context`` tokens: first-fit, in order, all bins open."""
    room = np.zeros(len(lengths), dtype=np.int64)
    bins: list[list[int]] = []
    for position, length in enumerate(lengths):
        if not 1 <= length <= context:
            raise ValueError(f"document {position} of {length} tokens does not fit a pack of {context}")
        fits = room[: len(bins)] >= length
        number = int(fits.argmax()) if bins else 0
        if not bins or not fits[number]:
            number = len(bins)
            bins.append([])
            room[number] = context
        bins[number].append(position)
        room[number] -= length
    return bins
