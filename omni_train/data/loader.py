"""From plans to packs: one ranged read a document, loaded ahead by stateless workers, in the order of the plan.

    Planner.next_step ──rank_packs──▶ this rank's PackPlans ──load_pack (PackReader, encode, collate)──▶ [Pack] in order

``StepLoader.state_dict`` is the planner's state right after the last step that was *returned*: how many steps were
prefetched, by how many workers, and how many ranks there are leaves no trace in it.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from omni_train.config import LayoutConfig
from omni_train.data.bad_samples import FIX
from omni_train.data.contracts import DocumentPlan, PackPlan, Sample
from omni_train.data.index import ShardIndex
from omni_train.data.layouts import read_content
from omni_train.data.mixture import OutOfData
from omni_train.data.planner import Planner
from omni_train.data.rows import read_members
from omni_train.data.shard import SampleError

Loaded = TypeVar("Loaded")  # a pack, or a prompt
LoadPack = Callable[[PackPlan], Loaded]


def rank_packs(step_plans: Sequence[PackPlan], rank: int, world: int) -> list[PackPlan | None]:
    """The packs of ``rank`` in (lane, slot) order: lane l belongs to rank l mod world.

    Every rank gets as many entries as the one with most lanes; None stands for a masked dummy, also in the place of a
    pack without documents. Raises ValueError when there are more ranks than lanes.
    """
    lanes = {plan.lane for plan in step_plans}
    if not 0 <= rank < world or world > len(lanes):
        raise ValueError(
            f"rank {rank} of {world} data-parallel ranks cannot share {len(lanes)} lanes; data.lanes must be at least "
            "the number of data-parallel ranks, and is fixed for a run"
        )
    packs_per_lane = len(step_plans) // len(lanes)
    num_packs = -(-len(lanes) // world) * packs_per_lane
    mine = [plan if plan.documents else None for plan in step_plans if plan.lane % world == rank]
    return mine + [None] * (num_packs - len(mine))


class PackReader:
    """Reads the samples that plans name. ``sources``: per name the (path, index) of its shards, in the planner's order;
    ``layouts``: per name what its samples look like.

    Holds names, keys and byte ranges only, so a copy for each worker is cheap.
    """

    def __init__(
        self, sources: Mapping[str, Sequence[tuple[str | Path, ShardIndex]]], layouts: Mapping[str, LayoutConfig]
    ) -> None:
        self._layouts = layouts
        self._shards = {name: [(path, *_ranges(index)) for path, index in shards] for name, shards in sources.items()}
        self._names = {name: distinct_names([path for path, _ in shards]) for name, shards in sources.items()}

    def read(self, document: DocumentPlan) -> Sample:
        """The whole sample of ``document`` (its token range is not cut out here), in one ranged read.

        Raises DataError when the bytes are not the indexed sample, SampleError when they do not follow the layout of
        the source.
        """
        path, keys, offsets, sizes = self._shards[document.source][document.shard]
        key, offset = keys[document.index], int(offsets[document.index])
        members = read_members(path, offset, int(sizes[document.index]), key)
        try:
            content = read_content(members, self._layouts[document.source])
        except ValueError as error:
            raise SampleError.at(path, offset, str(error), key=key, fix=FIX) from error
        return Sample(document.source, self._names[document.source][document.shard], key, content, members)

    def place(self, document: DocumentPlan) -> tuple[str, str, int]:
        """(shard, key, byte offset) of the sample of ``document``."""
        path, keys, offsets, _ = self._shards[document.source][document.shard]
        return str(path), keys[document.index], int(offsets[document.index])


def distinct_names(paths: Sequence[str | Path]) -> list[str]:
    """File names of ``paths``, each with as many of its folders as tell all of them apart: a shard that shares its file
    name with one that is added is called otherwise then, and so are its samples."""
    parts = [str(path).split("/") for path in paths]
    for number in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(own[-number:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    return [own[-1] for own in parts]  # the same shard twice


class StepLoader(Generic[Loaded]):
    """Packs of this rank, step by step.

    ``load_pack`` reads, encodes and collates one PackPlan; with ``num_workers`` ≥ 1 it must be picklable and runs in
    that many processes with one torch thread each, ``prefetch_steps`` steps ahead (None: as many, at least two, as give
    each process two packs); with 0 it runs inline.
    ``make_dummy`` makes the masked pack of a rank that has fewer than others. Use as a context manager, or call
    ``close``.
    """

    def __init__(
        self,
        planner: Planner,
        load_pack: LoadPack[Loaded],
        make_dummy: Callable[[], Loaded],
        rank: int,
        world: int,
        num_workers: int = 0,
        prefetch_steps: int | None = None,
    ):
        if prefetch_steps is None:
            packs_a_step = -(-planner.lanes // world) * planner.packs_per_lane
            prefetch_steps = max(2, math.ceil(2 * num_workers / packs_a_step))
        if num_workers < 0 or prefetch_steps < 1:
            raise ValueError(f"num_workers ({num_workers}) must be >= 0 and prefetch_steps ({prefetch_steps}) >= 1")
        if not 0 <= rank < world <= planner.lanes:
            raise ValueError(
                f"rank {rank} of {world} data-parallel ranks cannot share data.lanes={planner.lanes}; "
                f"use lanes >= {world} (fixed for a run)"
            )
        self.planner = planner
        self.load_pack = load_pack
        self._make_dummy = make_dummy
        self._rank = rank
        self._world = world
        self._prefetch_steps = prefetch_steps if num_workers else 1
        self._executor = _start_workers(num_workers, load_pack) if num_workers else None
        self._in_flight: deque[tuple[list[PackPlan | None], list[Future[bytes]], dict[str, Any]]] = deque()
        self._state = planner.state_dict()

    def next_step(self) -> list[Loaded]:
        """This rank's packs of the next step, in (lane, slot) order, then dummies: equally many on every rank.

        Raises OutOfData when the plan ends, and whatever ``load_pack`` raised, with its type and message; the state
        then is still that of the step before.
        """
        if self._executor is None:
            plans = rank_packs(self.planner.next_step(), self._rank, self._world)
            packs = [self.load_pack(plan) if plan else self._make_dummy() for plan in plans]
            self._state = self.planner.state_dict()
            return packs
        try:
            return self._next_prefetched()
        except BrokenProcessPool as error:
            message = "a data worker died (killed, or out of memory); lower data.num_workers or the pack size"
            raise RuntimeError(message) from error

    def state_dict(self) -> dict[str, Any]:
        """The planner's state right after the last returned step; steps in flight do not count."""
        return self._state

    def load_state_dict(self, state: dict[str, Any], policy: str = "strict") -> list[dict[str, Any]]:
        """Goes on where ``state`` was taken; returns the planner's records of accepted changes (see Planner)."""
        self._drop_in_flight()
        records = self.planner.load_state_dict(state, policy)
        self._state = self.planner.state_dict()
        return records

    def close(self) -> None:
        """Stops the workers; steps in flight are dropped."""
        self._drop_in_flight()
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> StepLoader[Loaded]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _next_prefetched(self) -> list[Loaded]:
        """The oldest step in flight, waited for, with the next ones submitted before."""
        self._fill(self._prefetch_steps)
        if not self._in_flight:
            self.planner.next_step()
        plans, futures, state = self._in_flight.popleft()
        self._fill(self._prefetch_steps)
        loaded = iter([pickle.loads(future.result()) for future in futures])
        packs = [next(loaded) if plan else self._make_dummy() for plan in plans]
        self._state = state
        return packs

    def _fill(self, num_steps: int) -> None:
        """Plans and submits steps until ``num_steps`` are in flight or the plan ends."""
        assert self._executor is not None
        while len(self._in_flight) < num_steps:
            try:
                plans = rank_packs(self.planner.next_step(), self._rank, self._world)
            except OutOfData:
                return
            futures = [self._executor.submit(_work, plan) for plan in plans if plan]
            self._in_flight.append((plans, futures, self.planner.state_dict()))

    def _drop_in_flight(self) -> None:
        for _, futures, _ in self._in_flight:
            for future in futures:
                future.cancel()
        self._in_flight.clear()


