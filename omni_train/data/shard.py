"""A strict reader of WebDataset tar shards: a damaged shard is an error, never fewer samples.

    shard ──scan──▶ Member … ──SampleScan──▶ RawSample(key, byte range, members)
    byte range of one sample ──read_sample──▶ {extension: bytes}

The standard library's ``tarfile`` takes a bad header for the end of the archive and does not miss the two closing zero
blocks, so most ways to truncate a shard lose samples silently. Here every header checksum, every size and the end are
checked. Nothing is unpickled and a member name is never used as a path.
"""

from __future__ import annotations

import io
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

BLOCK_BYTES = 512
MAX_EXTENDED_HEADER_BYTES = 1 << 20
DEFAULT_FIX = "rewrite the shard, or remove it from the source"

_KEY_PATTERN = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)
_META_PATTERN = re.compile(r"__[^/]*__($|/)")
_ZERO_BLOCK = bytes(BLOCK_BYTES)
_REGULAR_TYPES = (b"0", b"\0", b"7")
_DATALESS_TYPES = (b"1", b"2", b"3", b"4", b"5", b"6")


class DataError(ValueError):
    """A fault of the data and where it lies: ``shard``, ``key`` ("" unknown) and byte ``offset`` (-1 unknown).

    ``what`` is the message without place and fix.
    """

    def __init__(self, message: str, *, shard: str = "", key: str = "", offset: int = -1, what: str = ""):
        super().__init__(message)
        self.shard = shard
        self.key = key
        self.offset = offset
        self.what = what or message

    @classmethod
    def at(cls, shard: str | Path, offset: int, what: str, *, key: str = "", fix: str = DEFAULT_FIX) -> DataError:
        """The error "SHARD: sample 'KEY': byte OFFSET: WHAT; FIX"; the offset in a Parquet file is a row's number."""
        sample = f"sample {key!r}: " if key else ""
        unit = "row" if str(shard).endswith(".parquet") else "byte"
        message = f"{shard}: {sample}{unit} {offset:,}: {what}; {fix}"
        return cls(message, shard=str(shard), key=key, offset=offset, what=what)


class SampleError(DataError):
    """A fault of one sample; the others of its shard can be read."""


@dataclass(slots=True)
class Member:
    """A file in a shard. Offsets and size in bytes; ``header_offset`` includes a long-name or PAX header before it."""

    name: str
    header_offset: int
    data_offset: int
    size: int

    @property
    def end(self) -> int:
        """Offset of the byte after the padded data."""
        return self.data_offset + _padded(self.size)


@dataclass(slots=True)
class RawSample:
    """All members of a key. ``offset`` and ``size`` (bytes) are its range in the shard, headers and padding too.

    ``error`` says what is wrong with its key or extensions; "" when nothing is.
    """

    key: str
    offset: int
    size: int
    members: dict[str, bytes]
    error: str = ""


def split_key(name: str) -> tuple[str, str] | None:
    """(key, extension) of a member name by the WebDataset rule, or None where WebDataset skips the member.

    The key is the path up to the first dot of its last component; the extension is lower-case, without that dot.
    """
    if _META_PATTERN.match(name):
        return None
    match = _KEY_PATTERN.match(name)
    return (match.group(1), match.group(2).lower()) if match else None


def is_url(path: str | Path) -> bool:
    """True for what fsspec opens (``scheme://…``)."""
    return "://" in str(path)


def shard_size(path: str | Path) -> int:
    """Size of the shard in bytes."""
    if is_url(path):
        import fsspec

        filesystem, inner = fsspec.core.url_to_fs(str(path))
        return int(filesystem.size(inner))
    return os.stat(path).st_size


def read_range(path: str | Path, offset: int, size: int) -> bytes:
    """Bytes [offset, offset + size) of a shard in one ranged read. Raises DataError when the shard ends before."""
    if is_url(path):
        import fsspec

        filesystem, inner = fsspec.core.url_to_fs(str(path))
        data = filesystem.cat_file(inner, start=offset, end=offset + size)
    else:
        file = os.open(path, os.O_RDONLY)
        try:
            data = os.pread(file, size, offset)
            while 0 < len(data) < size and (more := os.pread(file, size - len(data), offset + len(data))):
                data += more
        finally:
            os.close(file)
    if len(data) != size:
        what = f"the shard ends after {len(data):,} of the {size:,} bytes of this sample"
        raise DataError.at(path, offset, what, fix="the shard changed after it was indexed: index it again")
    return data


def scan(path: str | Path) -> Iterator[Member]:
    """The regular files of a shard, in order, in one strict sequential pass. Raises DataError on any damage."""
    with _open_stream(path) as stream:
        for member, _ in _walk(stream, is_whole=True):
            yield member


