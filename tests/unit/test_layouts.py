"""Public layouts: shards of stock tools give the samples and texts that stock webdataset reads from them."""

from __future__ import annotations

import io
import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import webdataset
from PIL import Image
from test_video import video

from omni_train import cli
from omni_train.config import ConfigError, LayoutConfig, RunConfig, ShardsConfig, load
from omni_train.data.contracts import DocumentPlan, Sample
from omni_train.data.index import index_path
from omni_train.data.layouts import MESSAGES, layout_id, read_content
from omni_train.data.loader import PackReader
from omni_train.data.mixture import OutOfData
from omni_train.data.pipeline import DataPipeline
from omni_train.data.shard import DataError
from omni_train.data.tokenizer import train_tokenizer
from omni_train.run import check_inputs

PAIRS = LayoutConfig(layout="pairs")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["user\nassistant\nwhat is said? a red dog no 1 of 2\n"] * 8, 350, out)
    return out


def configured(root: Path, tokenizer: Path, mixture: dict[str, str], *more: str) -> RunConfig:
    """s2_general with a mixture of its own: name → what stands in the braces of a YAML source."""
    removed = [f"~mixture.{name}" for name in load("s2_general", []).mixture]
    added = [f"+mixture.{name}={{{values}}}" for name, values in mixture.items()]
    return load("s2_general", [f"data.root={root}", f"data.tokenizer={tokenizer}", *removed, *added, *more])


def picture(number: int, form: str = "JPEG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (48 + 16 * number, 64), (40 * number, 90, 200)).save(out, form)
    return out.getvalue()


def sound(number: int, form: str) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, 0.3 * np.sin(np.arange(8_000 + 1_600 * number) * 0.1), 16_000, format=form)
    return out.getvalue()


def movie(number: int, tones: int = 0) -> bytes:
    return video([n / 4 for n in range(3 + number)], tones=tones)


def write(folder: Path, samples: list[dict[str, Any]], maxcount: int = 3) -> Path:
    """Shards of webdataset's own writer: x-000000.tar, …"""
    folder.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(str(folder / "x-%06d.tar"), maxcount=maxcount, verbose=0, mtime=0) as writer:
        for number, sample in enumerate(samples):
            writer.write({"__key__": f"s{number:03d}", **sample})
    return folder


def write_img2dataset(folder: Path, rows_of_shard: tuple[int, ...], captions: str = "a red dog no {}") -> Path:
    """What img2dataset leaves: 00000.tar with 000000000.{jpg,txt,json}, 00000.parquet, 00000_stats.json.

    Row 1 of every shard failed to download: it lies in the parquet file only.
    """
    folder.mkdir(parents=True)
    for shard, rows in enumerate(rows_of_shard):
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar"), mtime=0) as writer:
            for row in (row for row in range(rows) if row != 1):
                key, caption = f"{shard:05d}{row:04d}", captions.format(row)
                meta = {"caption": caption, "url": "http://x/y.jpg", "key": key, "status": "success", "error": None}
                json_bytes = json.dumps({**meta, "width": 64, "exif": "{}"}, indent=4)
                writer.write({"__key__": key, "jpg": picture(row), "txt": caption, "json": json_bytes})
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1 no tar PAR1")
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps({"count": rows, "successes": rows - 1}))
    return folder


def stock(folder: Path) -> list[dict[str, Any]]:
    """All samples of a folder's shards as stock webdataset reads and decodes them (media stay bytes)."""
    urls = sorted(map(str, folder.glob("*.tar")))
    return list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode())


def samples_of(data: DataPipeline, name: str, source: ShardsConfig) -> list[Sample]:
    """Every sample of a source by its index, read as in training."""
    shards = data.indexed(source)
    reader = pickle.loads(pickle.dumps(PackReader({name: shards}, {name: source})))
    places = [(number, position) for number, (_, index) in enumerate(shards) for position in range(index.num_samples)]
    return [reader.read(DocumentPlan(name, number, position, 0, 1)) for number, position in places]


