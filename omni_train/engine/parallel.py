"""Process groups and the few reductions of the loop."""

from __future__ import annotations

import ctypes
import datetime
import os
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from omni_train.config import EngineConfig
from omni_train.engine import shared_memory

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Ranks:
    """Who this process is."""

    rank: int
    world: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start(engine: EngineConfig) -> Ranks:
    """Join the process group that the environment (ours or torchrun's) describes, and set threads and device."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if engine.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        keep_freed_memory()
    else:
        torch.cuda.set_device(local_rank)
    torch.set_num_threads(engine.threads)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    timeout = datetime.timedelta(seconds=engine.timeout_sec)
    backend = "nccl" if engine.device == "cuda" else "gloo"
    if engine.device == "cpu" and shared_memory.is_usable(world):
        backend = shared_memory.NAME
        bind_to_processors(local_rank, world)
    if not dist.is_initialized():
        shared_memory.register()
        # NOTE: a store of our own with a prefix per attempt: torchrun's restarts reuse stale gloo addresses.
        store = dist.PrefixStore(
            f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}",
            dist.TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=rank == 0 and "TORCHELASTIC_RUN_ID" not in os.environ,
                timeout=timeout,
            ),
        )
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
        import deepspeed

        # NOTE: DeepSpeed compiles this extension at the first start, for inference alone. A run killed meanwhile leaves
        # a lock behind, for which all later runs wait without a word.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(backend, verbose=False)
    device = torch.device("cpu") if engine.device == "cpu" else torch.device("cuda", local_rank)
    return Ranks(rank, world, local_rank, device)


def keep_freed_memory() -> None:
    """Let glibc hand freed blocks out again; giving them back to the system and asking anew cost a tenth of a step.

    Does nothing with another C library.
    """
    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)


def bind_to_processors(rank: int, world: int) -> None:
    """Keep this process and its children on its share of the machine's processors, where there are enough.

    Ranks that wait for each other are else put on one processor, again and again: a reduction took ten times as long.
    """
    processors = sorted(os.sched_getaffinity(0))
    share = len(processors) // world
    if world > 1 and share:
        os.sched_setaffinity(0, processors[rank * share : (rank + 1) * share])


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum of a tensor over all ranks, in place; float64 on CPU keeps token counts exact."""
    dist.all_reduce(values)
    return values


def gather_over_ranks(values: Tensor) -> Tensor:
    """The tensors [n, ...] of all ranks, of equal shape, one after another in order of rank."""
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def lists_of_ranks(own: list[Item]) -> list[list[Item]]:
    """The list of each rank, in order of rank, on every rank. Items must be picklable."""
    everywhere: list[list[Item]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, own)
    return everywhere


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on every rank when it is true on one."""
    value = torch.tensor([float(flag)], device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())
