"""The sidecar index: what it holds, when it is refused, and how shards are named."""

import contextlib
import json
import os
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
import webdataset

from omni_train.data.contracts import BadSample, MediaFacts, SampleFacts
from omni_train.data.index import (
    INDEX_VERSION,
    ShardIndex,
    build_index,
    check_shard,
    ensure_index,
    expand,
    index_path,
    load_index,
    save_index,
)
from omni_train.data.shard import DataError, read_range, read_sample


def describe(key, members):
    """Token count = length of the text; ValueError for the text "bad"."""
    text = json.loads(members["json"])["text"]
    if text == "bad":
        raise ValueError("a bad text")
    media = [MediaFacts("a.wav", "audio", num_samples=len(members["a.wav"]), sample_rate_hz=16_000)]
    return len(text), media if "a.wav" in members else [], "a.wav" not in members


def write_shards(folder, texts, maxcount=4):
    with webdataset.ShardWriter(str(folder / "x-%06d.tar"), maxcount=maxcount, verbose=0, mtime=0) as writer:
        for number, text in enumerate(texts):
            writer.write({"__key__": f"k{number}", "json": {"text": text}, "a.wav": b"w" * (number + 1)})
    return sorted(folder.glob("*.tar"))


def test_index_holds_ranges_tokens_and_media_and_survives_the_file(tmp_path):
    (shard,) = write_shards(tmp_path, ["a", "bb", "ccc"])
    built = build_index(shard, describe, "tok-1")
    assert [(facts.key, facts.num_text_tokens) for facts in built.samples] == [("k0", 1), ("k1", 2), ("k2", 3)]
    # two members of one data block each: 4 blocks a sample
    assert [(facts.offset, facts.size) for facts in built.samples] == [(0, 2048), (2048, 2048), (4096, 2048)]
    assert [facts.media[0].num_samples for facts in built.samples] == [1, 2, 3]
    assert (built.shard_bytes, built.num_samples, built.fingerprint) == (shard.stat().st_size, 3, "tok-1")
    built.samples[1].is_text = True
    save_index(shard, built)
    assert load_index(shard, "tok-1") == built
    assert [path.name for path in tmp_path.iterdir() if ".tmp" in path.name] == []
    assert check_shard(shard) == built
    for facts in built.samples:
        assert "json" in read_sample(read_range(shard, facts.offset, facts.size), key=facts.key)


def test_missing_stale_and_damaged_indexes_name_the_command(tmp_path):
    (shard,) = write_shards(tmp_path, ["a", "b"])
    command = f"run `omni-train data index {tmp_path} --tokenizer TOKENIZER`"
    with pytest.raises(DataError, match=f"index is missing; {command}"):
        load_index(shard)
    save_index(shard, build_index(shard, describe, "tok-1"))
    with pytest.raises(DataError, match=f"made with tokenizer 'tok-1', but this run uses 'tok-2'; {command}"):
        load_index(shard, "tok-2")
    sidecar = Path(index_path(shard))
    text = sidecar.read_text()
    for damaged in (
        text[:-20],
        text.rsplit("\n", 2)[0] + "\n",
        "",
        "{}\n",
        text.replace(f'"version": {INDEX_VERSION}', '"version": 9'),
    ):
        sidecar.write_text(damaged)
        with pytest.raises(DataError, match=f"is damaged or of another version .*; {command}"):
            load_index(shard)
    sidecar.write_text(text)
    shard.write_bytes(shard.read_bytes() + bytes(512))
    with pytest.raises(DataError, match=f"of a shard of 10,240 bytes, but the shard has 10,752; {command}"):
        load_index(shard)


def test_check_shard_finds_a_changed_byte_of_the_data(tmp_path):
    (shard,) = write_shards(tmp_path, ["a", "b"])
    save_index(shard, build_index(shard, describe, "t"))
    data = bytearray(shard.read_bytes())
    data[512] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"2 samples with CRC [0-9a-f]{8}, but the shard has 2 with CRC"):
        check_shard(shard)


def test_check_shard_finds_another_sample_of_the_same_size(tmp_path):
    (shard,) = write_shards(tmp_path, ["a", "b"])
    index = build_index(shard, describe, "t")
    index.samples[1].key = "other"
    save_index(shard, index)
    with pytest.raises(DataError, match="byte 2,048: the shard has 'k1', the index 'other' at 2,048"):
        check_shard(shard)


def test_bad_samples_are_kept_apart_with_their_place(tmp_path):
    (shard,) = write_shards(tmp_path, ["a", "bad", "cc"])
    built = build_index(shard, describe, "t")
    assert [facts.key for facts in built.samples] == ["k0", "k2"]
    assert built.bad == [BadSample(str(shard), "k1", 2048, "a bad text")]
    save_index(shard, built)
    assert load_index(shard) == check_shard(shard) == built
    sidecar = Path(index_path(shard))
    os.utime(shard, ns=(0, sidecar.stat().st_mtime_ns + 1))
    with pytest.raises(DataError, match="names 1 bad samples, but the shard was written to since; run"):
        load_index(shard)


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_too_many_bad_samples_stop_after_the_shard_that_passes_a_number(tmp_path, jobs):
    shards = write_shards(tmp_path, ["bad", "a", "bad", "b", "c", "bad", "d", "e", *"ffff"])
    with pytest.raises(DataError, match=r"x-000000\.tar: sample 'k2': byte 4,096: .*\(2 bad samples, 1 allowed"):
        ensure_index(shards, describe, "t", jobs, max_bad_samples=1)
    if jobs == 1:
        assert not Path(index_path(shards[1])).exists()
    for enough in (3, 0.25):
        assert sum(len(index.bad) for index in ensure_index(shards, describe, "t", jobs, enough)) == 3
    with pytest.raises(DataError, match=r"x-000001\.tar: sample 'k5': .*\(3 bad samples, 2 allowed"):
        ensure_index(shards, describe, "t", jobs, max_bad_samples=0.24)  # 2.88 of 12