_worker_load_pack: LoadPack | None = None
"""Set once in each worker process by _init_worker, never in the main process."""


STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What torchrun, `timeout` and Slurm send to all processes of a job at once. The rank then saves, for which it needs
the step that its workers are loading: they end when it does."""


def _start_workers(num_workers: int, load_pack: LoadPack) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    resource_tracker.ensure_running()  # NOTE: starting the fork server would, and that unblocks SIGTERM
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        forkserver.ensure_running()  # it inherits what is blocked, and all its workers do
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return ProcessPoolExecutor(num_workers, mp_context=context, initializer=_init_worker, initargs=(load_pack,))


def _init_worker(load_pack: LoadPack) -> None:
    """One torch thread; Ctrl-C and STOP_SIGNALS are for the main process; a worker does not outlive it, however it
    ends."""
    global _worker_load_pack
    _worker_load_pack = load_pack
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    threading.Thread(target=_exit_for_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _exit_for_parent() -> None:
    """A pool with a dead worker terminates the others, and waits for them."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent.pid:
        pass
    os._exit(1)


def _work(plan: PackPlan) -> bytes:
    """The pickled pack.

    NOTE: plain pickle, in band: torch's own queues pass a file descriptor for each tensor and run out of them.
    """
    assert _worker_load_pack is not None
    try:
        return pickle.dumps(_worker_load_pack(plan), protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        try:  # the constructor of an error that takes more than its message raises anything there
            pickle.loads(pickle.dumps(error))
        except Exception:
            raise RuntimeError(f"{type(error).__name__}: {error}") from None
        raise


def _ranges(index: ShardIndex) -> tuple[list[str], np.ndarray, np.ndarray]:
    """(keys, offsets int64, sizes int64) of the samples of a shard."""
    offsets = np.array([sample.offset for sample in index.samples], dtype=np.int64)
    sizes = np.array([sample.size for sample in index.samples], dtype=np.int64)
    return [sample.key for sample in index.samples], offsets, sizes