def dialogue(number: int) -> dict[str, Any]:
    """Interleaved: picture, text, sound, text, in two turns."""
    user = [{"type": "image", "image": "0.png"}, {"type": "text", "text": " or "}, {"type": "audio", "audio": "1.wav"}]
    turns = [("user", user), ("assistant", f"dog {number}"), ("user", "said?"), ("assistant", f"no {number}")]
    return {"messages": [{"role": role, "content": content} for role, content in turns], "task": "chat"}


def dialogue_members(number: int) -> dict[str, Any]:
    return {"json": dialogue(number), "0.png": picture(number, "PNG"), "1.wav": sound(number, "WAV")}


TEXT_OF = {
    "txt": lambda sample: sample["txt"],
    "json.text": lambda sample: sample["json"]["text"],
    "json.caption": lambda sample: sample["json"]["caption"],
    "json.sentence": lambda sample: sample["json"]["sentence"],
}

TABLE = {  # layout: (members of sample n, the values that its source sets, where stock webdataset finds the text)
    "jpg+txt": (lambda n: {"jpg": picture(n), "txt": f"a dog no {n}"}, "layout: pairs", "txt"),
    "webp+json": (
        lambda n: {"webp": picture(n, "WEBP"), "json": {"caption": f"dog {n}"}},
        "layout: pairs",
        "json.caption",
    ),
    "flac+txt": (lambda n: {"flac": sound(n, "FLAC"), "txt": f"said é {n}"}, "layout: pairs, prompt: 'what?'", "txt"),
    "wav+json": (
        lambda n: {"wav": sound(n, "WAV"), "json": {"text": f"said {n}", "lang": "en"}},
        "layout: pairs",
        "json.text",
    ),
    "mp3+json": (
        lambda n: {"mp3": sound(n, "MP3"), "json": {"sentence": f"said {n}", "text": "no", "id": n}, "txt": "no"},
        "layout: pairs, text_field: sentence, prompt: 'what is said?'",
        "json.sentence",
    ),
    "mp4+txt": (lambda n: {"mp4": movie(n), "txt": f"a dog no {n}"}, "layout: pairs", "txt"),
    "mp4+json": (
        lambda n: {"mp4": movie(n, tones=16_000), "json": {"caption": f"a dog no {n}"}},
        "layout: pairs, use_audio_in_video: true",
        "json.caption",
    ),
    "txt": (lambda n: {"txt": f"  a dog\n no {n}\n"}, "layout: text", "txt"),
    "json": (lambda n: {"json": {"text": f"a dog no {n}"}}, "", "json.text"),
    "json.caption": (
        lambda n: {"json": {"caption": f"a dog {n}"}},
        "layout: text, text_field: caption",
        "json.caption",
    ),
}
EXPECTED_MODALITY = {"jpg": "image", "webp": "image", "mp4": "video"} | dict.fromkeys(("flac", "wav", "mp3"), "audio")


@pytest.mark.parametrize("name", TABLE)
def test_a_layout_gives_the_samples_and_texts_of_stock_webdataset(name: str, tmp_path: Path, tokenizer: Path) -> None:
    make, values, where = TABLE[name]
    expected = stock(write(tmp_path / "a", [make(n) for n in range(5)], maxcount=2))
    config = configured(tmp_path, tokenizer, {"x": f"shards: [a/*.tar], weight: 1, {values}"})
    data, source = DataPipeline.of(config), config.mixture["x"]
    found = samples_of(data, "x", source)
    facts = [facts for _, index in data.indexed(source) for facts in index.samples]
    assert len(expected) == 5 and [sample.key for sample in found] == [sample["__key__"] for sample in expected]
    medium = name.partition("+")[0] if "+" in name else ""
    modality = "video_audio" if name == "mp4+json" else EXPECTED_MODALITY.get(medium, "text")
    for ours, theirs, fact in zip(found, expected, facts, strict=True):
        text = TEXT_OF[where](theirs)
        document = data.encoder.encode(ours)
        learnt = data.tokenizer.decode(document.labels[document.labels >= 0])
        assert document.modality == modality
        assert data.encoder.num_tokens(fact) == document.num_tokens
        if medium:
            assert ours.members[medium] == theirs[medium]
            assert learnt == text + "<|im_end|>"
            prompt, reference = data.encoder.prompt_and_answer(ours)
            question = data.tokenizer.decode(prompt.input_ids)
            assert reference == text and (prompt.labels == -100).all()
            assert question.endswith("<|im_end|>\n<|im_start|>assistant\n") and text not in question
            assert (source.prompt or "<|im_start|>user\n<|") in question
        else:
            whole = text + "<|endoftext|>"  # the first token has no context to be learnt from
            assert data.tokenizer.decode(document.input_ids) == whole and whole.endswith(learnt)


