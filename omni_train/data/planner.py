"""The planner: which documents make up which pack. Metadata only; a pure function of its arguments and its state.

    Source lengths ──SourceOrder──▶ keyed order of blocks, dealt to lanes, shuffled in windows
        ──TokenMixture (one a lane)──▶ next document ──BestFitPacker (one a lane)──▶ PackPlan

Lanes are fixed for a run and do not hang on the number of ranks or workers: every rank runs the whole planner and
loads only the packs of its own lanes. The state is cursors, tokens and the ids of documents in open bins: O(lanes),
JSON-able.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np

from omni_train.data.contracts import DocumentPlan, PackPlan
from omni_train.data.mixture import OutOfData, PackedShares, TokenMixture, WeightSchedule
from omni_train.data.order import LaneCursor, Source, SourceOrder, is_usable
from omni_train.data.packing import BestFitPacker, first_fit

__all__ = ["POLICIES", "OutOfData", "Planner", "Source", "exhausted", "plan_once"]

STATE_VERSION = 1
SLACK_PART = 200
"""Bins with at most context / 200 tokens of room count as full when the shares choose which one closes."""

POLICIES = ("strict", "reweight", "add", "add_remove")
"""What may change between a state and the planner that loads it, each allowing what those before it do: nothing;
weights and max_epochs; new sources; sources gone."""

Item = tuple[int, int, int, int, int]
"""A document in a bin: (number of source, shard, index, start, stop)."""


class _Lane:
    """One lane: a cursor into every source, its mixture and its open bins."""

    def __init__(
        self,
        number: int,
        orders: list[SourceOrder],
        overall_credit: list[float],
        packed_shares: PackedShares,
        *,
        context: int,
        num_bins: int,
    ):
        def imbalance(items: list[Item]) -> float:
            return packed_shares.imbalance(_tokens_by_source(items, len(orders)))

        self.number = number
        self.cursors = [LaneCursor(order, number) for order in orders]
        self.mixture = TokenMixture(len(orders), overall_credit)
        self.packer = BestFitPacker(context, num_bins, slack=context // SLACK_PART, cost=imbalance)
        self.num_documents = [0] * len(orders)

    def next_pack(self) -> list[Item]:
        """The items of the lane's next pack; what is left in open bins once every source is exhausted; then []."""
        mixture = self.mixture
        while (source := mixture.choose()) >= 0:
            document = self.cursors[source].next_document()
            if document is None:
                mixture.retire(source)
                continue
            tokens = document[3] - document[2]
            mixture.charge(source, tokens)
            self.num_documents[source] += 1
            items = self.packer.add(tokens, (source, *document))
            if items is not None:
                return items
        return self.packer.close_one() or []


