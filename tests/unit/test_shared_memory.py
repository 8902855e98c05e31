"""Every collective of the shared-memory backend against what its definition gives, on more bytes than a slot holds."""

from __future__ import annotations

import datetime
import functools
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from support import run_ranks

from omni_train.engine import shared_memory
from omni_train.engine.parallel import Ranks

LARGE = shared_memory.SLOT_BYTES // 4 + 1000  # float32 values: a slot and a bit
pytestmark = pytest.mark.skipif(not shared_memory.is_usable(1), reason="this machine's ranks use gloo")


def values(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(rank)).mul(100).to(dtype)


Check = Callable[[str, torch.Tensor, torch.Tensor], None]
"""Given the name of a collective, what it gave, what its definition gives."""


def everything(ranks: Ranks) -> list[str]:
    """Names of the collectives that gave something else than their definition; called on every rank."""
    assert dist.get_backend() == shared_memory.NAME
    wrong: list[str] = []

    def check(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
        if not torch.equal(found, expected):
            wrong.append(name)

    for part in (of_every_type_and_size, reductions, not_contiguous, parts_to_each, groups):
        part(ranks.rank, ranks.world, check)
    said: list = [None] * ranks.world
    dist.all_gather_object(said, {"rank": ranks.rank, "text": "ü" * (ranks.rank * 1_000_000)})
    if [(found["rank"], len(found["text"])) for found in said] != [(n, n * 1_000_000) for n in range(ranks.world)]:
        wrong.append("objects")
    dist.barrier()
    return wrong


def of_every_type_and_size(rank: int, world: int, check: Check) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int64):
        for size in (0, 1, 7, LARGE):
            of = [values(peer, size, dtype=dtype) for peer in range(world)]
            name = f"{dtype} of {size}"
            total, largest = of[0].clone(), of[0].clone()
            for other in of[1:]:
                total, largest = total + other, torch.maximum(largest, other)
            mine = of[rank].clone()
            dist.all_reduce(mine)
            check(f"sum of {name}", mine, total)
            mine = of[rank].clone()
            dist.all_reduce(mine, op=dist.ReduceOp.MAX)
            check(f"maximum of {name}", mine, largest)
            gathered = torch.empty(world * size, dtype=dtype)
            dist.all_gather_into_tensor(gathered, of[rank])
            check(f"gather of {name}", gathered, torch.cat(of))
            parts = [torch.empty(size, dtype=dtype) for _ in range(world)]
            dist.all_gather(parts, of[rank])
            check(f"list of {name}", torch.cat(parts), torch.cat(of))
            copied = of[rank].clone()
            dist.broadcast(copied, src=world - 1)
            check(f"broadcast of {name}", copied, of[-1])


def reductions(rank: int, world: int, check: Check) -> None:
    of = [values(peer, world, LARGE) for peer in range(world)]
    mine = torch.empty(LARGE)
    dist.reduce_scatter_tensor(mine, of[rank].flatten())
    total = of[0].clone()
    for other in of[1:]:
        total += other
    check("reduce-scatter", mine, total[rank])
    dist.reduce_scatter(mine, list(of[rank]))
    check("reduce-scatter of a list", mine, total[rank])
    reduced = values(rank, 4)
    dist.reduce(reduced, dst=0)
    check("reduce", reduced, sum_of_all(world) if rank == 0 else values(rank, 4))
    for root in range(world):
        for op, combine in ((dist.ReduceOp.SUM, torch.add), (dist.ReduceOp.MAX, torch.maximum)):
            reduced = values(rank, LARGE)
            dist.reduce(reduced, dst=root, op=op)
            expected = functools.reduce(combine, [values(peer, LARGE) for peer in range(world)])
            check(f"{op} to rank {root}", reduced, expected if rank == root else values(rank, LARGE))
    whole = values(rank, world, LARGE)
    dist.reduce_scatter_tensor(whole[rank], whole.flatten())
    total = functools.reduce(torch.add, [values(peer, world, LARGE) for peer in range(world)])
    check("reduce-scatter in place", whole[rank], total[rank])
    mine = values(rank, LARGE)
    dist.all_reduce(mine, op=dist.ReduceOp.AVG)
    check("average", mine, functools.reduce(torch.add, [values(peer, LARGE) for peer in range(world)]) / world)


def not_contiguous(rank: int, world: int, check: Check) -> None:
    column = values(rank, 5, 3).T
    dist.all_reduce(column)
    check("sum in place of a transposed tensor", column, sum(values(peer, 5, 3).T for peer in range(world)))
    column = values(rank, 5, 3).T
    dist.broadcast(column, src=1)
    check("broadcast into a transposed tensor", column, values(1, 5, 3).T)


