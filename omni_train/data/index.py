"""The sidecar ``<shard>.idx``: what the planner must know of a shard without opening it.

    shard ──build_index(describe)──▶ ShardIndex ──save_index──▶ <shard>.idx ──load_index──▶ ShardIndex

JSON lines: a header, then one line a sample in the order of the shard, then one object a bad sample, which is left out
of every plan. Written in one atomic step after a strict pass over the whole shard, so an index that exists vouches for
a shard without damage.
"""

from __future__ import annotations

import gc
import glob
import json
import math
import multiprocessing
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from omni_train.data.bad_samples import LIST_THEM, check_budget, is_share, num_allowed
from omni_train.data.contracts import BadSample, MediaFacts, SampleFacts
from omni_train.data.rows import scan_samples
from omni_train.data.shard import DataError, is_url, shard_size

INDEX_VERSION = 5
INDEX_FORMAT = "omni-train shard index"

Describe = Callable[[str, dict[str, bytes]], tuple[int, list[MediaFacts], bool]]
"""(key, members) → (number of text tokens, facts of its media, whether it is plain text). ValueError on a bad sample;
picklable for jobs > 1."""


@dataclass(slots=True)
class ShardIndex:
    """The index of one shard.

    ``shard_bytes`` and ``crc32`` are of the whole file when it was indexed; ``fingerprint`` names the tokenizer (and
    whatever else the token counts hang on). ``bad`` samples are not among ``samples``.
    """

    samples: list[SampleFacts]
    shard_bytes: int
    crc32: int
    fingerprint: str
    bad: list[BadSample] = field(default_factory=list)

    @property
    def num_samples(self) -> int:
        return len(self.samples)


def index_path(shard: str | Path, layout: str = "") -> str:
    """Where the index of a shard lies: its own path with ``.idx`` added, or ``.LAYOUT.idx``.

    ``layout`` is the ``layout_id`` of the source: sources that read a shard differently have an index each.
    """
    return f"{shard}.{layout}.idx" if layout else f"{shard}.idx"


def build_index(shard: str | Path, describe: Describe, fingerprint: str) -> ShardIndex:
    """The index of a shard, from one strict pass. Raises DataError on damage.

    A key or extension that comes twice, and a ValueError of ``describe``, make a sample bad.
    """
    scan, samples, bad = scan_samples(shard), [], []
    for sample in scan:
        try:
            if sample.error:
                raise ValueError(sample.error)
            described = describe(sample.key, sample.members)
        except ValueError as error:
            what = str(error).removeprefix(f"sample {sample.key}: ")
            bad.append(BadSample(str(shard), sample.key, sample.offset, what))
        else:
            samples.append(SampleFacts(sample.key, sample.offset, sample.size, *described))
    return ShardIndex(samples, scan.size, scan.crc32, fingerprint, bad)


def save_index(shard: str | Path, index: ShardIndex, layout: str = "") -> None:
    """Writes the sidecar in one atomic step."""
    header = {
        "format": INDEX_FORMAT,
        "version": INDEX_VERSION,
        "shard_bytes": index.shard_bytes,
        "num_samples": index.num_samples,
        "crc32": index.crc32,
        "fingerprint": index.fingerprint,
    }
    if index.bad:
        header["num_bad"] = len(index.bad)
    lines = [json.dumps(header)]
    for sample in index.samples:
        media = [_media_row(facts) for facts in sample.media]
        row = [sample.key, sample.offset, sample.size, sample.num_text_tokens, media, int(sample.is_text)]
        lines.append(json.dumps(row))
    lines += [json.dumps({"key": bad.key, "offset": bad.offset, "error": bad.error}) for bad in index.bad]
    _write_atomically(index_path(shard, layout), ("\n".join(lines) + "\n").encode())


def load_index(shard: str | Path, fingerprint: str | None = None, layout: str = "") -> ShardIndex:
    """The index of a shard from its sidecar. ``fingerprint``: the one it must have been made with (None: any).

    Raises DataError, with the command that mends it, when the sidecar is missing, damaged, or of another shard,
    tokenizer or version; one with bad samples also when the shard was written to since.
    """
    with _garbage_collection_paused():
        index = _parse_index(shard, _read_index(shard, layout), layout)
    size = shard_size(shard)
    if index.shard_bytes != size:
        raise _stale(shard, f"is of a shard of {index.shard_bytes:,} bytes, but the shard has {size:,}", layout)
    if fingerprint is not None and index.fingerprint != fingerprint:
        what = f"was made with tokenizer {index.fingerprint!r}, but this run uses {fingerprint!r}"
        raise _stale(shard, what, layout)
    # NOTE: a sample mended in place often leaves the shard's size as it was: tar pads to whole records.
    if index.bad and not is_url(shard) and os.stat(shard).st_mtime_ns > os.stat(index_path(shard, layout)).st_mtime_ns:
        raise _stale(shard, f"names {len(index.bad):,} bad samples, but the shard was written to since", layout)
    return index