class Planner:
    """Plans the packs of a run, step by step.

    ``context`` tokens a pack; ``lanes`` fixed for the run, at least the number of data-parallel ranks;
    ``packs_per_lane`` a step; ``block_size`` neighbouring samples of a shard stay together up to the shuffle of
    ``window`` samples inside a lane; ``num_bins`` open packs a lane.
    """

    def __init__(
        self,
        sources: list[Source],
        *,
        context: int,
        lanes: int,
        packs_per_lane: int,
        seed: int,
        block_size: int = 64,
        window: int = 1024,
        num_bins: int = 12,
    ):
        sizes = {"lanes": lanes, "packs_per_lane": packs_per_lane, "block_size": block_size, "window": window}
        for name, value in (sizes | {"context": context, "num_bins": num_bins}).items():
            if value < 1:
                raise ValueError(f"planner: {name} ({value}) must be at least 1")
        names = [source.name for source in sources]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"planner: sources must be at least one and have different names, not {names}")
        self._shape = {"context": context, "seed": seed, "num_bins": num_bins} | sizes
        self.sources = sources
        self.context = context
        self.lanes = lanes
        self.packs_per_lane = packs_per_lane
        self.num_bins = num_bins
        self.step = 0
        self._orders = [
            SourceOrder(source, context=context, lanes=lanes, seed=seed, block_size=block_size, window=window)
            for source in sources
        ]
        self._schedule = WeightSchedule({source.name: source.weight for source in sources})
        self._overall_credit = [0.0] * len(sources)
        self._packed = PackedShares(len(sources))
        self._lanes = [self._new_lane(number) for number in range(lanes)]
        self._num_packs = 0

    def next_step(self) -> list[PackPlan]:
        """The lanes × packs_per_lane packs of the next step, ordered by (lane, slot).

        Once every source has reached max_epochs a lane hands out its open bins and then packs without documents; raises
        OutOfData when no lane has anything left. Weights are those at the first token of the step.
        """
        drawn = self._drawn()
        weights = self._schedule.weights_at(sum(drawn))
        self._packed.set_shares(drawn if any(drawn) else weights)
        names = [source.name for source in self.sources]
        plans = []
        for lane in self._lanes:
            lane.mixture.set_weights(weights)
            for slot in range(self.packs_per_lane):
                items = lane.next_pack()
                self._packed.book(_tokens_by_source(items, len(names)))
                documents = [DocumentPlan(names[source], *document) for source, *document in items]
                plans.append(PackPlan(self.step, lane.number, slot, documents))
        filled = [plan for plan in plans if plan.documents]
        if not filled:
            raise OutOfData(f"all sources have reached max_epochs after {self.step:,} steps")
        self._num_packs += len(filled)
        self.step += 1
        return plans

    def stats(self) -> dict[str, Any]:
        """Steps, packs, packed tokens and fill (packed tokens / room of packs) so far; and per source.

        Per source: ``tokens`` in packs handed out and their ``share``; ``tokens_drawn`` and ``documents`` drawn (those
        in open bins included); ``epochs`` (tokens drawn / tokens of a pass); ``left_out`` samples.
        """
        drawn, packed = self._drawn(), self._packed.packed
        documents = np.sum([lane.num_documents for lane in self._lanes], axis=0).tolist()
        per_source = {
            order.source.name: {
                "tokens": packed[number],
                "share": packed[number] / max(1, sum(packed)),
                "tokens_drawn": drawn[number],
                "documents": documents[number],
                "epochs": drawn[number] / int(order.tokens.sum()),
                "left_out": order.num_left_out,
            }
            for number, order in enumerate(self._orders)
        }
        fill = sum(packed) / (self._num_packs * self.context) if self._num_packs else 0.0
        totals = {"steps": self.step, "packs": self._num_packs, "tokens": sum(packed), "fill": fill}
        return totals | {"sources": per_source}

    def state_dict(self) -> dict[str, Any]:
        """All that ``load_state_dict`` needs, JSON-able: whatever the number of ranks, workers or prefetched steps."""
        return {
            "version": STATE_VERSION,
            "shape": dict(self._shape),
            "step": self.step,
            "num_packs": self._num_packs,
            "packed": list(self._packed.packed),
            "sources": [_describe(order) for order in self._orders],
            "overall_credit": list(self._overall_credit),
            "lanes": [_lane_state(lane) for lane in self._lanes],
        }

    def load_state_dict(self, state: dict[str, Any], policy: str = "strict") -> list[dict[str, Any]]:
        """Goes on where ``state`` was taken; returns a record of each change that ``policy`` allowed (mixture.jsonl).

        Raises ValueError when the state is of another shape (context, lanes, seed, …), when a source of the same name
        has other samples, or when the sources differ in what ``policy`` (see POLICIES) does not allow. Documents of a
        removed source are taken out of the open bins.
        """
        self._check_shape(state)
        saved = {source["name"]: source for source in state["sources"]}
        records = _compare_sources(saved, {order.source.name: _describe(order) for order in self._orders}, policy)
        place = {source.name: number for number, source in enumerate(self.sources)}
        numbers = [place.get(name, -1) for name in saved]
        is_reopened = {place[record["source"]] for record in records if record.get("field") == "max_epochs"}
        lanes = [self._new_lane(number) for number in range(self.lanes)]
        for lane, lane_state in zip(lanes, state["lanes"], strict=True):
            _load_lane(lane, lane_state, numbers, is_reopened)
        self._lanes = lanes
        self._overall_credit[:] = _by_number(state["overall_credit"], numbers, [0.0] * len(self.sources))
        self._packed.packed[:] = _by_number(state["packed"], numbers, [0] * len(self.sources))
        self.step = state["step"]
        self._num_packs = state["num_packs"]
        tokens = sum(sum(lane["drawn"]) for lane in state["lanes"])
        return [record | {"step": self.step, "tokens": tokens} for record in records]

    def _drawn(self) -> list[int]:
        """Tokens drawn from each source, by all lanes."""
        return [sum(amounts) for amounts in zip(*(lane.mixture.drawn for lane in self._lanes), strict=True)]

    def _new_lane(self, number: int) -> _Lane:
        shared = (self._orders, self._overall_credit, self._packed)
        return _Lane(number, *shared, context=self.context, num_bins=self.num_bins)

    def _check_shape(self, state: dict[str, Any]) -> None:
        if state.get("version") != STATE_VERSION:
            raise ValueError(
                f"planner state of version {state.get('version')}; this code reads version {STATE_VERSION}"
            )
        for name, value in self._shape.items():
            if state["shape"].get(name) != value:
                saved = state["shape"].get(name)
                raise ValueError(
                    f"data.{name} is {value:,} but the run was started with {saved:,}; it is fixed for a run: "
                    f"set it back to {saved:,}, or start a new run from the weights"
                )