def parts_to_each(rank: int, world: int, check: Check) -> None:
    # Rank a sends a × 1000 + b rows to rank b, some none.
    lengths = [[(a * 70_000 + b) * (a != b) for b in range(world)] for a in range(world)]
    sent = [values(a, sum(lengths[a]), 3) for a in range(world)]
    received = torch.empty(sum(lengths[a][rank] for a in range(world)), 3)
    dist.all_to_all_single(received, sent[rank], [lengths[a][rank] for a in range(world)], lengths[rank])
    check("all-to-all", received, torch.cat([sent[a].split(lengths[a])[rank] for a in range(world)]))
    even = torch.empty(2 * world, 3)
    dist.all_to_all_single(even, values(rank, 2 * world, 3))
    check("even all-to-all", even, torch.cat([values(a, 2 * world, 3).chunk(world)[rank] for a in range(world)]))
    outputs = [torch.empty(peer + 1) for peer in range(world)]
    dist.all_to_all(outputs, [values(rank * world + peer, rank + 1) for peer in range(world)])
    check("all-to-all of lists", torch.cat(outputs), torch.cat([values(a * world + rank, a + 1) for a in range(world)]))
    scattered = torch.empty(4)
    dist.scatter(scattered, [values(peer, 4) for peer in range(world)] if rank == 1 else None, src=1)
    check("scatter", scattered, values(rank, 4))
    parts = [torch.empty(4) for _ in range(world)] if rank == 1 else None
    dist.gather(values(rank, 4), parts, dst=1)
    check("gather", torch.stack(parts) if parts else torch.zeros(0), of_all(world) if rank == 1 else torch.zeros(0))


def groups(rank: int, world: int, check: Check) -> None:
    pair = dist.new_group([0, 1])
    if rank < 2:
        mine = torch.tensor([rank + 1.0])
        dist.all_reduce(mine, group=pair)
        check("group of two", mine, torch.tensor([3.0]))
    last = dist.new_group([world - 2, world - 1])
    if rank >= world - 2:
        reduced = values(rank, 4)
        dist.reduce(reduced, dst=world - 1, group=last)
        expected = values(world - 2, 4) + values(world - 1, 4) if rank == world - 1 else values(rank, 4)
        check("reduce in a group of two", reduced, expected)


def of_all(world: int) -> torch.Tensor:
    return torch.stack([values(peer, 4) for peer in range(world)])


def sum_of_all(world: int) -> torch.Tensor:
    total = values(0, 4)
    for peer in range(1, world):
        total += values(peer, 4)
    return total


@pytest.mark.parametrize("world", [2, 3])
def test_every_collective_is_what_its_definition_says(world):
    assert run_ranks(world, everything) == [[]] * world


def one_is_late(ranks: Ranks) -> tuple[float, float]:
    """Rank 1 comes late by more than the waiting rank spins: nothing is lost."""
    if ranks.rank == 1:
        time.sleep(0.2)
    started = time.monotonic()
    total = torch.tensor([1.0 + ranks.rank])
    dist.all_reduce(total)
    return float(total), time.monotonic() - started


def test_a_late_rank_is_waited_for():
    (first, waited), (second, _) = run_ranks(2, one_is_late)
    assert first == second == 3.0
    assert waited > 0.1


def one_stays_away(ranks: Ranks) -> str:
    group = dist.new_group([0, 1], timeout=datetime.timedelta(seconds=2))
    try:
        if ranks.rank == 0:
            dist.all_reduce(torch.zeros(1), group=group)
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_rank_that_does_not_come_is_named():
    first, second = run_ranks(2, one_stays_away)
    assert "rank 0 waited 2 s for rank 1 of its group: it has ended, hangs, or takes another path" in first
    assert second == ""


def disagree(ranks: Ranks) -> str:
    """Rank 0 sends three rows, rank 1 expects two."""
    mine = torch.zeros(2 + 3 * (ranks.rank == 0), 1)
    try:
        dist.all_to_all_single(torch.zeros(2, 1), torch.zeros(5, 1) if ranks.rank == 0 else mine, [1, 1], [2, 3])
    except RuntimeError as error:
        return str(error)
    return ""


def test_more_than_is_expected_is_an_error():
    assert run_ranks(2, disagree)[1] == "rank 0 sends more than the 1 values that rank 1 expects"


def test_ranks_of_several_machines_use_gloo(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert shared_memory.is_usable(2) and not shared_memory.is_usable(4)
    monkeypatch.setattr(shared_memory.platform, "machine", lambda: "aarch64")
    assert not shared_memory.is_usable(2)


def sizes_differ(ranks: Ranks) -> str:
    """Rank 1 reduces a slot more than rank 0, which has nothing in the last round."""
    try:
        dist.all_reduce(torch.ones(LARGE + ranks.rank * shared_memory.SLOT_BYTES))
    except RuntimeError as error:
        return str(error)
    return ""


def test_reductions_of_different_sizes_are_an_error():
    for message in run_ranks(2, sizes_differ):
        assert message.endswith("reduces more or fewer values than another rank: shapes must be alike")
