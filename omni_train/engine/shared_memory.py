"""Collectives between ranks of one machine through shared memory, for CPU runs.

A gloo collective costs about 1.3 ms whatever its size, in wake-ups of its threads; a step of expert parallelism has
some thirty. Here the rank's own thread writes, waits and reads. Every collective is one exchange:

    each rank writes its bytes into a slot of its own, then raises its counter   ─┐
    waits until the counter of every rank is there                               ─┴→ reads the slots of the others

Slots alternate: who raises a counter to n has read what was written for n - 1, so what is written for n + 1 overwrites
nothing that is still to be read. Sums are taken in the order of ranks, so they are equal to the bit on all of them.
"""

from __future__ import annotations

import datetime
import itertools
import mmap
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store, Work, _create_work_from_future  # type: ignore[attr-defined]
from torch.futures import Future

NAME = "shared_memory"
SLOT_BYTES = 1 << 20  # what one rank can say at once; more goes in rounds
LINE_BYTES = 64  # counters of two ranks never share a cache line
SPIN_SEC = 1e-3  # then the processor is left to others between looks
LONGEST_NAP_SEC = 1e-3

Take = Callable[[int, int, Tensor], None]
"""Given (rank, first byte of the part, bytes [n]) of what a rank says to this one, in order of ranks in each round."""


def is_usable(world: int) -> bool:
    """Whether all ranks are on this machine, and its processor shows stores to others in their order."""
    is_local = int(os.environ.get("LOCAL_WORLD_SIZE", world)) == world
    return is_local and sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64")


def register() -> None:
    """Make the backend known to torch.distributed under its name."""
    if NAME.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(NAME, SharedMemoryGroup, devices=["cpu"])


