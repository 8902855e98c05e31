"""How fast samples are read, beside the standard library's ``tarfile`` with the same decoding.

    PYTHONPATH=. python tests/benchmark/reader.py [--root .cache/corpus/tiny/current/train] [--rounds 5]

Ours reads the samples of a source in the planner's shuffled order, one ranged read each; tarfile walks the shards from
front to back. Both then do the same: parse the JSON and decode the media to what a pack holds. They take turns, source
by source. The corpus must be there (``make corpus``).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tarfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omni_train.config import LayoutConfig
from omni_train.data.audio import decode_audio
from omni_train.data.contracts import DocumentPlan
from omni_train.data.image import decode_image
from omni_train.data.index import load_index
from omni_train.data.loader import PackReader
from omni_train.data.shard import split_key

DECODERS: dict[str, Callable[[bytes], Any]] = {"flac": decode_audio, "png": decode_image}


def decode(members: dict[str, bytes], content: dict[str, Any] | None) -> None:
    """What every reader has to do with a sample's bytes."""
    if content is None:
        json.loads(members["json"])
    for name, data in members.items():
        decoder = DECODERS.get(name.rpartition(".")[2])
        if decoder is not None:
            decoder(data)


def with_tarfile(shards: list[Path]) -> int:
    """Read and decode all samples with tarfile; how many there were."""
    count, key, members = 0, None, dict[str, bytes]()
    for shard in shards:
        with tarfile.open(shard) as archive:
            for info in archive:
                found = split_key(info.name)
                if found is None:
                    continue
                if found[0] != key and members:
                    decode(members, None)
                    count, members = count + 1, {}
                key = found[0]
                members[found[1]] = archive.extractfile(info).read()  # type: ignore[union-attr]
        if members:
            decode(members, None)
            count, members, key = count + 1, {}, None
    return count


def with_ours(reader: PackReader, order: Iterable[tuple[int, int]]) -> int:
    """Read and decode the samples in this order of (shard, sample); how many there were."""
    count = 0
    for shard, index in order:
        sample = reader.read(DocumentPlan("source", shard, index, 0, 1))
        decode(sample.members, sample.content)
        count += 1
    return count


def rate(read: Callable[..., int], *arguments: Any) -> float:
    """Samples a second of one call."""
    started = time.perf_counter()
    return read(*arguments) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(".cache/corpus/tiny/current/train"))
    parser.add_argument("--sources", nargs="+", default=["dialogue", "speech", "pictures", "mixed"])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"python {platform.python_version()}, {os.cpu_count()} cores; samples a second, median of {options.rounds}")
    for source in options.sources:
        shards = sorted((options.root / source).glob("*.tar"))
        indexes = [load_index(shard) for shard in shards]
        reader = PackReader({"source": list(zip(shards, indexes, strict=True))}, {"source": LayoutConfig()})
        order = [(n, i) for n, index in enumerate(indexes) for i in range(index.num_samples)]
        order = [order[n] for n in np.random.default_rng(0).permutation(len(order))]
        rates: dict[str, list[float]] = {"tarfile": [], "ours": []}
        for _ in range(options.rounds):
            rates["tarfile"].append(rate(with_tarfile, shards))
            rates["ours"].append(rate(with_ours, reader, order))
        medians = {name: statistics.median(values) for name, values in rates.items()}
        told = ", ".join(f"{name} {value:,.0f}" for name, value in medians.items())
        print(f"  {source}: {told}; ours / tarfile {medians['ours'] / medians['tarfile']:.2f}", flush=True)


if __name__ == "__main__":
    main()
