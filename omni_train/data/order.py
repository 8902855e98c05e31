"""The order in which the lanes of a run meet the samples of one source.

    usable samples ──cut──▶ blocks of neighbours in a shard ──keyed permutation per epoch──▶ unit e·N + i (i < N)
        ──unit u belongs to lane u mod lanes──▶ windows of blocks ──keyed shuffle of their samples──▶ LaneCursor

Units are numbered through all epochs e, so each lane gets the same share of blocks over time even where an epoch has
fewer blocks than lanes, and every sample of an epoch goes to exactly one lane. All randomness is counter-based (Philox
raw bits keyed by seed, source, epoch, …): any point of the order is reached without replay.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from omni_train.data.mixture import Weight, check_weight

ORDERS_KEPT = 4
MIN_BLOCKS_PER_LANE = 4


@dataclass(slots=True)
class Source:
    """One source of the mixture, as the planner sees it.

    ``weight`` is its share of tokens (any scale; a number or a schedule of (tokens, weight)); ``lengths`` tokens of
    each sample, one array a shard; ``splittable`` bool arrays alike: True for plain text, which is cut when longer
    than the context. ``max_epochs`` ends the source after so many passes (a fraction: inside one); None repeats it for
    ever.
    """

    name: str
    weight: Weight
    lengths: list[np.ndarray]
    splittable: list[np.ndarray]
    max_epochs: float | None = None

    def __post_init__(self) -> None:
        check_weight(self.name, self.weight)
        if self.max_epochs is not None and not self.max_epochs > 0:
            raise ValueError(
                f"source {self.name!r}: max_epochs ({self.max_epochs}) must be > 0; None repeats it for ever"
            )
        if [len(lengths) for lengths in self.lengths] != [len(flags) for flags in self.splittable]:
            raise ValueError(f"source {self.name!r}: lengths and splittable must have the same shards and samples")
        for shard, lengths in enumerate(self.lengths):
            if len(lengths) and int(np.min(lengths)) < 1:
                index = int(np.argmin(lengths))
                raise ValueError(
                    f"source {self.name!r}: sample {index} of shard {shard} has {int(lengths[index])} tokens; "
                    "a sample must have at least 1: remove it and index the shard again"
                )


def is_usable(source: Source, context: int) -> list[np.ndarray]:
    """Bool arrays, one a shard: False for samples longer than ``context`` tokens that cannot be split."""
    return [
        (np.asarray(lengths) <= context) | np.asarray(flags, dtype=bool)
        for lengths, flags in zip(source.lengths, source.splittable, strict=True)
    ]


def keyed_permutation(size: int, *key: object) -> np.ndarray:
    """A permutation of range(size), int64, that is a pure function of ``key``, on any numpy version and machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    bits = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(size)
    return np.argsort(bits, kind="stable")