def plan_once(source: Source, context: int) -> list[list[DocumentPlan]]:
    """The packs of one ordered pass over ``source``: no shuffle, first-fit, without samples too long to be used.

    Raises ValueError when that leaves none.
    """
    documents = []
    for shard, usable in enumerate(is_usable(source, context)):
        for index in np.flatnonzero(usable).tolist():
            tokens = int(source.lengths[shard][index])
            for start in range(0, tokens, context):
                documents.append(DocumentPlan(source.name, shard, index, start, min(start + context, tokens)))
    if not documents:
        raise ValueError(
            f"held-out source {source.name!r} has no sample that fits stage.context ({context:,} tokens); raise it, or "
            "remove the source"
        )
    bins = first_fit([document.num_tokens for document in documents], context)
    return [[documents[position] for position in positions] for positions in bins]


def exhausted(state: dict[str, Any]) -> list[str]:
    """Names of the sources that no lane of a planner's state draws from any more: they have reached max_epochs."""
    is_active = [any(flags) for flags in zip(*(lane["active"] for lane in state["lanes"]), strict=True)]
    return [source["name"] for source, active in zip(state["sources"], is_active, strict=True) if not active]


def _describe(order: SourceOrder) -> dict[str, Any]:
    source = order.source
    weight = source.weight if isinstance(source.weight, (int, float)) else [list(point) for point in source.weight]
    return {"name": source.name, "weight": weight, "max_epochs": source.max_epochs, "digest": order.digest}


def _compare_sources(
    saved: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]], policy: str
) -> list[dict[str, Any]]:
    """Records of the differences between the sources of a state and of the planner; ValueError for one not allowed."""
    if policy not in POLICIES:
        raise ValueError(f"data.resume_policy {policy!r} is unknown; choose one of {', '.join(POLICIES)}")
    records = []
    for name in [name for name in saved if name in now]:
        if saved[name]["digest"] != now[name]["digest"]:
            raise ValueError(
                f"source {name!r} has other samples than when the state was saved; put its shards back, or give the "
                "changed source a new name and resume with data.resume_policy=add_remove"
            )
        for field in ("weight", "max_epochs"):
            before, after = saved[name][field], now[name][field]
            if before != after:
                records.append({"event": "reweight", "source": name, "field": field, "from": before, "to": after})
    records += [{"event": "add", "source": name, "weight": now[name]["weight"]} for name in now if name not in saved]
    records += [
        {"event": "remove", "source": name, "weight": saved[name]["weight"]} for name in saved if name not in now
    ]
    needed = {"reweight": 1, "add": 2, "remove": 3}
    for record in records:
        if needed[record["event"]] > POLICIES.index(policy):
            change = {"reweight": "has another weight or max_epochs", "add": "is new", "remove": "is gone"}
            raise ValueError(
                f"source {record['source']!r} {change[record['event']]} against the saved state, which "
                f"data.resume_policy={policy} does not allow; undo the change, or set "
                f"data.resume_policy={POLICIES[needed[record['event']]]}"
            )
    return records


def _lane_state(lane: _Lane) -> dict[str, Any]:
    """Cursors, tokens, credits and open bins (five numbers a document, flat) of a lane, by number of source."""
    return {
        "cursors": [cursor.state() for cursor in lane.cursors],
        "drawn": list(lane.mixture.drawn),
        "credit": list(lane.mixture.credit),
        "active": list(lane.mixture.active),
        "documents": list(lane.num_documents),
        "bins": [list(chain.from_iterable(items)) for _, items in lane.packer.open_bins],
    }


def _load_lane(lane: _Lane, state: dict[str, Any], numbers: list[int], is_reopened: set[int]) -> None:
    """Puts a new lane where ``state`` was taken.

    ``numbers``: today's number of each source of the state, -1 for one removed. ``is_reopened``: numbers of sources
    with another max_epochs; exhausted then, they may not be now.
    """
    for number, cursor in zip(numbers, state["cursors"], strict=True):
        if number >= 0:
            lane.cursors[number].load_state(*cursor)
    mixture = lane.mixture
    mixture.drawn = _by_number(state["drawn"], numbers, mixture.drawn)
    mixture.credit = _by_number(state["credit"], numbers, mixture.credit)
    mixture.active = _by_number(state["active"], numbers, mixture.active)
    for number in is_reopened:
        mixture.active[number] = True
    lane.num_documents = _by_number(state["documents"], numbers, lane.num_documents)
    bins = []
    for flat in state["bins"]:
        rows = [flat[at : at + 5] for at in range(0, len(flat), 5)]
        items = [(numbers[row[0]], *row[1:]) for row in rows if numbers[row[0]] >= 0]
        if items:
            bins.append([sum(item[4] - item[3] for item in items), items])
    lane.packer.load_state_dict({"bins": bins})


def _by_number(values: list[Any], numbers: list[int], initial: list[Any]) -> list[Any]:
    """``initial`` with each saved value at today's number of its source; removed ones (-1) are dropped."""
    result = list(initial)
    for value, number in zip(values, numbers, strict=True):
        if number >= 0:
            result[number] = value
    return result


def _tokens_by_source(items: list[Item], num_sources: int) -> list[int]:
    tokens = [0] * num_sources
    for source, _, _, start, stop in items:
        tokens[source] += stop - start
    return tokens
