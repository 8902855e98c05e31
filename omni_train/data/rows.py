"""Conversations in files of rows, JSON lines and Parquet, as `datasets` writes them and SFT tools read them.

    {"messages": [...], "images": ["a.jpg"]} ──row_members──▶ {"json": our messages, "a.jpg": bytes}

A row is a sample: a line, or a row of a row group. What is in it becomes the members of a sample of a tar shard, so
everything behind (index, planner, reader, encoder) is the same. Two forms of media are read:

* content is text with ``<image>``, ``<audio>``, ``<video>``, each the next entry of the row's ``images``, ``audios``,
  ``videos`` (ms-swift, LLaMA-Factory);
* content is a list of parts, which name their media themselves or, empty, take the next entry (OpenAI, TRL).

A medium is a path, absolute or from the file's folder, or ``{"bytes": ..., "path": ...}`` (an Image or Audio column).
"""

from __future__ import annotations

import functools
import json
import os
import re
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omni_train.data.shard import (
    DataError,
    RawSample,
    SampleError,
    SampleScan,
    is_url,
    read_range,
    read_sample,
    shard_size,
)

ROW_SUFFIXES = (".jsonl", ".parquet")
COLUMNS = {"image": "images", "audio": "audios", "video": "videos"}
ROLES = {"tool_response": "tool", "human": "user", "gpt": "assistant", "observation": "tool"}
"""Other names of our roles."""
KEPT = ("task", "lang", "speaker", "license")

MOST_ROW_GROUPS, MOST_BYTES = 64, 1 << 29
_PLACEHOLDER = re.compile("<(image|audio|video)>")


def is_rows(path: str | Path) -> bool:
    """Whether a file holds rows, by its name."""
    return str(path).endswith(ROW_SUFFIXES)


class RowScan:
    """The rows of a file, in order, as samples: iterate once, then read ``crc32`` and ``size``.

    A row that cannot be read, or names a medium that is not there, says so in its ``error``. The ``offset`` and
    ``size`` of a line are bytes; those of a row of Parquet are its number and 1. Raises DataError for a damaged file.
    """

    def __init__(self, path: str | Path) -> None:
        if is_url(path):
            what = "rows are read from local files only: their media are paths"
            raise DataError.at(path, 0, what, fix="copy the file and its media here")
        self.path = path
        self.crc32 = 0
        self.size = 0

    def __iter__(self) -> Iterator[RawSample]:
        places = _parquet_places(self.path) if str(self.path).endswith(".parquet") else _line_places(self.path)
        for number, (offset, size) in enumerate(places):
            sample = RawSample(f"{number:08d}", offset, size, {})
            try:
                sample.members = _members_at(self.path, offset, size)
            except ValueError as error:
                sample.error = str(error)
            while len(_row_groups) > 1:  # a scan does not come back
                _row_groups.popitem(last=False)
            yield sample
        _row_groups.clear()
        with open(self.path, "rb") as file:
            while block := file.read(1 << 20):
                self.crc32 = zlib.crc32(block, self.crc32)
        self.size = shard_size(self.path)


def scan_samples(path: str | Path) -> SampleScan | RowScan:
    """The samples of a shard of any kind, in one pass."""
    return RowScan(path) if is_rows(path) else SampleScan(path)


def read_members(path: str | Path, offset: int, size: int, key: str) -> dict[str, bytes]:
    """The members of the sample at a place that a scan gave. Raises DataError, SampleError for the sample alone."""
    if not is_rows(path):
        return read_sample(read_range(path, offset, size), key=key, shard=path, offset=offset)
    try:
        return _members_at(path, offset, size)
    except DataError:
        raise
    except ValueError as error:
        raise SampleError.at(path, offset, str(error), key=key, fix="mend the row, or remove it") from error


def _members_at(path: str | Path, offset: int, size: int) -> dict[str, bytes]:
    row = _parquet_row(str(path), offset) if str(path).endswith(".parquet") else _line(path, offset, size)
    return row_members(row, Path(path).parent)


def _line_places(path: str | Path) -> Iterator[tuple[int, int]]:
    """(offset, size) in bytes of each line that is not empty."""
    offset = 0
    with open(path, "rb") as file:
        for line in file:
            if line.strip():
                yield offset, len(line)
            offset += len(line)