def test_a_folder_of_img2dataset_needs_its_shards_and_one_word(tmp_path: Path, tokenizer: Path) -> None:
    expected = stock(write_img2dataset(tmp_path / "laion", (5, 3)))
    config = configured(tmp_path, tokenizer, {"x": "shards: [laion/*.tar], weight: 1, layout: pairs"})
    found = samples_of(DataPipeline.of(config), "x", config.mixture["x"])
    assert [sample.key[:5] + "/" + sample.key[5:] for sample in found] == [
        *("00000/0000", "00000/0002", "00000/0003", "00000/0004"),
        *("00001/0000", "00001/0002"),
    ]
    assert [sample.key for sample in found] == [sample["__key__"] for sample in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs["txt"] == theirs["json"]["caption"]
        assert ours.content == {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "jpg"}]},
                {"role": "assistant", "content": theirs["txt"]},
            ]
        }
        assert ours.members["jpg"] == theirs["jpg"]


def test_interleaved_messages_are_those_of_stock_webdataset(tmp_path: Path, tokenizer: Path) -> None:
    expected = stock(write(tmp_path / "a", [dialogue_members(n) for n in range(4)]))
    config = configured(tmp_path, tokenizer, {"x": "shards: [a/*.tar], weight: 1"})
    data = DataPipeline.of(config)
    found = samples_of(data, "x", config.mixture["x"])
    assert [sample.content for sample in found] == [sample["json"] for sample in expected] and len(found) == 4
    text = data.tokenizer.decode(data.encoder.encode(found[3]).input_ids)
    assert text.index("<|vision_start|>") < text.index(" or ") < text.index("<|audio_start|>") < text.index("dog 3")
    assert data.encoder.prompt_and_answer(found[3])[1] == "no 3"


def test_keys_follow_the_rule_of_webdataset(tmp_path: Path, tokenizer: Path) -> None:
    """Folders belong to the key; a dot in the file's name ends it, so members are then called as stock calls them."""
    (tmp_path / "a").mkdir()
    with webdataset.TarWriter(str(tmp_path / "a" / "0.tar"), mtime=0) as writer:
        for n, key in enumerate(["part.1/s0", "part.1/s1", "part.2/s0"]):
            writer.write(
                {"__key__": key, "JPG": picture(n), "txt": f"dog {n}", "alt.txt": "other", "npy": np.arange(2)}
            )
        writer.write({"__key__": "v1", "0.jpg": picture(0), "txt": "dog v"})
    expected = stock(tmp_path / "a")
    config = configured(tmp_path, tokenizer, {"x": "shards: [a/*.tar], weight: 1, layout: pairs"})
    found = samples_of(DataPipeline.of(config), "x", config.mixture["x"])
    assert [sample.key for sample in found] == ["part.1/s0", "part.1/s1", "part.2/s0", "v1"]
    assert [(sample.key, sample.content["messages"][1]["content"]) for sample in found] == [
        (sample["__key__"], sample["txt"]) for sample in expected
    ]
    assert found[3].content["messages"][0]["content"] == [{"type": "image", "image": "0.jpg"}]


