"""Files of rows: both forms of media give one sample, JSON lines and Parquet alike, and what is wrong is named."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image
from support import tokenizer_folder

from omni_train.config import LayoutConfig
from omni_train.data import rows
from omni_train.data.chatml import Describe, render
from omni_train.data.contracts import DocumentPlan
from omni_train.data.index import build_index, check_shard, ensure_index
from omni_train.data.layouts import read_content
from omni_train.data.loader import PackReader
from omni_train.data.rows import read_members, row_members, scan_samples
from omni_train.data.shard import DataError, SampleError

parquet = pytest.importorskip("pyarrow.parquet")
import pyarrow  # noqa: E402


def picture(colour: str) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "media").mkdir()
    for colour in ("red", "blue"):
        (tmp_path / "media" / f"{colour}.png").write_bytes(picture(colour))
    return tmp_path


RED, BLUE = "media/red.png", "media/blue.png"
PLACEHOLDERS = {
    "messages": [
        {"role": "user", "content": "<image>or <image>?"},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "yes"},
    ],
    "images": [RED, BLUE],
    "task": "colour",
}
QUESTION = [{"type": "image"}, {"type": "text", "text": "or "}, {"type": "image"}, {"type": "text", "text": "?"}]
EMPTY_PARTS = {**PLACEHOLDERS, "messages": [{"role": "user", "content": QUESTION}, *PLACEHOLDERS["messages"][1:]]}


def named(part, path):
    return {**part, "image": path} if part["type"] == "image" else part


NAMED_PARTS = {
    "messages": [
        {"role": "user", "content": [named(QUESTION[0], RED), QUESTION[1], named(QUESTION[2], BLUE), QUESTION[3]]},
        *PLACEHOLDERS["messages"][1:],
    ],
    "task": "colour",
}
URL_PARTS = {
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": RED}, "text": None},
                {"type": "text", "text": "or ", "image_url": None},
                {"type": "image_url", "image_url": {"url": BLUE}, "text": None},
                {"type": "text", "text": "?", "image_url": None},
            ],
        },
        *PLACEHOLDERS["messages"][1:],
    ],
    "task": "colour",
}
SHAREGPT_ROLES = {
    **PLACEHOLDERS,
    "messages": [
        {"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]}
        for m in PLACEHOLDERS["messages"]
    ],
}
FORMS = {
    "placeholders": PLACEHOLDERS,
    "empty_parts": EMPTY_PARTS,
    "named_parts": NAMED_PARTS,
    "urls": URL_PARTS,
    "other_role_names": SHAREGPT_ROLES,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_sample(form, folder):
    members = row_members(FORMS[form], folder)
    content = read_content(members, LayoutConfig())
    assert content["task"] == "colour"
    pieces = [(piece.text, piece.has_loss, piece.media) for piece in render(content)]
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert pieces == [
        ("<|im_start|>user\n", False, None),
        (image, False, RED),
        ("or ", False, None),
        (image, False, BLUE),
        ("?<|im_end|>\n<|im_start|>assistant\n", False, None),
        ("red<|im_end|>", True, None),
        ("\n<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\n", False, None),
        ("yes<|im_end|>", True, None),
        ("\n", False, None),
    ]
    assert members[RED] == picture("red") and members[BLUE] == picture("blue")


def test_bytes_in_the_row_need_no_file(folder):
    row = {**PLACEHOLDERS, "images": [{"bytes": picture("red"), "path": None}, {"bytes": picture("blue"), "path": "b"}]}
    members = row_members(row, folder / "elsewhere")
    assert sorted(members) == ["images/0", "images/1", "json"]
    assert members["images/1"] == picture("blue")


def test_tools_reasoning_and_system_turns_come_along(folder):
    tools = [{"type": "function", "function": {"name": "add"}}]
    row = {
        "system": "be brief",
        "tools": json.dumps(tools),
        "messages": [
            {"role": "user", "content": "1 + 1?"},
            {"role": "tool_call", "content": '{"name": "add", "arguments": {}}'},
            {"role": "tool_response", "content": "2"},
            {"role": "assistant", "content": "2", "reasoning_content": "easy"},
        ],
    }
    text = "".join(piece.text for piece in render(read_content(row_members(row, folder), LayoutConfig())))
    assert text.startswith("<|im_start|>system\nbe brief\n\n# Tools\n\n") and json.dumps(tools[0]) in text
    assert '<|im_start|>assistant\n<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call><|im_end|>\n' in text
    assert "<|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>\n" in text
    assert text.endswith("<|im_start|>assistant\n<think>\neasy\n</think>\n\n2<|im_end|>\n")


def write(folder, kind, rows):
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))  # empty lines are no rows
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


def rows_of(count):
    return [
        {"messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": f"number {n}"}],
         "images": [RED if n % 2 else BLUE]}
        for n in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_scan_index_and_reader_agree_on_every_row(kind, folder):
    path = write(folder, kind, rows_of(5))
    samples = list(scan_samples(path))
    assert [sample.error for sample in samples] == [""] * 5
    for number, sample in enumerate(samples):
        assert read_members(path, sample.offset, sample.size, sample.key) == sample.members
        assert json.loads(sample.members["json"])["messages"][1]["content"] == f"number {number}"
        assert sample.members[RED if number % 2 else BLUE] == picture("red" if number % 2 else "blue")
    (index,) = ensure_index([path], Describe(tokenizer_folder()), "f")
    assert index.num_samples == 5 and index.shard_bytes == path.stat().st_size
    assert [(m.kind, m.width, m.height) for m in index.samples[0].media] == [("image", 8, 8)]
    assert check_shard(path).num_samples == 5
    reader = PackReader({"mine": [(str(path), index)]}, {"mine": LayoutConfig()})
    sample = reader.read(DocumentPlan("mine", 0, 3, 0, 1))
    assert sample.id == f"mine/{path.name}/00000003" and sample.members[RED] == picture("red")


WRONG = [
    ({"images": [RED]}, "neither 'messages' nor 'text'; it has images"),
    ({"image": {"path": RED}, "text": "a cat"}, "the row has 'text' beside 'image', which a text has no place for"),
    ({"audios": [RED], "text": "a cat"}, "the row has 'text' beside 'audios'"),
    ({"messages": "hi"}, "'messages' is str"),
    ({"messages": ["hi"]}, "message 0 is str"),
    ({"messages": [{"role": "user", "content": "<image>"}]}, "message 0 asks for more of kind image than the 0"),
    (
        {"messages": [{"role": "user", "content": "<image><image>"}], "images": [RED]},
        "message 0 asks for more of kind image than the 1 in 'images'",
    ),
    (
        {"messages": [{"role": "user", "content": "hi"}], "audios": [RED]},
        "'audios' has 1, but the messages name 1 fewer; write <audio>",
    ),
    ({"messages": [{"role": "user", "content": "<image>"}], "images": ["no.png"]}, "image 'no.png' cannot be read"),
    (
        {"messages": [{"role": "user", "content": "<image>"}], "images": ["https://x/y.png"]},
        "is an address; media are read from local files only",
    ),
    ({"messages": [{"role": "user", "content": "<image>"}], "images": [3]}, "a medium of kind image is 3"),
    ({"messages": [{"role": "user", "content": ["hi"]}]}, "message 0 has a part that is str"),
]


@pytest.mark.parametrize("row, message", WRONG, ids=[message[:30] for _, message in WRONG])
def test_a_wrong_row_is_named_and_the_others_stay(row, message, folder):
    with pytest.raises(ValueError, match=message):
        row_members(row, folder)
    path = write(folder, "jsonl", [*rows_of(1), row, *rows_of(1)])
    index = build_index(path, Describe(tokenizer_folder()), "f")
    assert index.num_samples == 2 and [bad.key for bad in index.bad] == ["00000001"]
    assert message.split("'")[0].strip() in index.bad[0].error


def test_a_text_beside_columns_of_media_that_are_empty_is_a_text(folder):
    row = {"text": "a cat", "image": {"bytes": None, "path": None}, "audios": [None], "videos": [], "video": ""}
    assert row_members(row, folder) == {"json": b'{"text": "a cat"}'}


@pytest.mark.parametrize(("most", "most_bytes", "expected"), [(3, 1 << 20, 3), (2, 1 << 20, 9), (3, 1, 9)])
def test_row_groups_are_kept_up_to_a_number_and_a_size(most, most_bytes, expected, folder, monkeypatch):
    path = write(folder, "parquet", rows_of(6))  # three row groups
    monkeypatch.setattr(rows, "MOST_ROW_GROUPS", most)
    monkeypatch.setattr(rows, "MOST_BYTES", most_bytes)
    read: list[int] = []
    real = parquet.ParquetFile.read_row_group
    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", lambda self, n: (read.append(n), real(self, n))[1])
    assert len(list(scan_samples(path))) == 6 and not rows._row_groups, "a scan leaves nothing behind"
    read.clear()
    for number in (0, 1, 2, 4, 0, 2, 4, 1, 3, 5):
        read_members(path, number, 1, f"{number:08d}")
    assert len(read) == expected and len(rows._row_groups) == (1 if most_bytes == 1 else most)
    rows._row_groups.clear()


def test_a_line_that_is_no_json_is_a_bad_sample(folder):
    path = write(folder, "jsonl", rows_of(2))
    path.write_text(path.read_text() + '{"messages": [')
    index = build_index(path, Describe(tokenizer_folder()), "f")
    assert index.num_samples == 2 and "the line is not JSON" in index.bad[0].error


def test_a_file_that_is_no_parquet_and_a_row_that_went_away_are_named(folder):
    path = folder / "x.parquet"
    path.write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match="x.parquet: row 0: not a Parquet file"):
        list(scan_samples(path))
    path = write(folder, "parquet", rows_of(2))
    with pytest.raises(DataError, match=r"row 7: the file has 2 rows"):
        read_members(path, 7, 1, "00000007")


def test_a_medium_that_went_away_is_the_samples_fault(folder):
    path = write(folder, "jsonl", rows_of(1))
    (sample,) = scan_samples(path)
    (folder / BLUE).unlink()
    with pytest.raises(SampleError, match=r"rows.jsonl: sample '00000000': byte 0: image 'media/blue.png' cannot be"):
        read_members(path, sample.offset, sample.size, sample.key)
