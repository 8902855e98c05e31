"""Bad input: each kind gives the right result, or one error with shard, key and offset that stops no other sample.

A case goes the whole way: written into a shard between two good samples, indexed, read, encoded, collated.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import torch
import webdataset
from clips import on_its_side, video
from PIL import Image

from omni_train.config import ConfigError, RunConfig, ShardsConfig, SourceConfig, load
from omni_train.data.bad_samples import BadSampleLog, SampleCount, num_allowed
from omni_train.data.chatml import Describe
from omni_train.data.contracts import BadSample, DocumentPlan, Pack, PackPlan
from omni_train.data.encode import Encoder
from omni_train.data.index import build_index, check_bad_samples, ensure_index, index_path
from omni_train.data.layouts import MESSAGES
from omni_train.data.loader import PackReader
from omni_train.data.media_tokens import MediaGeometry
from omni_train.data.mixture import OutOfData
from omni_train.data.pipeline import DataPipeline, PackBuilder
from omni_train.data.shard import DataError
from omni_train.data.tokenizer import fingerprint, load_tokenizer, train_tokenizer
from omni_train.engine.parallel import Ranks
from omni_train.evaluation.capabilities import read_all, split_tasks
from omni_train.evaluation.speech import clip_of
from omni_train.run import check_inputs
from omni_train.train import Trainer

GEOMETRY = MediaGeometry(
    patch_size=8, min_pixels=256, max_pixels=16_384, video_min_pixels=1_024, video_max_pixels=4_096, video_fps=4.0
)
RNG = np.random.default_rng(0)

# ---------------------------------------------------------------------------------------------------- members


def chat(kind: str, name: str, data: bytes, **part: Any) -> dict[str, bytes]:
    """A question on one medium and its answer."""
    question = [{"type": kind, kind: name, **part}, {"type": "text", "text": "what?"}]
    return content(messages=[{"role": "user", "content": question}, {"role": "assistant", "content": "a cat"}]) | {
        name: data
    }


def content(**values: Any) -> dict[str, bytes]:
    return {"json": json.dumps(values).encode()}


def turns(*messages: Any) -> dict[str, bytes]:
    return content(messages=list(messages))


def sound(num_samples: int, rate: int = 16_000, kind: str = "WAV", channels: int = 1, **options: Any) -> bytes:
    wave = (RNG.standard_normal((num_samples, channels)) * 0.1).astype(np.float32)
    out = io.BytesIO()
    soundfile.write(out, wave, rate, format=kind, **options)
    return out.getvalue()


def sound_with(value: float) -> bytes:
    wave = np.zeros(4_000, np.float32)
    wave[2_000] = value
    out = io.BytesIO()
    soundfile.write(out, wave, 16_000, format="WAV", subtype="FLOAT")
    return out.getvalue()


def picture(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def noise(width: int = 64, height: int = 48, mode: str = "RGB") -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


def white(mode: str, size: tuple[int, int] = (32, 32)) -> Image.Image:
    return Image.new("RGB", size, "white").convert(mode)


def sixteen_bit() -> bytes:
    return picture(Image.fromarray(np.full((32, 32), 65_535, np.uint16)))


def clear_palette() -> bytes:
    image = Image.new("P", (32, 32))
    image.putpalette([0, 0, 0, 9, 9, 9])
    return picture(image, transparency=0)


def animation(kind: str) -> bytes:
    """White, then black."""
    return picture(white("RGB"), kind, save_all=True, append_images=[Image.new("RGB", (32, 32))], duration=100)


def turned_exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def cut(data: bytes, part: float = 0.6) -> bytes:
    return data[: int(len(data) * part)]


def garbled(data: bytes, start: float = 0.5, stop: float = 0.9) -> bytes:
    """The bytes with zeros in place of a stretch."""
    first, last = int(len(data) * start), int(len(data) * stop)
    return data[:first] + bytes(last - first) + data[last:]


def spoilt(data: bytes, box: bytes, offset: int) -> bytes:
    """The bytes with one of them set to 255, that many behind the start of a box's name."""
    at = data.index(box) + offset
    return data[:at] + b"\xff" + data[at + 1 :]


def header_first(data: bytes, folder: Path) -> bytes:
    """An mp4 with its table of frames before its frames, as for the web."""
    path = folder / "fast.mp4"
    with av.open(io.BytesIO(data)) as source, av.open(str(path), "w", options={"movflags": "faststart"}) as target:
        streams = [target.add_stream_from_template(stream) for stream in source.streams]
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                target.mux(packet)
    return path.read_bytes()