@pytest.mark.parametrize(
    ("members", "values", "message"),
    [
        ({"jpg": b"?", "txt": b"dog"}, {}, r"no json member; it has jpg, txt; if each .* set layout: pairs on its sou"),
        ({"txt": b"dog"}, {}, "no json member; it has txt; if each .* set layout: text on its source"),
        ({"jpg": b"?", "json": {"caption": "a"}}, {}, "neither 'messages' nor 'text'; it has caption.* layout: pairs"),
        ({"flac": b"?", "json": {"text": "a"}}, {}, "a plain text, which does not name flac; .* set layout: pairs"),
        ({"json": b"[]"}, {"layout": "text"}, "member 'json' holds a list, not an object"),
        ({"json": b"[" * 100_000}, {"layout": "text"}, "member 'json' is not JSON"),
        ({"txt": b"dog"}, {"layout": "pairs"}, r"needs one medium in a sample; it has none \(members: txt\)"),
        (
            {"1.jpg": b"?", "2.jpg": b"?", "1.txt": b"a"},
            {"layout": "pairs"},
            r"it has 1\.jpg, 2\.jpg \(members: 1\.jpg, 1\.txt, 2\.jpg\); several need layout messages.*a dot in a file",
        ),
        ({"jpg": b"?", "wav": b"?", "txt": b"a"}, {"layout": "pairs"}, "it has jpg, wav"),
        ({"jpg": b"?"}, {"layout": "pairs"}, r"no txt member and no text or caption in its json \(members: jpg\);"),
        (
            {"jpg": b"?", "json": {"url": "u", "alt": "a"}},
            {"layout": "pairs"},
            r"no text or caption in its json \(members: jpg, json; fields: alt, url\); name the field with text_field",
        ),
        ({"jpg": b"?", "json": {"text": "a", "caption": "b"}}, {"layout": "pairs"}, "has both text and caption in its"),
        (
            {"jpg": b"?", "txt": b"a", "json": {"caption": "b"}},
            {"layout": "pairs", "text_field": "captoin"},
            r"field 'captoin' of member 'json'.* is missing; did you mean 'caption'\?",
        ),
        ({"jpg": b"?", "txt": b"a"}, {"layout": "pairs", "text_field": "alt"}, "'alt'.* missing; members: jpg, txt"),
        ({"jpg": b"?", "json": {"caption": None}}, {"layout": "pairs"}, "'caption' of member 'json' is NoneType; it"),
        ({"jpg": b"?", "txt": b" \n"}, {"layout": "pairs"}, "member 'txt' is empty"),
        ({"txt": b""}, {"layout": "text"}, "member 'txt' is empty"),
        ({"jpg": b"?", "txt": b"\xff"}, {"layout": "pairs"}, "member 'txt' is not UTF-8"),
    ],
)
def test_a_sample_of_another_layout_is_named(members: dict[str, Any], values: dict[str, str], message: str) -> None:
    encoded = {k: json.dumps(v).encode() if isinstance(v, dict) else v for k, v in members.items()}
    with pytest.raises(ValueError, match=message):
        read_content(encoded, LayoutConfig(**values))


def test_an_error_names_shard_sample_byte_and_fix(tmp_path: Path, tokenizer: Path) -> None:
    write(tmp_path / "a", [{"jpg": picture(0), "txt": "dog"}, {"jpg": picture(1), "txt": ""}])
    config = configured(tmp_path, tokenizer, {"x": "shards: [a/*.tar], weight: 1, layout: pairs"})
    where = r"a/x-000000\.tar: sample 's001': byte \d,\d{3}: .*member 'txt' is empty; mend the sample, or remove it"
    data = DataPipeline.of(config)
    ((_, index),) = data.indexed(config.mixture["x"])
    assert [facts.key for facts in index.samples] == ["s000"] and [bad.key for bad in index.bad] == ["s001"]
    with pytest.raises(DataError, match=where):
        data.bad_sample_log(tmp_path / "bad_samples.jsonl")


def test_surrounding_white_space_is_no_part_of_an_answer_and_labels_are_kept() -> None:
    fields = {"lang": "en", "task": "asr", "license": "CC0-1.0", "width": 3}
    content = read_content({"wav": b"?", "txt": b" a dog \n", "json": json.dumps(fields).encode()}, PAIRS)
    assert content["messages"][1]["content"] == "a dog"
    assert {k: v for k, v in content.items() if k != "messages"} == {"lang": "en", "task": "asr", "license": "CC0-1.0"}


