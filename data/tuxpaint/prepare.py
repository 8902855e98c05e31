"""Makes the corpus of human recordings: ``python -m data.tuxpaint.prepare --out DIR [--jobs 2] [--seed 0]``.

    packages ──▶ stamps ──recordings measured──▶ splits ──plan (tasks)──▶ shards ──▶ manifest.json

The result lies in DIR/<hash of these sources, the versions, the packages' files and the options>, packages that had
to be fetched in DIR/packages. Same bytes for the same of all these, whatever ``jobs`` is.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from data import shards
from data.shards import SPLITS
from data.tuxpaint import media, packages, stamps, tasks
from data.tuxpaint.stamps import SpokenCaption, Stamp

PACKAGES = ("numpy", "soxr", "soundfile", "pillow", "webdataset")
SHARD_SAMPLES = {"long_audio": 100, "speech": 900, "mixed": 900}
SHARD_SAMPLES_DEFAULT = 2000
MAX_CLIP_SEC = 8.0
MIN_SEC_A_CHARACTER = 0.03  # nobody reads 33 characters a second: such a recording holds less than its caption


def corpus_hash(folders: Iterable[Path], scale: float, seed: int) -> str:
    """12 hex digits over the Python sources, versions, names and sizes of the packages' files, and the options."""
    files = [
        (path.relative_to(folder).as_posix(), path.stat().st_size)
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    return shards.hash_of(Path(__file__).parent, _versions(), files, scale, seed)


def _versions() -> dict[str, str]:
    drawings = ("resvg_py",) if media.HAS_SVG else ()
    return shards.versions_of((*PACKAGES, *drawings), extra="corpus")


def fault_of(recording: SpokenCaption, seconds: float) -> str:
    """Why a recording is left out; "" for one that is used."""
    if seconds < media.MIN_SEC:
        return "silent or too short"
    if seconds > MAX_CLIP_SEC:
        return f"longer than {MAX_CLIP_SEC:g} s"
    if not tasks.is_usable(recording.text):
        return f"caption longer than {tasks.MAX_CAPTION_CHARS} characters"
    if seconds < MIN_SEC_A_CHARACTER * len(recording.text):
        return "says less than its caption"
    return ""


def plan_splits(
    found: list[Stamp], seconds: dict[Path, float], scale: float, seed: int
) -> tuple[list[tasks.Split], Counter]:
    """The splits to plan from, and how many recordings were left out why. ``scale`` is a share of the stamps."""
    langs = tasks.picture_langs(found)
    left_out: Counter = Counter()
    splits = []
    for name, own in stamps.split_stamps(found, seed).items():
        own = own[:: max(1, round(1 / scale))]
        spoken = []
        for recording in stamps.distinct(one for stamp in own for one in stamp.recordings):
            fault = fault_of(recording, seconds[recording.path])
            left_out[fault] += 1
            if not fault:
                spoken.append(recording)
        for stamp in own:
            stamp.picture = stamp.picture if stamp.picture and media.is_readable(stamp.picture) else None
        splits.append(tasks.Split(name, own, spoken, seconds, langs, random.Random()))
    del left_out[""]
    train, _, heldout = splits
    heldout.spoken += [one for one in train.spoken if stamps.is_new_speaker(one)]
    train.spoken = [one for one in train.spoken if not stamps.is_new_speaker(one)]
    return splits, left_out


def describe(splits: list[tasks.Split], left_out: Counter) -> dict:
    """What ``about.json`` says of the data: stamps, pictures and captions by split, seconds by language and split."""
    facts: dict = {"left_out": dict(sorted(left_out.items())), "speech": defaultdict(dict), "stamps": {}}
    for split in splits:
        facts["stamps"][split.name] = {
            "stamps": len(split.stamps),
            "pictures": len(split.pictured()),
            "captions": sum(len(stamp.captions) for stamp in split.stamps),
            "names": [stamp.name for stamp in split.stamps],
        }
        for lang in sorted({one.lang for one in split.spoken}):
            own = [split.seconds[one.path] for one in split.spoken if one.lang == lang]
            facts["speech"][lang][split.name] = {"clips": len(own), "seconds": round(sum(own), 1)}
    facts["picture_langs"] = splits[0].langs
    return facts


def build(folder: Path, stamps_folder: Path, ood_folder: Path, jobs: int, scale: float, seed: int) -> None:
    """Writes the whole corpus into ``folder``, ``manifest.json`` last."""
    found = stamps.read_stamps(stamps_folder)
    paths = sorted({one.path for stamp in found for one in stamp.recordings})
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        seconds = dict(zip(paths, pool.map(media.seconds_of, paths, chunksize=64), strict=True))
    splits, left_out = plan_splits(found, seconds, scale, seed)
    shard_jobs = []
    for source in tasks.SOURCES:
        for split in splits:
            samples = tasks.plan_source(split, source, seed)
            size = SHARD_SAMPLES.get(source, SHARD_SAMPLES_DEFAULT)
            shard_jobs += shards.cut(folder, split.name, source, samples, size)
    ood = tasks.plan_ood(ood_folder)
    shard_jobs += shards.cut(folder, "heldout", "ood_speech", ood, SHARD_SAMPLES_DEFAULT)
    for stamp in found:
        if stamp.picture:
            media.master(stamp.picture)  # drawn once; the workers inherit it
    results = shards.write_shards(shard_jobs, media.make_media, jobs)
    (folder / "tokenizer_texts.txt").write_text(shards.train_texts(shard_jobs), "utf-8")
    about = {"versions": _versions(), "scale": scale, "seed": seed, "questions": tasks.QUESTIONS}
    about |= describe(splits, left_out)
    (folder / "about.json").write_text(json.dumps(about, indent=1, sort_keys=True, ensure_ascii=False), "utf-8")
    shards.write_manifest(folder, results)


def prepare(out: Path, jobs: int = 2, seed: int = 0, scale: float = 1.0) -> Path:
    """The corpus folder OUT/<hash>, made if it is not there. ``scale`` is the share of the stamps to use.

    Raises ValueError with the commands to run where a package is neither here nor can be fetched, ImportError naming
    the extra if a Python package is missing.
    """
    sources = [packages.find(package, Path(out) / "packages") for package in (packages.STAMPS, packages.POCKETSPHINX)]
    folder = Path(out) / corpus_hash(sources, scale, seed)
    return shards.made_once(folder, lambda building: build(building, *sources, jobs, scale, seed))


def print_speech(folder: Path) -> None:
    """Clips and hours by language and split."""
    about = json.loads((folder / "about.json").read_text("utf-8"))
    for lang, by_split in sorted(about["speech"].items(), key=lambda item: -_total_sec(item[1])):
        clips = ", ".join(f"{split} {by_split[split]['clips']}" for split in SPLITS if split in by_split)
        print(f"{lang:6s} {_total_sec(by_split) / 3600:5.2f} h  {clips} clips")
    print("left out: " + ", ".join(f"{count} {reason}" for reason, count in about["left_out"].items()))


def _total_sec(by_split: dict[str, dict]) -> float:
    return sum(entry["seconds"] for entry in by_split.values())


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the corpus of human recordings and prints its folder.")
    parser.add_argument("--out", type=Path, required=True, help="the corpus goes to OUT/<hash>")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the stamps")
    arguments = parser.parse_args()
    started = time.monotonic()
    folder = prepare(arguments.out, arguments.jobs, arguments.seed, arguments.scale)
    shards.print_manifest(folder)
    print_speech(folder)
    print(f"{folder}  ({time.monotonic() - started:.1f} s)")


if __name__ == "__main__":
    main()