class SampleScan:
    """The samples of a shard, in order, in one strict sequential pass: iterate once, then read ``crc32`` and ``size``.

    Raises DataError on any damage. A sample whose key was there before, or with an extension twice, says so in its
    ``error``. ``crc32`` is of the whole file and ``size`` its bytes; both are 0 before the pass is complete.
    """

    def __init__(self, path: str | Path):
        self.path = path
        self.crc32 = 0
        self.size = 0

    def __iter__(self) -> Iterator[RawSample]:
        seen: set[str] = set()
        with _open_stream(self.path) as stream:
            for sample in _group(stream, is_whole=True):
                if sample.key in seen:
                    sample.error = "this key is already in the shard: members must be adjacent and keys unique"
                seen.add(sample.key)
                yield sample
            self.crc32, self.size = stream.crc, stream.end


def read_sample(data: bytes, *, key: str = "", shard: str | Path = "<bytes>", offset: int = 0) -> dict[str, bytes]:
    """{extension: bytes} of the byte range of one sample.

    ``key`` (when given) must be the key found; ``shard`` and ``offset`` say where the range lies, for messages.
    """
    plain = _plain_members(data, key) if key else None
    if plain is not None:
        return plain
    stream = _Stream(io.BytesIO(data), str(shard), len(data), start=offset)
    samples = list(_group(stream, is_whole=False))
    found = [sample.key for sample in samples]
    if len(samples) != 1 or (key and found[0] != key):
        what = f"expected one sample here, found keys {found}"
        raise DataError.at(shard, offset, what, key=key, fix="the shard changed after it was indexed: index it again")
    if samples[0].error:
        raise SampleError.at(shard, offset, samples[0].error, key=samples[0].key)
    return samples[0].members


def _plain_members(data: bytes, key: str) -> dict[str, bytes] | None:
    """The members of a range that was scanned before, or None where anything is out of the ordinary.

    Ordinary are regular files of this key with a short name, with or without a PAX header that says nothing of name
    and size. Headers' checksums were looked at by the scan; names and sizes must still fit the range.
    """
    members: dict[str, bytes] = {}
    prefix = key.encode("utf-8", "surrogateescape") + b"."
    at = 0
    while at < len(data):
        try:
            size = int(data[at + 124 : at + 135], 8)
        except ValueError:
            return None
        start, kind = at + BLOCK_BYTES, data[at + 156 : at + 157]
        body = data[start : start + size]
        if kind == b"x":
            if b" path=" in body or b" size=" in body or b"GNU.sparse" in body:
                return None
        else:
            extension = data[at + len(prefix) : at + 100].split(b"\0", 1)[0].lower().decode("utf-8", "replace")
            is_ordinary = kind in (b"0", b"\0") and data.startswith(prefix, at) and not data[at + 345]
            if not is_ordinary or not extension or "/" in extension or extension in members:
                return None
            members[extension] = body
        at = start + _padded(size)
    return members if at == len(data) and members else None


class _Stream:
    """A forward-only reader that knows its offset in the shard and the CRC-32 of what it has read."""

    def __init__(self, file: IO[bytes], shard: str, size: int, *, start: int = 0):
        self.shard = shard
        self.offset = start
        self.end = start + size
        self.crc = 0
        self._file = file

    def read(self, size: int, what: str) -> bytes:
        """Exactly ``size`` bytes; DataError naming ``what`` was being read when the shard ends before."""
        data = _read_all(self._file, size) if self.offset + size <= self.end else b""
        if len(data) != size:
            left = self.end - self.offset
            raise DataError.at(self.shard, self.offset, f"truncated: {what} needs {size:,} bytes, {left:,} are left")
        self.crc = zlib.crc32(data, self.crc)
        self.offset += size
        return data


@contextmanager
def _open_stream(path: str | Path) -> Iterator[_Stream]:
    if is_url(path):
        import fsspec

        with fsspec.open(str(path), "rb") as file:
            yield _Stream(file, str(path), shard_size(path))
    else:
        with open(path, "rb", buffering=1 << 18) as file:
            yield _Stream(file, str(path), shard_size(path))


def _group(stream: _Stream, *, is_whole: bool) -> Iterator[RawSample]:
    """Runs of adjacent members of one key."""
    sample: RawSample | None = None
    for member, data in _walk(stream, is_whole=is_whole):
        split = split_key(member.name)
        if split is None:
            continue
        key, extension = split
        if sample is not None and key != sample.key:
            yield sample
            sample = None
        if sample is None:
            sample = RawSample(key, member.header_offset, 0, {})
        if extension in sample.members:
            sample.error = f"the sample has two members with extension {extension!r}"
        sample.members[extension] = data
        sample.size = member.end - sample.offset
    if sample is not None:
        yield sample