class SharedMemoryGroup(dist.ProcessGroup):
    """A process group of torch.distributed; ``store`` is its own part of the rendezvous store."""

    def __init__(self, store: Store, rank: int, size: int, timeout: datetime.timedelta) -> None:
        super().__init__(rank, size)
        self._rank, self._size, self._timeout = rank, size, timeout.total_seconds()
        self._number = 0
        if size == 1:
            return
        header_bytes = 8 * (1 + size)
        data = size * (LINE_BYTES + 2 * header_bytes)
        data += -data % mmap.PAGESIZE
        memory = _open(store, rank, size, data + 2 * size * SLOT_BYTES)
        words = memoryview(memory).cast("q")
        self._counters = words[: size * LINE_BYTES // 8 : LINE_BYTES // 8]
        first = size * LINE_BYTES // 8
        self._headers = [
            [words[first + (turn * size + peer) * (1 + size) :][: 1 + size] for peer in range(size)] for turn in (0, 1)
        ]
        slots = torch.frombuffer(memory, dtype=torch.uint8, offset=data)
        self._slots = slots.view(2, size, SLOT_BYTES).unbind()

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank

    def getBackendName(self) -> str:
        return NAME

    @property
    def group_name(self) -> str:
        return dist.distributed_c10d._world.pg_names[self]

    def _exchange(self, payload: Tensor, splits: list[int] | None, take: Take, is_own_shared: bool = False) -> None:
        """Say ``payload`` (bytes) to all ranks, or its consecutive ``splits`` to one each, and take what they say.

        What a rank says to itself alone is read where it lies, unless ``is_own_shared``: then it is safe to write to
        the payload's memory while the ranks' parts are taken.
        """
        if self._size == 1:
            take(0, 0, payload)
            return
        own_start, own_stop = (0, 0) if splits is None or is_own_shared else own_part(splits, self._rank)
        for begin in itertools.count(0, SLOT_BYTES):
            turn = self._number % 2
            self._number += 1
            end, header = begin + SLOT_BYTES, self._headers[turn][self._rank]
            for low, high in ((begin, min(end, own_start)), (max(begin, own_stop), min(end, len(payload)))):
                if low < high:
                    self._slots[turn][self._rank, low - begin : high - begin].copy_(payload[low:high])
            header[0] = len(payload)
            for peer, length in enumerate(splits or ()):
                header[1 + peer] = length
            self._counters[self._rank] = self._number
            self._wait()
            longest = 0
            for peer, (total, *parts) in enumerate(self._headers[turn]):
                longest = max(longest, total)
                start, stop = (0, total) if splits is None else own_part(parts, self._rank)
                low, high = max(start, begin), min(stop, end)
                if low < high:
                    is_own = peer == self._rank and not is_own_shared
                    said = payload[low:high] if is_own else self._slots[turn][peer, low - begin : high - begin]
                    take(peer, low - start, said)
            if end >= longest:
                return

    def _wait(self) -> None:
        """Until every rank has raised its counter to ours. Raises RuntimeError when the group's timeout is over."""
        number, counters, started = self._number, self._counters, time.monotonic()
        for peer in range(self._size):
            while counters[peer] < number:
                waited = time.monotonic() - started
                if waited > SPIN_SEC:
                    time.sleep(min(waited / 20, LONGEST_NAP_SEC))
                if waited > self._timeout:
                    raise RuntimeError(
                        f"rank {self._rank} waited {waited:.0f} s for rank {peer} of its group: it has ended, hangs, "
                        "or takes another path through the program"
                    )

    def _collect(self, payload: Tensor, splits: list[int] | None, outputs: dict[int, Tensor]) -> None:
        """What each rank says, into its output. Raises RuntimeError where it says more than fits."""
        flat = {peer: contiguous(output) for peer, output in outputs.items()}

        def take(peer: int, start: int, values: Tensor) -> None:
            target = flat[peer].view(-1)
            typed, first = values.view(target.dtype), start // target.element_size()
            if first + len(typed) > len(target):
                raise RuntimeError(
                    f"rank {peer} sends more than the {len(target)} values that rank {self._rank} expects"
                )
            target[first : first + len(typed)].copy_(typed)

        self._exchange(payload, splits, take)
        for peer, output in outputs.items():
            if flat[peer].data_ptr() != output.data_ptr():
                output.copy_(flat[peer])

    def _reduce(self, out: Tensor, payload: Tensor, splits: list[int] | None, op: dist.ReduceOp.RedOpType) -> None:
        """``out`` = the ranks' values combined; it may be the memory of ``payload``."""
        flat = contiguous(out)
        target, is_average = flat.view(-1), op == dist.ReduceOp.AVG
        combine = torch.add if is_average else COMBINE[op]
        first, first_begin = target, 0

        def take(peer: int, start: int, values: Tensor) -> None:
            nonlocal first, first_begin
            typed, begin = values.view(out.dtype), start // out.element_size()
            part = target[begin : begin + len(typed)]
            if len(typed) != len(part) or (peer == 1 and (len(typed), begin) != (len(first), first_begin)):
                raise RuntimeError(f"rank {peer} reduces more or fewer values than another rank: shapes must be alike")
            if self._size == 1:
                part.copy_(typed)
            elif peer == 0:
                first, first_begin = typed, begin
            else:
                combine(first if peer == 1 else part, typed, out=part)

        # The first write to ``out`` reads the parts of ranks 0 and 1; theirs may lie in it.
        self._exchange(payload, splits, take, is_own_shared=self._rank > 1)
        if is_average:
            flat.div_(self._size)
        if flat.data_ptr() != out.data_ptr():
            out.copy_(flat)

    def allreduce(self, tensors: list[Tensor], opts: dist.AllreduceOptions | None = None) -> Work:
        op = opts.reduceOp.op if opts else dist.ReduceOp.SUM
        for tensor in tensors:
            self._reduce(tensor, as_bytes(tensor), None, op)
        return done(tensors)

    allreduce_coalesced = allreduce

    def reduce(self, tensors: list[Tensor], opts: dist.ReduceOptions) -> Work:
        for tensor in tensors:
            payload = as_bytes(tensor)
            lengths = [len(payload) if peer == opts.rootRank else 0 for peer in range(self._size)]
            if self._rank == opts.rootRank:
                self._reduce(tensor, payload, lengths, opts.reduceOp.op)
            else:
                self._exchange(payload, lengths, lambda *_: None)
        return done(tensors)

    def reduce_scatter_single(
        self, output: Tensor, input: Tensor, opts: dist.ReduceScatterOptions | None = None
    ) -> Work:
        payload = as_bytes(input)
        op = opts.reduceOp.op if opts else dist.ReduceOp.SUM
        self._reduce(output, payload, [len(payload) // self._size] * self._size, op)
        return done(output)

    def reduce_scatter(
        self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: dist.ReduceScatterOptions | None = None
    ) -> Work:
        op = opts.reduceOp.op if opts else dist.ReduceOp.SUM
        for output, parts in zip(outputs, inputs, strict=True):
            flat = [as_bytes(part) for part in parts]
            self._reduce(output, torch.cat(flat), [len(part) for part in flat], op)
        return done(outputs)

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: dist.ReduceScatterOptions | None = None
    ) -> Work:
        for output, input in zip(outputs, inputs, strict=True):
            self.reduce_scatter_single(output, input, opts)
        return done(outputs)

    def all_gather_single(self, output: Tensor, input: Tensor, opts: dist.AllgatherOptions | None = None) -> Work:
        return self.allgather([list(output.view(self._size, *input.shape).unbind())], [input])

    def all_gather_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: dist.AllgatherOptions | None = None
    ) -> Work:
        for output, input in zip(outputs, inputs, strict=True):
            self.all_gather_single(output, input)
        return done(outputs)

    def allgather(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: dist.AllgatherOptions | None = None
    ) -> Work:
        for parts, input in zip(outputs, inputs, strict=True):
            self._collect(as_bytes(input), None, dict(enumerate(parts)))
        return done(outputs)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: dist.GatherOptions) -> Work:
        payload = as_bytes(inputs[0])
        lengths = [len(payload) if peer == opts.rootRank else 0 for peer in range(self._size)]
        self._collect(payload, lengths, dict(enumerate(outputs[0])) if outputs else {})
        return done(outputs)

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: dist.ScatterOptions) -> Work:
        flat = [as_bytes(part) for part in inputs[0]] if inputs else []
        lengths = [len(part) for part in flat] or [0] * self._size
        self._collect(torch.cat(flat) if flat else NO_BYTES, lengths, {opts.rootRank: outputs[0]})
        return done(outputs)

    def broadcast(self, tensors: list[Tensor], opts: dist.BroadcastOptions) -> Work:
        is_root = self._rank == opts.rootRank
        for tensor in tensors:
            self._collect(as_bytes(tensor) if is_root else NO_BYTES, None, {opts.rootRank: tensor})
        return done(tensors)

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_splits: list[int],
        input_splits: list[int],
        opts: dist.AllToAllOptions | None = None,
    ) -> Work:
        """Splits in rows of dimension 0; empty lists are equal parts."""
        outputs = output.split(output_splits or len(output) // self._size or 1)
        row_bytes = input.element_size() * input[:1].numel() if len(input) else 0
        lengths = [rows * row_bytes for rows in input_splits or [len(input) // self._size] * self._size]
        self._collect(as_bytes(input), lengths, dict(enumerate(outputs)))
        return done(output)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: dist.AllToAllOptions | None = None) -> Work:
        flat = [as_bytes(part) for part in inputs]
        self._collect(torch.cat(flat), [len(part) for part in flat], dict(enumerate(outputs)))
        return done(outputs)

    def barrier(self, opts: dist.BarrierOptions | None = None) -> Work:
        self._exchange(NO_BYTES, None, lambda *_: None)
        return done([])


NO_BYTES = torch.empty(0, dtype=torch.uint8)
COMBINE = {
    dist.ReduceOp.SUM: torch.add,
    dist.ReduceOp.MAX: torch.maximum,
    dist.ReduceOp.MIN: torch.minimum,
    dist.ReduceOp.PRODUCT: torch.mul,
}


def own_part(lengths: list[int], rank: int) -> tuple[int, int]:
    """(first, behind the last) of the part of ``rank`` among consecutive parts of these lengths."""
    start = sum(lengths[:rank])
    return start, start + lengths[rank]


def contiguous(tensor: Tensor) -> Tensor:
    """The tensor itself where its values lie in a row, else room for as many."""
    tensor = tensor.detach()
    return tensor if tensor.is_contiguous() else torch.empty(tensor.shape, dtype=tensor.dtype)


def as_bytes(tensor: Tensor) -> Tensor:
    """The values as uint8 [n], without a copy where they are contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def done(result: object) -> Work:
    """The handle of a collective that is over when it returns."""
    future: Future = Future()
    future.set_result(result)
    return _create_work_from_future(future)


def _open(store: Store, rank: int, size: int, num_bytes: int) -> mmap.mmap:
    """The group's memory, zero at first. Its file is unlinked when all ranks hold it, so that no kill leaves it."""
    if rank == 0:
        folder = Path("/dev/shm")
        handle, path = tempfile.mkstemp(prefix="omni-train-", dir=folder if folder.is_dir() else None)
        os.truncate(handle, num_bytes)
        store.set("file", path)
    else:
        path = store.get("file").decode()
        handle = os.open(path, os.O_RDWR)
    memory = mmap.mmap(handle, num_bytes)
    os.close(handle)
    if store.add("opened", 1) == size:
        os.unlink(path)
    return memory