def sound_only() -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16_000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return out.getvalue()


def no_frames() -> bytes:
    """A video stream of an mp4 without a single frame."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    return out.getvalue()


TEN_HZ = [n / 10 for n in range(20)]
LISTENED = {"use_audio_in_video": True}

# ---------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Refused:
    """One error: ``at`` "index" (its header or text tells) or "decode" (only its body does)."""

    message: str
    at: str = "index"


@dataclass(frozen=True)
class Right:
    """A document for which ``check(pack)`` holds; the pack holds nothing else."""

    check: Callable[[Pack], bool]


def frames(number: int) -> Right:
    return Right(lambda pack: pack.mel.shape == (128, number) and bool(pack.mel.isfinite().all()))


def grid(height: int, width: int) -> Right:
    return Right(lambda pack: pack.image_grid_thw.tolist() == [[1, height, width]])


ALL_WHITE = Right(lambda pack: len(pack.pixel_values) > 0 and bool((pack.pixel_values > 0.98).all()))


def seen(*greys: float, heard: int = 0) -> Right:
    """A film of ``clips.grey`` frames (20 + 10 n): the mean of each grid's two frames, and with ``heard`` mel frames of
    sound, the first of which are no silence."""

    def check(pack: Pack) -> bool:
        ((grids, *_),) = pack.video_grid_thw.tolist()
        found = (pack.pixel_values_videos.reshape(grids, -1).mean(-1) + 1) * 127.5
        is_heard = pack.mel.shape[1] == heard and (not heard or float(pack.mel[:, :10].max()) > 0)
        is_seen = found.tolist() == pytest.approx(list(greys), abs=2)
        return is_seen and is_heard and bool((pack.shift_labels != -100).any())

    return Right(check)


NO_LABEL = Right(lambda pack: pack.num_tokens > 1 and bool((pack.shift_labels == -100).all()))
READ = Right(lambda pack: bool((pack.shift_labels != -100).any()))

CASES: dict[str, tuple[Any, Refused | Right]] = {
    # audio
    "audio of 0 samples": (
        chat("audio", "a.wav", sound(0)),
        Refused("member 'a.wav': audio of 0 samples at 16,000 Hz"),
    ),
    "audio of 200 samples": (chat("audio", "a.wav", sound(200)), Refused("at least 12.6 ms are needed")),
    "audio of 0 bytes": (chat("audio", "a.flac", b""), Refused("member 'a.flac': audio is empty")),
    "NaN audio": (chat("audio", "a.wav", sound_with(np.nan)), Refused("'a.wav': audio holds NaN", "decode")),
    "infinite audio": (chat("audio", "a.wav", sound_with(np.inf)), Refused("audio holds NaN or infinite", "decode")),
    "silent audio": (chat("audio", "a.wav", sound_with(0.0)), frames(25)),
    "stereo at 44.1 kHz": (chat("audio", "a.wav", sound(44_100, 44_100, channels=2)), frames(100)),
    "8 kHz, 8 bit": (chat("audio", "a.wav", sound(4_000, 8_000, subtype="PCM_U8")), frames(50)),
    "mp3 called wav": (chat("audio", "a.wav", sound(16_000, kind="MP3")), frames(100)),
    "wav cut short": (
        chat("audio", "a.wav", cut(sound(16_000))),
        Refused("audio is cut short: its header says 32,000"),
    ),
    "wav of unknown size": (
        chat("audio", "a.wav", (s := sound(16_000))[:40] + b"\xff\xff\xff\xff" + s[44:]),
        frames(100),
    ),
    "flac cut short": (
        chat("audio", "a.flac", cut(sound(16_000, kind="FLAC"))),
        Refused("cannot decode audio", "decode"),
    ),
    "mp3 cut short": (chat("audio", "a.mp3", cut(sound(16_000, kind="MP3"))), Refused("audio is cut short", "decode")),
    "a page called flac": (chat("audio", "a.flac", b"<html>404</html>"), Refused("cannot read audio of 16 bytes")),
    # pictures
    "1 pixel": (chat("image", "i.png", picture(white("RGB", (1, 1)))), ALL_WHITE),
    "20,000 × 100 pixels": (chat("image", "i.png", picture(white("1", (20_000, 100)))), ALL_WHITE),
    "20,000 × 20,000 pixels": (
        chat("image", "i.png", picture(Image.new("1", (20_000, 20_000)))),
        Refused("'i.png': picture is too large: Image size .400000000 pixels"),
    ),
    "401 × 2 pixels": (chat("image", "i.png", picture(white("L", (401, 2)))), Refused("401×2 pixels is too long")),
    "CMYK": (chat("image", "i.jpg", picture(white("CMYK"), "JPEG")), ALL_WHITE),
    "1 bit": (chat("image", "i.png", picture(white("1"))), ALL_WHITE),
    "grey and alpha": (chat("image", "i.png", picture(Image.new("LA", (32, 32), (0, 0)))), ALL_WHITE),
    "palette, transparent": (chat("image", "i.png", clear_palette()), ALL_WHITE),
    "16 bit": (chat("image", "i.png", sixteen_bit()), ALL_WHITE),
    "animated webp": (chat("image", "i.webp", animation("WEBP")), ALL_WHITE),
    "gif called jpg": (chat("image", "i.jpg", animation("GIF")), ALL_WHITE),
    "EXIF rotation": (chat("image", "i.jpg", picture(noise(64, 32), "JPEG", exif=turned_exif())), grid(8, 4)),
    "progressive jpeg": (chat("image", "i.jpg", picture(white("RGB"), "JPEG", progressive=True)), ALL_WHITE),
    "jpeg cut short": (
        chat("image", "i.jpg", cut(picture(noise(), "JPEG"))),
        Refused("member 'i.jpg': cannot decode picture of .* truncated", "decode"),
    ),
    "png cut short": (
        chat("image", "i.png", cut(picture(noise()))),
        Refused("cannot read picture: image file is trunc"),
    ),
    "webp cut short": (chat("image", "i.webp", cut(picture(noise(), "WEBP"))), Refused("cannot read picture of")),
    "avif without its picture": (
        chat("image", "i.jpg", spoilt(picture(noise(), "AVIF"), b"pitm", 8)),
        Refused("member 'i.jpg': cannot read picture of .* Missing or empty image item"),
    ),
    "avif with a broken body": (
        chat("image", "i.avif", spoilt(picture(noise(), "AVIF"), b"mdat", 4)),
        Refused("member 'i.avif': cannot decode picture of .* color planes", "decode"),
    ),
    "floating-point tiff": (chat("image", "i.tiff", picture(white("F"), "TIFF")), Refused("floating-point", "decode")),
    "PostScript called jpg": (
        chat("image", "i.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"),
        Refused("cannot read picture of 63 bytes"),
    ),
    "picture of 0 bytes": (chat("image", "i.png", b""), Refused("picture is empty")),
    # videos
    "variable frame rate": (
        chat("video", "v.mp4", video([0.0, 1.5, 1.6, 1.7], seconds=2.0)),
        seen(20, 20),  # the first stays for 1.5 of 1.7 s
    ),
    "a single frame": (chat("video", "v.mp4", video([0.0], seconds=0.04)), seen(20)),
    "no frame": (chat("video", "v.mp4", no_frames()), Refused("member 'v.mp4': ")),
    "sound longer than the pictures": (
        chat("video", "v.mp4", video(TEN_HZ, 64_000), **LISTENED),
        seen(45, 95, 150, 200, heard=400),
    ),
    "sound shorter than the pictures": (
        chat("video", "v.mp4", video(TEN_HZ, 4_000), **LISTENED),
        seen(45, 95, 150, 200, heard=25),
    ),
    "silent, heard": (
        chat("video", "v.mp4", video(TEN_HZ), **LISTENED),
        Refused("the video has no sound, but its part says use_audio_in_video"),
    ),
    "silent, not heard": (chat("video", "v.mp4", video(TEN_HZ)), seen(45, 95, 150, 200)),
    "sound without pictures": (chat("video", "v.mp4", sound_only()), Refused("the file has no video stream")),
    "phone held upright": (
        chat("video", "v.mp4", on_its_side(video(TEN_HZ, size=(64, 32)))),
        Right(lambda pack: pack.video_grid_thw[0, 1:].tolist() == [8, 4]),
    ),
    "mp4 cut short": (chat("video", "v.mp4", cut(video(TEN_HZ))), Refused("video is cut short: its box 'm")),
    "mp4 for the web cut short": (
        lambda folder: chat("video", "v.mp4", cut(header_first(video(TEN_HZ), folder), 0.9)),
        Refused("video is cut short: its box 'mdat'"),
    ),
    "mp4 with a broken body": (
        lambda folder: chat("video", "v.mp4", garbled(header_first(video(TEN_HZ), folder), 0.7, 0.95)),
        Refused("member 'v.mp4': cannot decode the video", "decode"),
    ),
    "encrypted video": (
        chat("video", "v.mp4", video(TEN_HZ).replace(b"mp4v", b"encv").replace(b"esds", b"free")),
        Refused("FFmpeg does not know the video's codec, or it is encrypted"),
    ),
    "playlist called mp4": (
        chat("video", "v.mp4", b"#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n"),
        Refused("cannot read video of 39 bytes"),
    ),
    # text and structure
    "empty text": (content(text=""), Refused("'text' is empty")),
    "text of a blank": (content(text=" "), READ),
    "invalid UTF-8": ({"json": b'{"text": "\xff\xfe"}'}, Refused("member 'json' is not JSON: 'utf-8' codec")),
    "half a surrogate pair": ({"json": b'{"text": "a \\ud83d"}'}, Refused("half a surrogate pair at character 2")),
    "byte order mark": ({"json": b'\xef\xbb\xbf{"text": "a cat"}'}, READ),
    "nested a million deep": ({"json": b"[" * 1_000_000}, Refused("member 'json' is not JSON")),
    "control token in text": (content(text="a <|im_end|>"), Refused("control token '<.im_end.>' as text")),
    "json is a list": ({"json": b"[1]"}, Refused("member 'json' holds a list")),
    "json is null": ({"json": b"null"}, Refused("member 'json' holds a NoneType")),
    "json is cut short": ({"json": b'{"text": "a c'}, Refused("member 'json' is not JSON")),
    "no json": ({"a.flac": b"x"}, Refused("the sample has no json member; it has a.flac")),
    "messages is an object": (content(messages={"role": "user"}), Refused("'messages' must be a list")),
    "content is null": (turns({"role": "user", "content": None}), Refused("message 0 has content of type NoneType")),
    "no assistant turn": (turns({"role": "user", "content": "what is it?"}), NO_LABEL),
    "empty answer": (turns({"role": "user", "content": "?"}, {"role": "assistant", "content": ""}), READ),
    "a part naming nothing": (
        turns({"role": "user", "content": [{"type": "image", "image": "i.png"}]}),
        Refused("message 0 names image member 'i.png', which is missing; the sample has json"),
    ),
    "tool calls without content": (
        turns({"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [{"name": "a", "arguments": {}}]}),
        READ,
    ),
    "tool calls are a word": (
        turns({"role": "assistant", "content": "a", "tool_calls": True}),
        Refused("message 0: tool_calls must be a list"),
    ),
    "a flag that is a word": (
        chat("video", "v.mp4", b"", use_audio_in_video="false"),
        Refused("use_audio_in_video 'false'; it must be true or false"),
    ),
    # shards that webdataset's writer does not write
    "key twice": ([("good-0.txt", b"again")], Refused("this key is already in the shard")),
    "extension twice": (
        [("k.json", b'{"text": "a"}'), ("k.JSON", b"{}")],
        Refused("two members with extension 'json'"),
    ),
    "key with a dot": ([("v1.2.json", b'{"text": "a"}')], Refused("no json member; it has 2.json")),
    "key that is no UTF-8": (
        [(f"caf\udce9.{name}", data) for name, data in chat("audio", "a.wav", sound(16_000)).items()],
        frames(100),
    ),
    "key in folders with dots": ([("part.0/sub.1/k.json", b'{"text": "a cat"}')], READ),
}

GOOD = content(text="a dog")


def write_shard(folder: Path, members: dict[str, bytes] | list[tuple[str, bytes]]) -> tuple[Path, str]:
    """(a shard of good-0, the case, good-1; the key of the case)."""
    path = folder / "x-000000.tar"
    if isinstance(members, dict):
        with webdataset.ShardWriter(str(folder / "x-%06d.tar"), maxcount=9, verbose=0, mtime=0) as writer:
            for key, sample in (("good-0", GOOD), ("k", members), ("good-1", GOOD)):
                writer.write({"__key__": key, **sample})
        return path, "k"
    with tarfile.open(path, "w") as tar:
        for name, data in [
            ("good-0.json", GOOD["json"]),
            ("x.json", GOOD["json"]),
            *members,
            ("good-1.json", GOOD["json"]),
        ]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    folder_name, _, name = members[0][0].rpartition("/")
    return path, f"{folder_name}/{name.split('.')[0]}".lstrip("/")


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["user\nassistant\nwhat? a cat, a dog\n"] * 8, 350, out)
    return out


@pytest.fixture(scope="module")
def encoder(tokenizer_folder) -> Encoder:
    return Encoder(load_tokenizer(tokenizer_folder), GEOMETRY)


def pack_of(shard: Path, index: Any, encoder: Encoder, chosen: list[int]) -> Pack:
    lengths = [encoder.num_tokens(facts) for facts in index.samples]
    plan = PackPlan(0, 0, 0, [DocumentPlan("s", 0, n, 0, lengths[n]) for n in chosen])
    return PackBuilder(PackReader({"s": [(shard, index)]}, {"s": MESSAGES}), encoder, (8, 8), 0)(plan)


def test_the_table_is_long_enough():
    assert len(CASES) >= 60


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name, tmp_path, tokenizer_folder, encoder):
    members, expected = CASES[name]
    shard, key = write_shard(tmp_path, members(tmp_path) if callable(members) else members)
    index = build_index(shard, Describe(tokenizer_folder), "t")
    keys = [facts.key for facts in index.samples]
    if isinstance(expected, Refused) and expected.at == "index":
        assert {"good-0", "good-1"} <= set(keys) and len(index.bad) == 1
        offset = index.bad[0].offset
        with pytest.raises(DataError, match=expected.message) as caught:
            check_bad_samples([index], 0)
        check_bad_samples([index], 1)
        assert (caught.value.shard, caught.value.key, caught.value.offset) == (str(shard), key, offset)
        assert f"{shard}: sample '{key}': byte {offset:,}: " in str(caught.value) and "\n" not in str(caught.value)
        name_at_offset = tarfile.TarInfo.frombuf(shard.read_bytes()[offset : offset + 512], "utf-8", "strict").name
        assert name_at_offset.startswith(f"{key}.")
        return
    assert index.bad == []
    place = index.samples[keys.index(key)]
    good = [keys.index("good-0"), keys.index("good-1")]
    pack = pack_of(shard, index, encoder, [good[0], keys.index(key), good[1]])
    if isinstance(expected, Refused):
        (bad,) = pack.bad_samples
        assert (bad.shard, bad.key, bad.offset) == (str(shard), key, place.offset)
        with pytest.raises(DataError, match=expected.message):
            BadSampleLog(tmp_path / "b.jsonl", [], 0).add(1, [bad], True)
        without = pack_of(shard, index, encoder, good)
        assert pack.sample_ids == without.sample_ids and pack.input_ids.equal(without.input_ids)
        assert pack.mel.numel() == pack.pixel_values.numel() == pack.pixel_values_videos.numel() == 0
        alone = pack_of(shard, index, encoder, [keys.index(key)])
        assert alone.sample_ids == [] and alone.bad_samples == [bad]
    else:
        assert pack.bad_samples == [] and len(pack.sample_ids) == 3
        assert expected.check(pack_of(shard, index, encoder, [keys.index(key)]))


def test_a_caption_over_the_context_is_left_out_of_the_plan_and_a_text_is_cut(tmp_path, config):
    long = "a cat " * 100
    write(tmp_path, [content(text=long), captioned(long), captioned("a cat")])
    config.stage.context, config.mixture["s"].max_epochs = 96, 1.0
    with DataPipeline.of(config).loader(0, 1) as loader:
        packs = drain(loader)
        assert loader.planner.stats()["sources"]["s"]["left_out"] == 1
    names = [name for step in packs for pack in step for name in pack.sample_ids]
    assert names.count("s/x-000000.tar/k00") > 1 and names.count("s/x-000000.tar/k02") == 1
    assert "s/x-000000.tar/k01" not in names


# ---------------------------------------------------------------------------------------------------- the budget


def captioned(answer: str) -> dict[str, bytes]:
    members = chat("image", "i.png", picture(white("RGB")))
    return members | {"json": members["json"].replace(b"a cat", answer.encode())}


def heard(data: bytes) -> dict[str, bytes]:
    return chat("audio", "a.flac", data)


def write(folder: Path, samples: list[dict[str, bytes]]) -> Path:
    with webdataset.ShardWriter(str(folder / "x-%06d.tar"), maxcount=99, verbose=0, mtime=0) as writer:
        for number, members in enumerate(samples):
            writer.write({"__key__": f"k{number:02d}", **members})
    return folder / "x-000000.tar"


@pytest.fixture
def config(tmp_path, tokenizer_folder) -> RunConfig:
    found = load("s2_general", ["engine=cpu1", "data.lanes=4", f"data.root={tmp_path}"])
    found.data.tokenizer = str(tokenizer_folder)
    found.mixture = {"s": SourceConfig(shards=["x-*.tar"], weight=1.0, max_epochs=2.0)}
    found.validation = {}
    found.stage.context = 128
    return found


def drain(loader: Any) -> list[list[Pack]]:
    steps = []
    try:
        while True:
            steps.append(loader.next_step())
    except OutOfData:
        return steps


def test_under_a_launcher_a_missing_index_is_an_error_instead_of_a_wait(tmp_path, config):
    shard = write(tmp_path, [GOOD])
    with pytest.raises(DataError, match="the index is missing; run `omni-train data index"):
        check_inputs(config, is_launched=True)
    assert not Path(index_path(shard)).exists()
    check_inputs(config)
    check_inputs(config, is_launched=True)
    build = Path(index_path(shard))
    build.write_text(build.read_text().replace(fingerprint(load_tokenizer(Path(config.data.tokenizer))), "another"))
    check_inputs(config)
    with pytest.raises(DataError, match="was made with tokenizer 'another'"):
        check_inputs(config, is_launched=True)


def test_a_held_out_source_of_which_nothing_fits_is_told_before_the_training(tmp_path, config):
    write(tmp_path, [GOOD])
    (tmp_path / "held").mkdir()
    write(tmp_path / "held", [captioned("a cat " * 100)])
    config.validation = {"films": ShardsConfig(shards=["held/*.tar"])}
    with pytest.raises(ValueError, match="held-out source 'films' has no sample that fits stage.context .128 tokens"):
        Trainer(config, Ranks(0, 1, 0, torch.device("cpu")))


def test_indexing_stops_at_the_budget_and_goes_on_within_it(tmp_path, config):
    shard = write(tmp_path, [GOOD, heard(b""), *[GOOD] * 20, heard(b"?")])
    for budget, allowed in ((0, 0), (1, 1), (0.08, 1)):  # a share of 23 samples
        config.data.max_bad_samples = budget
        with pytest.raises(DataError, match=rf"bad samples, {allowed} allowed by data.max_bad_samples") as caught:
            check_inputs(config)
        assert (caught.value.shard, caught.value.key) == (str(shard), ["k01", "k22"][allowed])
        assert "byte " in str(caught.value) and "mend the sample, or remove it from the shard" in str(caught.value)
    assert Path(index_path(shard)).exists(), "what is bad does not hang on the budget, so the pass is not repeated"
    for budget in (2, 0.09):
        config.data.max_bad_samples = budget
        check_inputs(config)
        data = DataPipeline.of(config)
        with data.loader(0, 1) as loader:
            names = {name for step in drain(loader) for pack in step for name in pack.sample_ids}
        assert len(names) == 21 and not {name for name in names if name.endswith(("k01", "k22"))}
        log = data.bad_sample_log(tmp_path / "run" / "bad_samples.jsonl")
        log.start(0, is_writer=True)
        lines = [json.loads(line) for line in log.path.read_text().splitlines()]
        assert [(line["step"], line["key"], line["shard"]) for line in lines] == [
            (0, "k01", str(shard)),
            (0, "k22", str(shard)),
        ]
        assert lines[0]["offset"] == 1024 and "audio is empty" in lines[0]["error"] and log.count == 2


def decode_corpus(folder: Path, is_broken: bool) -> list[dict[str, bytes]]:
    """12 clips and 12 texts; clips 3 and 7 have a broken body behind a good header if asked for."""
    clips = [sound(3_200 + 160 * n, kind="FLAC") for n in range(12)]
    if is_broken:
        clips = [garbled(clip, 0.4, 0.9) if n in (3, 7) else clip for n, clip in enumerate(clips)]
    return [sample for clip in clips for sample in (heard(clip), GOOD)]


def run_all(config: RunConfig, world: int, num_workers: int = 0) -> tuple[list, list, dict]:
    """(sample ids a step, bad keys a step, last state) of a run on ``world`` ranks."""
    config.data.num_workers, config.stage.context = num_workers, 64
    steps: list[list[Pack]] = []
    for rank in range(world):
        with DataPipeline.of(config).loader(rank, world) as loader:
            for number, packs in enumerate(drain(loader)):
                steps += [[]] if number == len(steps) else []
                steps[number] += packs
            state = loader.state_dict()
    ids = [sorted(name for pack in packs for name in pack.sample_ids) for packs in steps]
    return ids, [sorted(bad.key for pack in packs for bad in pack.bad_samples) for packs in steps], state


def test_a_sample_that_cannot_be_decoded_changes_no_plan_and_no_other_sample(tmp_path, config):
    global RNG
    for is_broken in (False, True):
        RNG = np.random.default_rng(1)
        shard = write(tmp_path, decode_corpus(tmp_path, is_broken))
        Path(index_path(shard)).unlink(missing_ok=True)
        if not is_broken:
            whole, none, whole_state = run_all(config, 1)
            assert not any(none)
    found, bad, state = run_all(config, 1)
    assert state == whole_state and len(found) == len(whole) >= 3
    assert sum(bad, []).count("k06") == sum(bad, []).count("k14") == 2 == len(sum(bad, [])) / 2  # two epochs
    for ours, missing, expected in zip(found, bad, whole, strict=True):
        assert sorted([*ours, *(f"s/x-000000.tar/{key}" for key in missing)]) == expected
    assert run_all(config, 2) == run_all(config, 3) == run_all(config, 2, num_workers=1) == (found, bad, state)


def test_a_measurement_leaves_out_what_cannot_be_decoded_and_stops_beyond_the_budget(tmp_path, config, caplog):
    """Of two tasks in one source; what the measurement does not ask for is not decoded either."""
    corpus = [sample for sample in decode_corpus(tmp_path, is_broken=True) if "a.flac" in sample]
    corpus = [{"json": b'{"task": "hear", "messages"' + own.pop("json")[11:], **own} for own in corpus]
    corpus[3]["json"] = corpus[3]["json"].replace(b"hear", b"else", 1)
    (tmp_path / "heldout" / "s").mkdir(parents=True)
    shard = write(tmp_path / "heldout" / "s", corpus)

    def measured(budget: float, *tasks: str) -> list[str]:
        config.data.max_bad_samples = budget
        found = split_tasks(DataPipeline.of(config), dict.fromkeys(tasks, "s"), "heldout")
        return [sample.key for samples in found.values() for sample in samples]

    assert measured(1, "hear") == [f"k{n:02d}" for n in range(12) if n not in (3, 7)]
    (line,) = [record.getMessage() for record in caplog.records]
    assert str(shard) in line and "'k07'" in line and "a.flac" in line
    with pytest.raises(DataError, match=r"sample 'k07': byte [\d,]+: .*a\.flac.*2 bad samples, 1 allowed"):
        measured(1, "hear", "else")


def test_a_measurement_of_speech_keeps_to_the_budget_too(tmp_path, config):
    """A codec's stage, whose samples are clips: the task's own, and those that the recogniser learns from."""
    (tmp_path / "heldout" / "s").mkdir(parents=True)
    corpus = [sample for sample in decode_corpus(tmp_path, is_broken=True) if "a.flac" in sample]
    for own in corpus:
        own["json"] = b'{"task": "talker", "messages"' + own["json"][11:]
    write(tmp_path / "heldout" / "s", corpus)
    found = load("codec", ["engine=cpu1", f"data.root={tmp_path}", "data.max_bad_samples=2"])
    found.data.tokenizer, found.mixture = (
        config.data.tokenizer,
        {"s": SourceConfig(shards=["heldout/s/*.tar"], weight=1.0)},
    )
    data, tasks = DataPipeline.of(found), {"talker": "s"}
    expected = [f"k{n:02d}" for n in range(12) if n not in (3, 7)]
    assert [sample.key for sample in split_tasks(data, tasks, "heldout", clip_of)["talker"]] == expected
    assert [sample.key for sample in read_all(data, "s", found.mixture["s"], clip_of)] == expected
    found.data.max_bad_samples = 1
    with pytest.raises(DataError, match="sample 'k07': byte .*2 bad samples, 1 allowed"):
        split_tasks(data, tasks, "heldout", clip_of)


def test_an_index_of_another_shard_stops_at_once_with_its_place(tmp_path, config):
    shard = write(tmp_path, [GOOD] * 4)
    data = DataPipeline.of(config)
    ((_, index),) = data.indexed(config.mixture["s"])
    index.samples[1].num_text_tokens += 1
    with pytest.raises(DataError, match="sample 'k01': byte 1,024: token range 0–. does not lie in its . tokens"):
        pack_of(shard, index, data.encoder, [0, 1])


BAD = [BadSample("s.tar", key, 512 * n, "broken") for n, key in enumerate("abcd")]


def test_the_log_counts_a_sample_once_and_is_free_of_the_order_of_ranks(tmp_path):
    texts = []
    for number, found in enumerate(([BAD[1], BAD[2]], [BAD[2], BAD[1]])):
        log = BadSampleLog(tmp_path / f"{number}.jsonl", BAD[:1], 3)
        log.start(0, is_writer=True)
        log.add(4, found, is_writer=True)
        log.add(9, found, is_writer=True)
        assert log.count == 3
        texts.append(log.path.read_text())
    assert texts[0] == texts[1]
    lines = [json.loads(line) for line in texts[0].splitlines()]
    assert lines == [{"step": step} | asdict(bad) for step, bad in zip((0, 4, 4), BAD[:3], strict=True)]
    with pytest.raises(
        DataError, match=r"s\.tar: sample 'd': byte 1,536: broken; mend .*4 bad samples, 3 allowed .*1\.jsonl"
    ):
        log.add(10, BAD[3:], is_writer=True)
    assert '"d"' in log.path.read_text(), "the one too many is written down too"


def test_two_samples_of_one_key_are_two(tmp_path):
    """The second has a key that is already in the shard; the first cannot be decoded."""
    log = BadSampleLog(tmp_path / "bad_samples.jsonl", [BadSample("s.tar", "k", 1024, "twice")], 1)
    with pytest.raises(DataError, match="s.tar: sample 'k': byte 0: broken.*2 bad samples, 1 allowed"):
        log.add(3, [BadSample("s.tar", "k", 0, "broken")], is_writer=True)


def test_a_resumed_log_is_the_straight_one(tmp_path):
    def new():
        return BadSampleLog(tmp_path / "bad_samples.jsonl", [], 9)

    straight = new()
    straight.start(0, is_writer=True)
    assert not straight.path.exists(), "a run without bad samples has no file"
    straight.add(2, BAD[:1], is_writer=True)
    straight.add(5, BAD[1:3], is_writer=True)
    text = straight.path.read_text()
    with open(straight.path, "a") as file:
        file.write('{"step": 6, "sha')  # killed while it wrote
    for rank_is_main in (False, True):
        resumed = new()
        resumed.start(4, is_writer=rank_is_main)
        assert resumed.count == 1
    resumed.add(5, BAD[1:3], is_writer=True)
    assert resumed.path.read_text() == text and resumed.count == straight.count == 3
    fresh = new()
    fresh.start(0, is_writer=True)
    assert fresh.count == 0 and not fresh.path.exists()


def test_the_budget_is_a_number_or_a_share():
    assert [num_allowed(value, 1_000) for value in (0, 0.001, 0.0999, 1, 7)] == [0, 1, 99, 1, 7]
    for value in (-1, 1.5, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="data.max_bad_samples .* must be a whole number of samples, or a share"):
            load("s2_general", [f"data.max_bad_samples={value}"])


def test_a_shard_read_in_two_layouts_counts_once():
    total = SampleCount()
    for bad in (BAD[:2], BAD[1:3]):
        total.add("s.tar", 10, bad)
    total.add("t.tar", 10, [])
    assert total.bad == BAD[:3] and total.allowed(0.16) == 3
    total.check(0.16)
    with pytest.raises(DataError, match="sample 'c': .*3 bad samples, 2 allowed"):
        total.check(2)


def test_the_budget_is_one_for_all_sources_of_a_run(tmp_path, config):
    write(tmp_path, [GOOD, content(text="")])
    config.mixture["t"] = SourceConfig(shards=["x-*.tar"], weight=1.0, layout="text", text_field="text")
    check = replace(config.data, max_bad_samples=1)
    for config.data in (replace(check, max_bad_samples=0), replace(check, max_bad_samples=0.49)):
        with pytest.raises(DataError, match=r"sample 'k01': .*1 bad sample, 0 allowed"):
            check_inputs(config)
    for config.data in (check, replace(check, max_bad_samples=0.5)):
        check_inputs(config)
        data = DataPipeline.of(config)
        for source in config.mixture.values():
            data.indexed(source)
        assert data.bad_sample_log(tmp_path / "b.jsonl").count == 1


def test_indexes_found_before_count_too(tmp_path, tokenizer_folder):
    shard = write(tmp_path, [GOOD, content(text="")])
    describe = Describe(tokenizer_folder)
    assert len(ensure_index([shard], describe, "t")[0].bad) == 1
    with pytest.raises(DataError, match="sample 'k01': byte 1,024: 'text' is empty"):
        ensure_index([shard], describe, "t", max_bad_samples=0)