def _walk(stream: _Stream, *, is_whole: bool) -> Iterator[tuple[Member, bytes]]:
    """(member, data) of every regular file. ``is_whole``: a shard with its closing blocks, else a range without."""
    first_offset, extended = stream.offset, dict[str, str]()
    while is_whole or stream.offset < stream.end:
        at = stream.offset
        header = stream.read(
            BLOCK_BYTES, "a member header or the closing zero blocks" if is_whole else "a member header"
        )
        if is_whole and header == _ZERO_BLOCK:
            if extended:
                raise DataError.at(stream.shard, at, "the shard ends after an extended header without its member")
            return _check_end(stream)
        name, size, kind = _parse_header(header, stream.shard, at)
        if kind in (b"L", b"K", b"x", b"g"):
            extended |= _read_extended(stream, kind, size, at)
            continue
        if "GNU.sparse.major" in extended or kind == b"S":
            raise DataError.at(stream.shard, at, "sparse members are not supported")
        name, size = extended.get("path", name), _extended_size(extended, size, stream.shard, at)
        is_directory = kind == b"\0" and name.endswith("/")
        if is_directory or kind in _DATALESS_TYPES:
            size = 0
        data_offset = stream.offset
        data = stream.read(_padded(size), f"member {name!r} of {size:,} bytes")
        if kind in _REGULAR_TYPES and not is_directory:
            yield Member(name, first_offset, data_offset, size), data[:size]
        first_offset, extended = stream.offset, {}


def _check_end(stream: _Stream) -> None:
    """Checks the second closing block and that only zeros follow."""
    if stream.read(BLOCK_BYTES, "the second closing zero block") != _ZERO_BLOCK:
        at = stream.offset - BLOCK_BYTES
        raise DataError.at(
            stream.shard, at, "data after one zero block: a member was overwritten, or the end is damaged"
        )
    while stream.offset < stream.end:
        at = stream.offset
        block = stream.read(min(stream.end - at, BLOCK_BYTES), "the padding")
        if block.strip(b"\0"):
            what = "data after the closing zero blocks (garbage, or several archives joined with cat)"
            raise DataError.at(stream.shard, at, what)
        if len(block) != BLOCK_BYTES:
            raise DataError.at(stream.shard, at, "truncated: the shard is not a whole number of 512-byte blocks")


def _parse_header(header: bytes, shard: str, offset: int) -> tuple[str, int, bytes]:
    """(name, size in bytes, type) of a tar header whose checksum is right."""
    stored = _number(header[148:156])
    blanked = header[:148] + b" " * 8 + header[156:]
    signed = sum(byte - 256 if byte > 127 else byte for byte in blanked) if stored != sum(blanked) else stored
    if stored not in (sum(blanked), signed) or stored is None:
        gzip = " (the shard looks gzip-compressed: store it as plain .tar)" if header[:2] == b"\x1f\x8b" else ""
        raise DataError.at(shard, offset, f"bad header checksum{gzip}")
    size = _number(header[124:136])
    if size is None or size < 0:
        raise DataError.at(shard, offset, f"bad member size field {header[124:136]!r}")
    name = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return (f"{prefix}/{name}" if prefix else name), size, header[156:157]


def _read_extended(stream: _Stream, kind: bytes, size: int, offset: int) -> dict[str, str]:
    """What a GNU long-name or a PAX header says of the next member: {"path": …, "size": …}."""
    if size > MAX_EXTENDED_HEADER_BYTES:
        what = f"an extended header of {size:,} bytes (limit {MAX_EXTENDED_HEADER_BYTES:,})"
        raise DataError.at(stream.shard, offset, what)
    data = stream.read(_padded(size), "an extended header")[:size]
    if kind in (b"L", b"K"):
        return {"path": _text(data)} if kind == b"L" else {}
    records, at = {}, 0
    while at < len(data):
        head = re.match(rb"(\d{1,7}) ([^=]+)=", data[at:])
        length = int(head.group(1)) if head else 0
        if head is None or length <= head.end() or data[at + length - 1 : at + length] != b"\n":
            raise DataError.at(stream.shard, offset, f"bad PAX record at byte {at} of the extended header")
        value = data[at + head.end() : at + length - 1]
        records[head.group(2).decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        at += length
    if kind == b"g" and {"path", "size"} & records.keys():
        raise DataError.at(stream.shard, offset, "a global PAX header sets path or size")
    return {} if kind == b"g" else records


def _extended_size(extended: dict[str, str], size: int, shard: str, offset: int) -> int:
    text = extended.get("size")
    if text is None:
        return size
    if not (text.isascii() and text.isdigit()):
        raise DataError.at(shard, offset, f"bad PAX size {text!r}")
    return int(text)


def _number(field: bytes) -> int | None:
    """Value of a numeric header field: octal digits, or base 256 where the first bit is set; None when neither."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = re.fullmatch(rb" *([0-7]*)[ \0]*", field)
    return int(digits.group(1) or b"0", 8) if digits else None


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _padded(size: int) -> int:
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def _read_all(file: IO[bytes], size: int) -> bytes:
    """``size`` bytes, or fewer at the end of the file; a raw file may return less than asked for in one call."""
    data = file.read(size)
    if len(data) == size or not data:
        return data
    parts, left = [data], size - len(data)
    while left and (data := file.read(left)):
        parts.append(data)
        left -= len(data)
    return b"".join(parts)