class SourceOrder:
    """The keyed order of one source.

    ``shard``, ``index``, ``tokens`` are arrays over its usable samples; ``num_left_out`` counts the others; ``digest``
    changes with any length of the source.
    """

    def __init__(self, source: Source, *, context: int, lanes: int, seed: int, block_size: int, window: int):
        usable = is_usable(source, context)
        self.source = source
        self.context = context
        self.shard = np.repeat(np.arange(len(usable)), [int(mask.sum()) for mask in usable])
        self.index = np.concatenate([np.flatnonzero(mask) for mask in usable] or [np.empty(0, np.int64)])
        lengths = [np.asarray(values)[mask] for values, mask in zip(source.lengths, usable, strict=True)]
        self.tokens = np.concatenate(lengths or [np.empty(0, np.int64)]).astype(np.int64)
        self.num_left_out = sum(int((~mask).sum()) for mask in usable)
        if not len(self.tokens):
            raise ValueError(
                f"source {source.name!r} has no sample that fits a context of {context:,} tokens "
                f"({self.num_left_out:,} are longer); raise the context or remove the source"
            )
        self.digest = _digest(source)
        self._lanes = lanes
        self._seed = seed
        block_size = min(block_size, max(1, len(self.tokens) // (MIN_BLOCKS_PER_LANE * lanes)))
        self._window_blocks = max(1, window // block_size)
        self._start, self._stop = _cut_blocks(self.shard, block_size)
        self.num_blocks = len(self._start)
        self._num_units = None if source.max_epochs is None else max(1, round(source.max_epochs * self.num_blocks))
        self._orders: dict[int, np.ndarray] = {}

    def is_past_end(self, epoch: int) -> bool:
        """True when max_epochs leaves nothing of ``epoch``."""
        return self._num_units is not None and epoch * self.num_blocks >= self._num_units

    def window(self, lane: int, epoch: int, number: int) -> list[tuple[int, int, int]]:
        """(shard, index, tokens) of the samples of a lane's window ``number`` in ``epoch``; [] past its share."""
        first_unit = epoch * self.num_blocks
        end = self.num_blocks if self._num_units is None else min(self.num_blocks, self._num_units - first_unit)
        first = (lane - first_unit) % self._lanes + number * self._window_blocks * self._lanes
        if first >= end:
            return []
        blocks = self._order(epoch)[first : min(end, first + self._window_blocks * self._lanes) : self._lanes]
        samples = np.concatenate([np.arange(self._start[block], self._stop[block]) for block in blocks])
        samples = samples[keyed_permutation(len(samples), self._seed, self.source.name, epoch, lane, number)]
        columns = (self.shard[samples], self.index[samples], self.tokens[samples])
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def _order(self, epoch: int) -> np.ndarray:
        """The permutation of the blocks in ``epoch``; a few are kept, as lanes pass epochs at their own pace."""
        if epoch not in self._orders:
            while len(self._orders) >= ORDERS_KEPT:
                del self._orders[next(iter(self._orders))]
            self._orders[epoch] = keyed_permutation(self.num_blocks, self._seed, self.source.name, epoch)
        return self._orders[epoch]


class LaneCursor:
    """One lane's place in a source. State: [epoch, window, samples done in it, tokens done of a long sample]."""

    def __init__(self, order: SourceOrder, lane: int):
        self._order = order
        self._lane = lane
        self._epoch = self._window = self._done = self._start = 0
        self._samples = order.window(lane, 0, 0)

    def next_document(self) -> tuple[int, int, int, int] | None:
        """(shard, index, start, stop) of the lane's next document; None when the source has reached max_epochs."""
        if self._done == len(self._samples) and not self._advance():
            return None
        shard, index, tokens = self._samples[self._done]
        start = self._start
        stop = min(start + self._order.context, tokens)
        if stop < tokens:
            self._start = stop
        else:
            self._start = 0
            self._done += 1
        return shard, index, start, stop

    def _advance(self) -> bool:
        """Moves to the lane's next window that has samples; False, without moving, when there is none."""
        epoch, window = self._epoch, self._window + 1
        while not (samples := self._order.window(self._lane, epoch, window)):
            epoch, window = epoch + 1, 0
            if self._order.is_past_end(epoch):
                return False
        self._epoch, self._window, self._done, self._samples = epoch, window, 0, samples
        return True

    def state(self) -> list[int]:
        return [self._epoch, self._window, self._done, self._start]

    def load_state(self, epoch: int, window: int, done: int, start: int) -> None:
        """Goes to a state. One past what a smaller max_epochs leaves of the window is at the end of the window."""
        self._samples = self._order.window(self._lane, epoch, window)
        if done >= len(self._samples):
            done, start = len(self._samples), 0
        self._epoch, self._window, self._done, self._start = epoch, window, done, start


def _cut_blocks(shard: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(start, stop) positions of runs of at most ``block_size`` samples that do not cross a shard."""
    edges = np.flatnonzero(np.diff(shard)) + 1
    starts, stops = np.concatenate([[0], edges]), np.concatenate([edges, [len(shard)]])
    start = np.concatenate([np.arange(low, high, block_size) for low, high in zip(starts, stops, strict=True)])
    return start, np.concatenate([start[1:], [len(shard)]])


def _digest(source: Source) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for lengths, flags in zip(source.lengths, source.splittable, strict=True):
        digest.update(len(lengths).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(lengths, dtype=np.int64).tobytes())
        digest.update(np.ascontiguousarray(flags, dtype=bool).tobytes())
    return digest.hexdigest()
