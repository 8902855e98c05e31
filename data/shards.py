"""What prepared corpora share: planned samples → shards in parallel → manifest, in a folder that is whole or absent.

plan ──cut──▶ [ShardJob] ──write_shards, one fresh process each──▶ <split>/<source>/<source>-000000.tar
                                                              └──▶ manifest.json, written last
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import shutil
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import webdataset

SPLITS = ("train", "validation", "heldout")
SHARD_BYTES = 1 << 40  # the number of samples ends a shard, so that its name is known before it is written

MakeMedia = Callable[[Any], tuple[bytes, float]]
"""What a member is to be made from → (encoded bytes, seconds of audio; 0 for pictures). Picklable."""


@dataclass(slots=True)
class PlannedSample:
    """``KEY.json`` as a dict and what each media member ("a.flac") is to be made from."""

    content: dict
    media: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ShardJob:
    """One shard to write."""

    folder: Path
    split: str
    source: str
    number: int
    samples: Sequence[PlannedSample]


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What was written: ``name`` relative to the corpus folder, its size, and seconds of audio."""

    split: str
    source: str
    name: str
    num_samples: int
    num_bytes: int
    audio_sec: float
    max_audio_sec: float
    tasks: Counter


def versions_of(packages: Iterable[str], extra: str) -> dict[str, str]:
    """Versions of Python and of ``packages``. Raises ImportError naming ``extra`` where one is not installed."""
    try:
        versions = {package: importlib.metadata.version(package) for package in packages}
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(f"the corpus needs {error.name}: pip install 'omni-train[{extra}]'") from error
    return {"python": platform.python_version(), **versions}


def hash_of(scripts: Path, *values: object) -> str:
    """12 hex digits over the Python sources of the folder ``scripts``, this module and JSON-able ``values``."""
    digest = hashlib.sha256()
    for path in [*sorted(scripts.glob("*.py")), Path(__file__)]:
        digest.update(path.name.encode() + path.read_bytes())
    digest.update(json.dumps(values, sort_keys=True).encode())
    return digest.hexdigest()[:12]


def cut(folder: Path, split: str, source: str, samples: Sequence[PlannedSample], size: int) -> list[ShardJob]:
    """The shards of one source of a split, at most ``size`` samples each."""
    starts = enumerate(range(0, len(samples), size))
    return [ShardJob(folder, split, source, number, samples[start : start + size]) for number, start in starts]


def write_shard(job: ShardJob, make_media: MakeMedia) -> ShardResult:
    """Makes the media of one shard and writes its tar. To be run in a process that has made nothing yet."""
    name = f"{job.split}/{job.source}/{job.source}-{job.number:06d}.tar"
    pattern = str(job.folder / job.split / job.source / f"{job.source}-%06d.tar")
    seconds: list[float] = [0.0]
    options = {"maxcount": len(job.samples) + 1, "maxsize": SHARD_BYTES, "start_shard": job.number, "verbose": 0}
    with webdataset.ShardWriter(pattern, mtime=0.0, **options) as writer:
        for index, sample in enumerate(job.samples):
            content = json.dumps(sample.content, ensure_ascii=False, sort_keys=True)
            members: dict[str, str | bytes] = {"__key__": f"{job.split}-{job.source}-{job.number:04d}-{index:05d}"}
            members["json"] = content.encode()
            for member, spec in sample.media.items():
                members[member], num_seconds = make_media(spec)
                seconds.append(num_seconds)
            writer.write(members)
    return ShardResult(
        split=job.split,
        source=job.source,
        name=name,
        num_samples=len(job.samples),
        num_bytes=(job.folder / name).stat().st_size,
        audio_sec=sum(seconds),
        max_audio_sec=max(seconds),
        tasks=Counter(sample.content["task"] for sample in job.samples),
    )