def test_every_setting_changes_the_id_of_a_layout() -> None:
    values: list[dict[str, Any]] = [
        {},
        {"prompt": "what?"},
        {"text_field": "what?"},
        {"use_audio_in_video": True},
        {"prompt": "what?", "text_field": "x"},
    ]
    ids = [layout_id(LayoutConfig(layout="pairs", **value)) for value in values]
    assert len({*ids, layout_id(LayoutConfig(layout="text")), layout_id(MESSAGES)}) == 7
    assert layout_id(MESSAGES) == "" and layout_id(ShardsConfig(shards=["x"], layout="pairs")) == layout_id(PAIRS)
    assert index_path("s.tar") == "s.tar.idx"
    assert index_path("s.tar", layout_id(PAIRS)) == f"s.tar.{layout_id(PAIRS)}.idx"


def test_two_sources_read_a_shard_differently_without_a_fight(tmp_path: Path, tokenizer: Path) -> None:
    texts = [{"text": f"dog {n}", "caption": f"a red dog no {n}"} for n in range(3)]
    write(tmp_path / "a", [{"json": fields, "jpg": picture(n)} for n, fields in enumerate(texts)])
    shards = "shards: [a/*.tar], weight: 1, "
    mixture = {
        "short": shards + "layout: pairs, text_field: text",
        "asked": shards + "layout: pairs, text_field: text, prompt: 'what is said?'",
        "alone": shards + "layout: text, text_field: caption",
    }
    config = configured(tmp_path, tokenizer, mixture)
    data = DataPipeline.of(config)

    def indexed() -> dict[str, list[int]]:
        found = {name: data.indexed(source)[0][1].samples for name, source in config.mixture.items()}
        return {name: [facts.num_text_tokens for facts in samples] for name, samples in found.items()}

    before = indexed()
    prompt_tokens = len(data.tokenizer("what is said?")["input_ids"])
    assert before["asked"] == [count + prompt_tokens for count in before["short"]]
    assert before["alone"] == [len(data.tokenizer(f"a red dog no {n}")["input_ids"]) + 1 for n in range(3)]
    sidecars = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").glob("*.idx")}
    assert len(sidecars) == 3
    assert indexed() == before
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a").glob("*.idx")} == sidecars


def mixed_folders(root: Path) -> dict[str, list[str]]:
    """Five sources, each of another layout, in seven folders; the keys that stock webdataset finds in each source."""
    folders = {
        "pictures": [write_img2dataset(root / "laion" / f"part{n}", (4, 3)) for n in range(2)],
        "speech": [
            write(root / "asr", [{"flac": sound(n, "FLAC"), "json": {"text": f"dog {n}"}} for n in range(7)], 2),
            write(root / "more_asr", [{"flac": sound(n, "FLAC"), "json": {"text": f"dog {n}"}} for n in range(2)]),
        ],
        "clips": [write(root / "clips", [{"mp4": movie(n), "txt": f"a dog {n}"} for n in range(3)], 2)],
        "chat": [write(root / "chat", [dialogue_members(n) for n in range(4)])],
        "books": [write(root / "books", [{"txt": "a red dog. " * (n + 1)} for n in range(6)])],
    }
    return {name: [sample["__key__"] for f in found for sample in stock(f)] for name, found in folders.items()}


def test_a_mixture_of_layouts_folders_globs_and_braces_gives_every_sample_once(tmp_path: Path, tokenizer: Path) -> None:
    expected = mixed_folders(tmp_path)
    mixture = {
        "pictures": "shards: ['laion/part{0,1}/*.tar'], layout: pairs",
        "speech": "shards: ['asr/x-{000000..000003}.tar', more_asr/*.tar], layout: pairs, prompt: 'what is said?'",
        "clips": "shards: ['clips/x-00000?.tar'], layout: pairs",
        "chat": "shards: ['**/chat/*.tar']",
        "books": "shards: [books/*.tar], layout: text",
    }
    mixture = {name: f"{values}, weight: 0.2, max_epochs: 1" for name, values in mixture.items()}
    data = DataPipeline.of(configured(tmp_path, tokenizer, mixture, "stage.context=256"))
    ids: list[str] = []
    modalities: Counter[int] = Counter()
    with data.loader(rank=0, world=1) as loader, pytest.raises(OutOfData):
        while True:
            for pack in loader.next_step():
                modalities.update(pack.doc_modality.tolist() if pack.sample_ids else [])
                ids += pack.sample_ids
    assert len(set(ids)) == len(ids), "folders hold shards of the same name"
    keys = {name: sorted(i.rpartition("/")[2] for i in ids if i.startswith(f"{name}/")) for name in mixture}
    assert keys == {name: sorted(own) for name, own in expected.items()}
    assert {name: len(found) for name, found in keys.items()} == {
        "pictures": 10,
        "speech": 9,
        "clips": 3,
        "chat": 4,
        "books": 6,
    }
    assert modalities == {0: 6, 1: 9, 2: 10 + 4, 3: 3}  # texts, sounds, pictures, videos