def test_an_index_without_bad_samples_says_nothing_of_them(tmp_path):
    (shard,) = write_shards(tmp_path, ["a"])
    save_index(shard, build_index(shard, describe, "t"))
    head, row = Path(index_path(shard)).read_text().splitlines()
    assert "bad" not in head and json.loads(row)[:4] == ["k0", 0, 2048, 1]


@pytest.mark.parametrize("jobs", [1, 2])
def test_ensure_index_builds_only_what_is_missing_or_stale(tmp_path, jobs):
    shards = write_shards(tmp_path, ["t" * n for n in range(12)])
    first = ensure_index(shards, describe, "t", jobs=jobs)
    assert [index.num_samples for index in first] == [4, 4, 4]
    assert [[facts.num_text_tokens for facts in index.samples] for index in first] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
    ]
    marked = Path(index_path(shards[0])).stat().st_mtime_ns
    Path(index_path(shards[1])).unlink()
    assert ensure_index(shards, describe, "t", jobs=jobs) == first
    assert Path(index_path(shards[0])).stat().st_mtime_ns == marked
    assert [index.fingerprint for index in ensure_index(shards, describe, "u")] == ["u"] * 3


def test_a_sample_of_a_large_shard_loads_as_fast_as_one_of_a_small_shard(tmp_path):
    media = [MediaFacts("a.flac", "audio", num_samples=16_000, sample_rate_hz=16_000)]

    def seconds_per_sample(count: int) -> float:
        shard = tmp_path / f"{count}.tar"
        shard.write_bytes(bytes(1024))
        samples = [SampleFacts(f"part/{n:08d}", n * 2048, 2048, 17, media) for n in range(count)]
        save_index(shard, ShardIndex(samples, 1024, 0, "t"))
        start = time.process_time()
        index = load_index(shard)
        seconds = time.process_time() - start
        assert index.num_samples == count and index.samples[-1] == samples[-1]
        return seconds / count

    small, large = (min(seconds_per_sample(count) for _ in range(3)) for count in (5_000, 50_000))
    assert large < 3 * small, f"{1e6 * large:.1f} and {1e6 * small:.1f} microseconds"


def test_expand_globs_braces_and_urls(tmp_path):
    for name in ("x-000000.tar", "x-000001.tar", "x-000002.tar", "y.tar", "x-000000.tar.idx"):
        (tmp_path / name).touch()

    def names(*patterns):
        return [path.name for path in expand([f"{tmp_path}/{pattern}" for pattern in patterns])]

    assert names("*.tar") == ["x-000000.tar", "x-000001.tar", "x-000002.tar", "y.tar"]
    assert names("x-{000000..000001}.tar") == ["x-000000.tar", "x-000001.tar"]
    assert names("{y,x-00000{1..2}}.tar") == ["x-000001.tar", "x-000002.tar", "y.tar"]
    assert names("y.tar", "?.tar") == ["y.tar"]

    import fsspec

    for name in ("b", "a"):
        with fsspec.open(f"memory://set/{name}.tar", "wb") as file:
            file.write(b"")
    assert expand(["memory://set/{a,b}.tar"]) == ["memory://set/a.tar", "memory://set/b.tar"]
    assert [path.rpartition("/")[2] for path in expand(["memory://set/*.tar"])] == ["a.tar", "b.tar"]


def test_expand_names_what_does_not_match(tmp_path):
    (tmp_path / "x-0.tar").touch()
    with pytest.raises(ValueError, match=rf"x-{{0..1}}\.tar' \(its member .*x-1\.tar'\) .*folder is '{tmp_path}'"):
        expand([f"{tmp_path}/x-{{0..1}}.tar"])
    with pytest.raises(ValueError, match=f"matches no file; the nearest existing folder is '{tmp_path}'"):
        expand([f"{tmp_path}/no/such/*.tar"])
    with pytest.raises(ValueError, match=r"is a folder; name its shards, for example .*\*\.tar"):
        expand([str(tmp_path)])
    with pytest.raises(ValueError, match=r"the range \{3\.\.1\} is empty"):
        expand([f"{tmp_path}/x-{{3..1}}.tar"])


def test_indexing_side_by_side_starts_no_fork_server(tmp_path, monkeypatch):
    """Ranks are forked from the process that indexes: one that finds its starter's fork server cannot use it."""
    started = []
    monkeypatch.setattr(forkserver._forkserver, "ensure_running", lambda: started.append(True))
    shards = write_shards(tmp_path, ["a", "b", "c"], maxcount=2)
    with contextlib.suppress(Exception):  # of a fork server that is not there
        assert len(ensure_index(shards, describe, "tok-1", jobs=2)) == 2
    assert not started and all(Path(index_path(shard)).exists() for shard in shards)