def _line(path: str | Path, offset: int, size: int) -> dict[str, Any]:
    try:
        row = json.loads(read_range(path, offset, size))
    except RecursionError as error:
        raise ValueError("the line is nested too deeply") from error
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise ValueError(f"the line is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"the line holds a {type(row).__name__}, not an object")
    return row


def _parquet_places(path: str | Path) -> Iterator[tuple[int, int]]:
    for number in range(_parquet(str(path), os.stat(path).st_mtime_ns)[0].metadata.num_rows):
        yield number, 1


@functools.lru_cache(maxsize=16)
def _parquet(path: str, modified: int) -> tuple[Any, list[int]]:
    """(the open file, the first row of each row group and the number of all rows). Raises DataError if damaged."""
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError.at(path, 0, f"not a Parquet file: {error}") from error
    starts = [0]
    for group in range(file.num_row_groups):
        starts.append(starts[-1] + file.metadata.row_group(group).num_rows)
    return file, starts


_row_groups: OrderedDict[tuple[str, int, int], Any] = OrderedDict()
"""Those asked for last, up to MOST_ROW_GROUPS and MOST_BYTES: a lane's window of samples is of many."""


def _row_group(path: str, modified: int, group: int) -> Any:
    """One row group as an Arrow table."""
    key = path, modified, group
    if key in _row_groups:
        _row_groups.move_to_end(key)
        return _row_groups[key]
    _row_groups[key] = _parquet(path, modified)[0].read_row_group(group)
    num_bytes = sum(table.nbytes for table in _row_groups.values())
    while len(_row_groups) > 1 and (len(_row_groups) > MOST_ROW_GROUPS or num_bytes > MOST_BYTES):
        num_bytes -= _row_groups.popitem(last=False)[1].nbytes
    return _row_groups[key]


def _parquet_row(path: str, number: int) -> dict[str, Any]:
    modified = os.stat(path).st_mtime_ns
    starts = _parquet(path, modified)[1]
    if number >= starts[-1]:
        what = f"the file has {starts[-1]:,} rows"
        raise DataError.at(path, number, what, fix="the file changed after it was indexed: index it again")
    group = next(n for n, start in enumerate(starts[1:]) if number < start)
    return _row_group(path, modified, group).slice(number - starts[group], 1).to_pylist()[0]


def row_members(row: dict[str, Any], folder: Path) -> dict[str, bytes]:
    """The members of a sample that says what the row says. Raises ValueError naming the field, message or medium."""
    row = {name: value for name, value in row.items() if value is not None}
    content: dict[str, Any] = {name: row[name] for name in KEPT if name in row}
    if "messages" not in row:
        if not isinstance(row.get("text"), str):
            raise ValueError(f"the row has neither 'messages' nor 'text'; it has {', '.join(sorted(row)) or 'nothing'}")
        if named := [name for pair in COLUMNS.items() for name in pair if _is_filled(row.get(name))]:
            raise ValueError(
                f"the row has 'text' beside '{named[0]}', which a text has no place for; write 'messages' whose user "
                "says the medium (`<image>`) and whose assistant says the text"
            )
        return {"json": json.dumps({**content, "text": row["text"]}).encode()}
    messages, tools = row["messages"], row.get("tools")
    if not isinstance(messages, list):
        raise ValueError(f"'messages' is {type(messages).__name__}; it must be a list")
    media = _Media(row, folder)
    content["messages"] = [_message(message, number, media) for number, message in enumerate(messages)]
    media.check_all_taken()
    if isinstance(row.get("system"), str):
        content["messages"].insert(0, {"role": "system", "content": row["system"]})
    if tools:
        content["tools"] = json.loads(tools) if isinstance(tools, str) else tools
    return {"json": json.dumps(_without_none(content)).encode(), **media.members}


def _is_filled(value: Any) -> bool:
    """Whether a field names a medium: `datasets` writes empty ones as lists and objects of None."""
    if isinstance(value, dict):
        return any(own is not None for own in value.values())
    return any(map(_is_filled, value)) if isinstance(value, list) else bool(value)


class _Media:
    """The media of a row, taken in order."""

    def __init__(self, row: dict[str, Any], folder: Path) -> None:
        self.folder = folder
        self.members: dict[str, bytes] = {}
        self._uses_sound = bool(row.get("use_audio_in_video"))
        self._waiting: dict[str, list[Any]] = {}
        for kind, column in COLUMNS.items():
            values = row.get(column, row.get(kind))
            self._waiting[kind] = list(values) if isinstance(values, list) else [] if values is None else [values]
        self._totals = {kind: len(values) for kind, values in self._waiting.items()}

    def next_part(self, kind: str, number: int) -> dict[str, Any]:
        """The part of the next medium of the row's column."""
        if not self._waiting[kind]:
            raise ValueError(
                f"message {number} asks for more of kind {kind} than the {self._totals[kind]} in '{COLUMNS[kind]}'"
            )
        return self.part(kind, self._waiting[kind].pop(0))

    def part(self, kind: str, value: Any) -> dict[str, Any]:
        """The part of a medium, whose bytes become a member."""
        name, data = self._read(kind, value)
        self.members[name] = data
        part: dict[str, Any] = {"type": kind, kind: name}
        if kind == "video" and self._uses_sound:
            part["use_audio_in_video"] = True
        return part

    def check_all_taken(self) -> None:
        """Raises ValueError for media that no message names: they would be left out without a word."""
        for kind, values in self._waiting.items():
            if values:
                raise ValueError(
                    f"'{COLUMNS[kind]}' has {self._totals[kind]}, but the messages name {len(values)} fewer; "
                    f"write <{kind}> where each belongs"
                )

    def _read(self, kind: str, value: Any) -> tuple[str, bytes]:
        if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
            return f"{COLUMNS[kind]}/{len(self.members)}", value["bytes"]
        path = value.get("path") if isinstance(value, dict) else value
        if not isinstance(path, str) or not path:
            raise ValueError(f"a medium of kind {kind} is {value!r}; it must be a path, or an object with 'bytes'")
        if is_url(path):
            raise ValueError(f"{kind} {path!r} is an address; media are read from local files only")
        try:
            return path, (self.folder / path.removeprefix("file://")).read_bytes()
        except OSError as error:
            raise ValueError(f"{kind} {path!r} cannot be read from '{self.folder}': {error.strerror}") from error


def _message(message: Any, number: int, media: _Media) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(f"message {number} is {type(message).__name__}; it must be an object")
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if role == "tool_call":
        return {"role": "assistant", "content": f"<tool_call>\n{content}\n</tool_call>"}
    found = {"role": ROLES.get(str(role), role), "content": content}
    found |= {name: message[name] for name in ("reasoning_content", "tool_calls") if message.get(name) is not None}
    if isinstance(content, str):
        found["content"] = _with_media(content, number, media)
    elif isinstance(content, list):
        found["content"] = [part for item in content for part in _parts(item, number, media)]
    return found


def _with_media(text: str, number: int, media: _Media) -> Any:
    """The text, or where it has placeholders its parts."""
    pieces = _PLACEHOLDER.split(text)  # text, kind, text, kind, … text
    if len(pieces) == 1:
        return text
    parts: list[dict[str, Any]] = []
    for n, piece in enumerate(pieces):
        if n % 2:
            parts.append(media.next_part(piece, number))
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _parts(item: Any, number: int, media: _Media) -> list[dict[str, Any]]:
    """Our parts of one of theirs: media that it names, or the next of its column."""
    if not isinstance(item, dict):
        raise ValueError(f"message {number} has a part that is {type(item).__name__}; it must be an object")
    kind = str(item.get("type")).removesuffix("_url")
    if kind not in COLUMNS:
        return [{name: value for name, value in item.items() if value is not None}]
    value = item.get(f"{kind}_url", item.get(kind))
    value = item.get(kind) if value is None else value
    value = value.get("url", value) if isinstance(value, dict) else value
    part = media.next_part(kind, number) if value is None else media.part(kind, value)
    return [part | ({"use_audio_in_video": True} if item.get("use_audio_in_video") else {})]


def _without_none(value: Any) -> Any:
    """The value without object fields that are None: `datasets` fills in what only other rows have."""
    if isinstance(value, dict):
        return {name: _without_none(own) for name, own in value.items() if own is not None}
    return [_without_none(own) for own in value] if isinstance(value, list) else value