def ensure_index(
    shards: Iterable[str | Path],
    describe: Describe,
    fingerprint: str,
    jobs: int = 1,
    layout: str = "",
    max_bad_samples: float = math.inf,
) -> list[ShardIndex]:
    """The indexes of ``shards``, in order; missing and stale ones are built and saved, by ``jobs`` processes.

    Raises DataError when more samples of all shards are bad than ``max_bad_samples`` (see ``num_allowed``): for a
    number after the shard that passes it, for a share when all shards are read.
    """
    shards = list(shards)
    indexes: dict[int, ShardIndex] = {}
    for number, shard in enumerate(shards):
        try:
            indexes[number] = load_index(shard, fingerprint, layout)
        except DataError:
            pass
    missing = [number for number in range(len(shards)) if number not in indexes]
    build = partial(_build_and_save, describe=describe, fingerprint=fingerprint, layout=layout)
    stale = [shards[number] for number in missing]
    if jobs > 1 and len(missing) > 1:
        # NOTE: no fork server: ranks are forked from this process, and one that finds its starter's cannot use it.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(jobs, len(missing)), mp_context=context) as pool:
            _collect(indexes, missing, pool.map(build, stale), max_bad_samples)
    else:
        _collect(indexes, missing, map(build, stale), max_bad_samples)
    found = [indexes[number] for number in range(len(shards))]
    check_bad_samples(found, max_bad_samples)
    return found


def check_bad_samples(indexes: Iterable[ShardIndex], max_bad_samples: float) -> None:
    """Raises DataError when more samples of ``indexes`` are bad than ``max_bad_samples`` (see ``num_allowed``)."""
    bad: list[BadSample] = []
    num_samples = 0
    for index in indexes:
        bad += index.bad
        num_samples += index.num_samples + len(index.bad)
    check_budget(bad, num_allowed(max_bad_samples, num_samples), LIST_THEM)


def _collect(
    indexes: dict[int, ShardIndex], numbers: list[int], built: Iterable[ShardIndex], max_bad_samples: float
) -> None:
    """Puts each index at its number; where bad samples are limited by number, stops as soon as there are too many."""
    for number, index in zip(numbers, built, strict=True):
        indexes[number] = index
        if index.bad and not is_share(max_bad_samples):
            check_bad_samples(indexes.values(), max_bad_samples)


def check_shard(shard: str | Path, layout: str = "") -> ShardIndex:
    """The shard's index, after a strict pass over the shard that agrees with it. Raises DataError otherwise."""
    index, scan = load_index(shard, layout=layout), scan_samples(shard)
    known: list[SampleFacts | BadSample] = [*index.samples, *index.bad]
    known.sort(key=lambda sample: sample.offset)
    count = 0
    for count, sample in enumerate(scan, start=1):
        facts = known[count - 1] if count <= len(known) else None
        size = facts.size if isinstance(facts, SampleFacts) else sample.size
        if facts is None or (facts.key, facts.offset, size) != (sample.key, sample.offset, sample.size):
            told = f"{facts.key!r} at {facts.offset:,}" if facts else "no more samples"
            what = f"disagrees at byte {sample.offset:,}: the shard has {sample.key!r}, the index {told}"
            raise _stale(shard, what, layout)
    if count != len(known) or scan.crc32 != index.crc32:
        what = f"is of {len(known):,} samples with CRC {index.crc32:08x}"
        raise _stale(shard, f"{what}, but the shard has {count:,} with CRC {scan.crc32:08x}", layout)
    return index


def expand(patterns: Iterable[str]) -> list[str | Path]:
    """The shards that ``patterns`` name, sorted, each once: local ones as Paths, URLs as strings.

    Patterns: globs (``*``, ``?``, ``**``) and braces (``x-{000..003}.tar``, ``{a,b}``). Raises ValueError for a
    pattern, or a member of a brace, that matches no file.
    """
    found: set[str] = set()
    for pattern in patterns:
        for plain in _expand_braces(str(pattern)):
            matches = _matches(plain)
            if not matches:
                raise ValueError(_no_match_message(pattern, plain))
            found.update(matches)
    return [path if is_url(path) else Path(path) for path in sorted(found)]