def test_validation_reads_layouts_too(tmp_path: Path, tokenizer: Path) -> None:
    write_img2dataset(tmp_path / "laion", (4,))
    unused = [f"~validation.{name}" for name in load("s2_general", []).validation]
    held = "+validation.held={shards: [laion/*.tar], layout: pairs, text_field: caption}"
    source = "shards: [laion/*.tar], weight: 1, layout: pairs"
    config = configured(tmp_path, tokenizer, {"x": source}, *unused, held)
    check_inputs(config)
    assert sorted(path.name for path in (tmp_path / "laion").glob("*.idx")) == sorted(
        f"00000.tar.{layout_id(layout)}.idx" for layout in (config.mixture["x"], config.validation["held"])
    )
    data = DataPipeline.of(config)
    plans = data.validation_packs("held", config.validation["held"], 10_000)
    builder = pickle.loads(pickle.dumps(data.validation_builder("held", config.validation["held"])))
    pack = builder(plans[0])
    assert [name.rpartition("/")[2] for name in pack.sample_ids] == ["000000000", "000000002", "000000003"]
    learnt = data.tokenizer.decode(pack.shift_labels[pack.shift_labels >= 0])
    assert learnt == "".join(f"a red dog no {n}<|im_end|>" for n in (0, 2, 3))
    with data.loader(0, 1) as loader:
        assert list(data.too_long(loader.planner)) == []
        config.stage.context = 1
        assert list(data.too_long(loader.planner)) == [
            "validation.held: 3 samples are longer than 1 tokens and left out"
        ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("layout: pair", "layout 'pair' is unknown; did you mean 'pairs'?"),
        ("layout: img2dataset", "valid: messages, pairs, text"),
        ("layout: pairs, prompt: what?", "prompt: what?}: expected ',' or '}', but got '?'; put texts in quotes"),
        ("prompt: 'what?'", "prompt ('what?') has no effect on layout messages; leave it out, or set layout to pairs"),
        ("layout: text, use_audio_in_video: true", "use_audio_in_video (True) has no effect on layout text"),
        ("text_field: caption", "set layout to pairs or text"),
        ("layuot: pairs", "did you mean 'mixture.*.layout'"),
    ],
)
def test_wrong_values_of_a_source_are_named_with_their_fix(values: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load("s2_general", [f"+mixture.more={{shards: [x/*.tar], weight: 1, {values}}}"])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_command_indexes_and_checks_a_layout(tmp_path: Path, tokenizer: Path, capsys) -> None:
    folder = write_img2dataset(tmp_path / "laion", (4,))
    asked = ["--layout", "pairs", "--prompt", "what is it?"]
    assert cli.main(["data", "index", str(folder), "--tokenizer", str(tokenizer)]) == 2
    assert "000000000" in (error := capsys.readouterr().err) and "set layout: pairs" in error
    assert cli.main(["data", "index", str(folder), "--tokenizer", str(tokenizer), *asked]) == 0
    assert cli.main(["data", "check", str(folder), *asked]) == 0
    assert capsys.readouterr().out == "1 shards indexed\n1 shards, 3 samples: whole and as indexed\n"
    assert cli.main(["data", "check", str(folder), "--layout", "pairs"]) == 2
    assert "index is missing; run `omni-train data index" in (error := capsys.readouterr().err)
    assert "with the layout options of its source" in error
    assert cli.main(["data", "check", str(folder), "--layout", "pair"]) == 2
    assert "did you mean 'pairs'?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["data", "index", "--help"])
    text = capsys.readouterr().out
    assert "--layout pairs" in text and "as img2dataset writes them" in text and "--text-field transcript" in text