def write_shards(jobs: Sequence[ShardJob], make_media: MakeMedia, processes: int) -> list[ShardResult]:
    """Writes all shards, each in a process of its own; what the caller has read by now they inherit.

    Raises what a process raised, RuntimeError where one ended without a word; the others are ended.
    """
    # NOTE: no pool: it forks from a thread beside others, and a lock that one of these holds stays shut in the child.
    context, waiting, results = multiprocessing.get_context("fork"), list(jobs)[::-1], []
    running: dict[Connection, tuple[multiprocessing.process.BaseProcess, ShardJob]] = {}
    for job in jobs:
        (job.folder / job.split / job.source).mkdir(parents=True, exist_ok=True)
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_send_shard, args=(sender, waiting[-1], make_media))
                process.start()
                sender.close()
                running[receiver] = process, waiting.pop()
            for receiver in connection.wait(list(running)):
                assert isinstance(receiver, Connection)
                process, job = running[receiver]
                results.append(_receive_shard(receiver, job))
                del running[receiver]
                process.join()
    finally:
        for process, _ in running.values():
            process.kill()
            process.join()
    return results


def _send_shard(sender: Connection, job: ShardJob, make_media: MakeMedia) -> None:
    try:
        sender.send(write_shard(job, make_media))
    except Exception as error:
        error.add_note(f"in the process that wrote a shard of {job.split}/{job.source}:\n{traceback.format_exc()}")
        sender.send(error)


def _receive_shard(receiver: Connection, job: ShardJob) -> ShardResult:
    with receiver:
        try:
            result = receiver.recv()
        except EOFError:
            name = f"{job.split}/{job.source}, shard {job.number}"
            raise RuntimeError(f"the process that wrote {name} was ended; the machine may be out of memory") from None
    if isinstance(result, Exception):
        raise result
    return result


def write_manifest(folder: Path, results: Iterable[ShardResult]) -> None:
    """Writes ``manifest.json``, split → source → {shards, samples, bytes, audio_sec, tasks}, in one atomic step."""
    manifest: dict[str, dict[str, dict]] = {split: {} for split in SPLITS}
    for result in sorted(results, key=lambda result: (SPLITS.index(result.split), result.name)):
        entry = manifest[result.split].setdefault(
            result.source, {"shards": [], "samples": 0, "bytes": 0, "audio_sec": 0.0, "tasks": {}}
        )
        entry["shards"].append(result.name)
        entry["samples"] += result.num_samples
        entry["bytes"] += result.num_bytes
        entry["audio_sec"] = round(entry["audio_sec"] + result.audio_sec, 3)
        for task, count in sorted(result.tasks.items()):
            entry["tasks"][task] = entry["tasks"].get(task, 0) + count
    partial_path = folder / "manifest.json.partial"
    partial_path.write_text(json.dumps(manifest, indent=1), "utf-8")
    os.replace(partial_path, folder / "manifest.json")


def train_texts(jobs: Iterable[ShardJob]) -> str:
    """Every text of the train split (questions, answers, documents), one a line, in the order of the shards."""
    lines = []
    for job in sorted((job for job in jobs if job.split == "train"), key=lambda job: (job.source, job.number)):
        for sample in job.samples:
            if "text" in sample.content:
                lines.append(sample.content["text"])
                continue
            parts = (part for message in sample.content["messages"] for part in message["content"])
            lines += [part["text"] for part in parts if part["type"] == "text"]
    return "\n".join(lines) + "\n"


def made_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """``folder``, built beside it and renamed when whole; one with a manifest is complete and returned at once."""
    if (folder / "manifest.json").exists():
        return folder
    building = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        build(building)
        if not (folder / "manifest.json").exists():  # another process may have been quicker
            shutil.rmtree(folder, ignore_errors=True)
            building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def print_manifest(folder: Path) -> None:
    """A line a source: samples, megabytes, hours of audio."""
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    for split, sources in manifest.items():
        for source, entry in sources.items():
            hours, megabytes = entry["audio_sec"] / 3600, entry["bytes"] / 1e6
            print(f"{split:11s}{source:20s}{entry['samples']:7d} samples {megabytes:7.1f} MB {hours:6.2f} h of audio")