def _build_and_save(shard: str | Path, describe: Describe, fingerprint: str, layout: str) -> ShardIndex:
    index = build_index(shard, describe, fingerprint)
    save_index(shard, index, layout)
    return index


def _media_row(facts: MediaFacts) -> list[Any]:
    return [getattr(facts, name) for name in MediaFacts.__slots__]


def _stale(shard: str | Path, what: str, layout: str) -> DataError:
    folder = str(shard).rpartition("/")[0] or "."
    options = " with the layout options of its source" if layout else ""
    command = f"omni-train data index {folder} --tokenizer TOKENIZER"
    message = f"{index_path(shard, layout)}: the index {what}; run `{command}`{options}"
    return DataError(message, shard=str(shard))


def _read_index(shard: str | Path, layout: str) -> bytes:
    path = index_path(shard, layout)
    try:
        if is_url(path):
            import fsspec

            with fsspec.open(path, "rb") as file:
                return file.read()
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise _stale(shard, "is missing", layout) from None


@contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    """Many long-lived objects are made: the collector would walk them again and again (a third of the time without)."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _parse_index(shard: str | Path, data: bytes, layout: str) -> ShardIndex:
    try:
        head, _, body = data.partition(b"\n")
        header = json.loads(head)
        if header["format"] != INDEX_FORMAT or header["version"] != INDEX_VERSION:
            raise ValueError(f"version {header['version']} of {header['format']!r}")
        rows = json.loads(b"[" + body.rstrip(b"\n").replace(b"\n", b",") + b"]")
        num_samples, num_bad = header["num_samples"], header.get("num_bad", 0)
        if len(rows) != num_samples + num_bad:
            raise ValueError(f"{len(rows):,} samples, not the {num_samples + num_bad:,} of its header")
        samples = [
            SampleFacts(key, offset, size, tokens, [MediaFacts(*media_row) for media_row in media], bool(is_text))
            for key, offset, size, tokens, media, is_text in rows[:num_samples]
        ]
        bad = [BadSample(str(shard), **row) for row in rows[num_samples:]]
        return ShardIndex(samples, header["shard_bytes"], header["crc32"], header["fingerprint"], bad)
    except (ValueError, KeyError, TypeError) as error:
        raise _stale(shard, f"is damaged or of another version ({error})", layout) from error


def _write_atomically(path: str, data: bytes) -> None:
    if is_url(path):
        import fsspec

        with fsspec.open(path, "wb") as file:
            file.write(data)
        return
    temporary = f"{path}.tmp{uuid.uuid4().hex[:12]}"  # of containers with a common file system, too
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _expand_braces(pattern: str) -> list[str]:
    """``a{0..2}b`` and ``a{x,y}b`` written out, nested ones too; numbers keep the width of the first bound."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", match.group(1))
    if bounds:
        first, last = int(bounds.group(1)), int(bounds.group(2))
        if last < first:
            raise ValueError(
                f"pattern {pattern!r}: the range {match.group(0)} is empty; write the smaller number first"
            )
        choices = [str(number).zfill(len(bounds.group(1))) for number in range(first, last + 1)]
    else:
        choices = match.group(1).split(",")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [text for choice in choices for text in _expand_braces(head + choice + tail)]


def _matches(pattern: str) -> list[str]:
    if is_url(pattern):
        import fsspec

        filesystem, inner = fsspec.core.url_to_fs(pattern)
        if not glob.has_magic(inner):
            return [pattern] if filesystem.isfile(inner) else []
        return [filesystem.unstrip_protocol(path) for path in filesystem.glob(inner) if filesystem.isfile(path)]
    return [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]


def _no_match_message(pattern: str, plain: str) -> str:
    shown = f"shard pattern {str(pattern)!r}" + (f" (its member {plain!r})" if plain != str(pattern) else "")
    if is_url(plain):
        return f"{shown} matches no file; check the address"
    if os.path.isdir(plain):
        return f"{shown} is a folder; name its shards, for example {os.path.join(plain, '*.tar')!r}"
    folder = Path(plain).parent
    while not folder.is_dir():
        folder = folder.parent
    return f"{shown} matches no file; the nearest existing folder is {str(folder)!r}"
