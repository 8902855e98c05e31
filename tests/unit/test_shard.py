"""The strict shard reader: what it reads is what webdataset reads, and no damage passes."""

import io
import json
import pickle
import tarfile

import pytest
import webdataset

from omni_train.data.shard import DataError, SampleError, SampleScan, read_range, read_sample, scan, split_key

BLOCK = 512


def make_tar(path, members, *, format=tarfile.USTAR_FORMAT):
    """Writes (name, bytes) members, or TarInfo ones without data, with the standard library."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def shard(tmp_path):
    """Three samples: header and data blocks at 0, 512 | 1024, 1536 (two blocks) | 2560, 3072; zeros from 3584."""
    members = [("a.json", b"{}"), ("b.json", b"x" * 600), ("c.json", b"[]")]
    return make_tar(tmp_path / "x.tar", members)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.json", ("a", "json")),
        ("dir.v1/a.Codes.NPY", ("dir.v1/a", "codes.npy")),
        ("./a/b.jpg", ("./a/b", "jpg")),
        ("noextension", None),
        ("dir.v1/noextension", None),
        (".hidden", None),
        ("a.", ("a", "")),
        ("__meta__/a.json", None),
        ("__index__", None),
    ],
)
def test_split_key_is_the_webdataset_rule(name, expected):
    assert split_key(name) == expected
    if expected and not name.startswith("__"):
        prefix, suffix = webdataset.tariterators.base_plus_ext(name)
        assert (prefix, suffix.lower()) == expected


def test_scan_gives_offsets_and_sizes(shard):
    found = [(m.name, m.header_offset, m.data_offset, m.size) for m in scan(shard)]
    assert found == [("a.json", 0, 512, 2), ("b.json", 1024, 1536, 600), ("c.json", 2560, 3072, 2)]


@pytest.mark.parametrize(
    "size", [0, 1, 511, 512, 513, 1024, 1100, 1535, 1536, 2048, 2560, 3000, 3583, 3584, 4000, 4096, 4607]
)
def test_truncation_anywhere_is_an_error(shard, tmp_path, size):
    """Up to the last byte of the second closing block, which ends at 4608."""
    cut = tmp_path / "cut.tar"
    cut.write_bytes(shard.read_bytes()[:size])
    with pytest.raises(DataError, match=r"cut\.tar: byte [\d,]+: truncated.*rewrite the shard"):
        list(scan(cut))


def test_truncation_at_every_block_and_some_bytes_around_is_an_error(shard, tmp_path):
    data = shard.read_bytes()
    cut = tmp_path / "cut.tar"
    for boundary in range(0, 4608, BLOCK):
        for size in (boundary, boundary + 1, boundary + 511):
            cut.write_bytes(data[:size])
            with pytest.raises(DataError):
                list(scan(cut))
    cut.write_bytes(data[:4608])
    assert len(list(scan(cut))) == 3
    cut.write_bytes(data[:4700])
    with pytest.raises(DataError, match="whole number of 512-byte blocks"):
        list(scan(cut))


def test_every_flipped_header_byte_is_an_error(shard, tmp_path):
    damaged = tmp_path / "flip.tar"
    for at in range(1024, 1536):
        data = bytearray(shard.read_bytes())
        data[at] ^= 0x11
        damaged.write_bytes(data)
        with pytest.raises(DataError, match=r"flip\.tar: byte 1,024: bad header checksum"):
            list(scan(damaged))


def test_one_zero_block_and_trailing_data_are_errors(shard, tmp_path):
    data, damaged = shard.read_bytes(), tmp_path / "end.tar"
    cases = {
        "second closing zero block": data[:4096],
        "after one zero block": data[:4096] + b"x" * BLOCK,
        "data after the closing zero blocks": data[:4608] + b"x" + bytes(511),
        "several archives joined": data + data,
        "bad header checksum": data[:1024] + b"x" * BLOCK + data[1024:],
    }
    for message, content in cases.items():
        damaged.write_bytes(content)
        with pytest.raises(DataError, match=message):
            list(scan(damaged))


def test_a_member_overwritten_with_zeros_is_an_error(shard, tmp_path):
    """tarfile takes it for the end and loses two samples silently."""
    data, damaged = bytearray(shard.read_bytes()), tmp_path / "zero.tar"
    data[1024:1536] = bytes(BLOCK)
    damaged.write_bytes(data)
    with tarfile.open(damaged) as tar:
        assert tar.getnames() == ["a.json"]
    with pytest.raises(DataError, match="byte 1,536: data after one zero block"):
        list(scan(damaged))


def test_a_size_beyond_the_file_is_an_error_before_it_is_read(tmp_path):
    info = tarfile.TarInfo("a.json")
    info.size = 1 << 40
    path = tmp_path / "huge.tar"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    with pytest.raises(DataError, match=r"byte 512: truncated: member 'a\.json' of 1,099,511,627,776 bytes"):
        list(scan(path))


def test_gzip_is_named(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(b"\x1f\x8b" + b"x" * 2000)
    with pytest.raises(DataError, match="gzip-compressed"):
        list(scan(path))


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_non_ascii_names(tmp_path, format):
    names = ["d/" * 100 + "long.json", "ключ/日本.json", "short.json"]
    path = make_tar(tmp_path / "x.tar", [(name, name.encode()) for name in names], format=format)
    members = list(scan(path))
    assert [member.name for member in members] == names
    assert members[0].header_offset == 0 and members[0].data_offset > BLOCK
    for sample in SampleScan(path):
        assert read_sample(path.read_bytes()[sample.offset : sample.offset + sample.size]) == sample.members


def test_ustar_prefix_names(tmp_path):
    name = "p" * 90 + "/" + "n" * 90 + ".json"
    path = make_tar(tmp_path / "x.tar", [(name, b"1")])
    assert [member.name for member in scan(path)] == [name]


def test_directories_links_and_names_without_extension_are_skipped(tmp_path):
    directory, link = tarfile.TarInfo("d"), tarfile.TarInfo("d/link.json")
    directory.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "/etc/passwd"
    path = make_tar(tmp_path / "x.tar", [(directory, b""), ("d/a.json", b"1"), (link, b""), ("README", b"2")])
    assert [member.name for member in scan(path)] == ["d/a.json", "README"]
    assert [(sample.key, sample.members) for sample in SampleScan(path)] == [("d/a", {"json": b"1"})]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.json", "b.json", "a.txt"], {("a", 2048): "this key is already in the shard"}),
        (["b.json", "a.json", "a.JSON"], {("a", 1024): "the sample has two members with extension 'json'"}),
    ],
)
def test_duplicates_are_errors_of_their_sample(tmp_path, names, message):
    path = make_tar(tmp_path / "x.tar", [(name, b"1") for name in names])
    wrong = {(sample.key, sample.offset): sample.error.partition(":")[0] for sample in SampleScan(path) if sample.error}
    assert wrong == message


def test_read_sample_refuses_an_extension_that_comes_twice(tmp_path):
    data = make_tar(tmp_path / "x.tar", [("a.json", b"1"), ("a.JSON", b"2")]).read_bytes()[: 4 * BLOCK]
    with pytest.raises(SampleError, match="sample 'a': byte 512: the sample has two members with extension 'json'"):
        read_sample(data, key="a", shard="x.tar", offset=512)


def test_shards_of_webdataset_read_as_webdataset_reads_them(tmp_path):
    with webdataset.ShardWriter(str(tmp_path / "x-%06d.tar"), maxcount=40, verbose=0) as writer:
        for number in range(100):
            sample = {"__key__": f"part.{number % 3}/{number:05d}", "json": {"text": "é" * number}}
            writer.write(sample | {"a.flac": bytes([number]) * (number * 37), "codes.npy": b"\x00" * 512})
    shards = sorted(tmp_path.glob("*.tar"))
    stock = webdataset.WebDataset([str(path) for path in shards], shardshuffle=False)
    expected = [
        (sample["__key__"], {name: data for name, data in sample.items() if not name.startswith("__")})
        for sample in stock
    ]
    ours = [(sample.key, sample.members) for path in shards for sample in SampleScan(path)]
    assert len(shards) == 3 and len(ours) == 100
    assert ours == expected
    for path in shards:
        for sample in SampleScan(path):
            data = read_range(path, sample.offset, sample.size)
            assert read_sample(data, key=sample.key) == sample.members
    assert json.loads(ours[2][1]["json"]) == {"text": "éé"}


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_name_longer_than_its_header_is_read_whole(form, tmp_path):
    """The header of the member itself holds the first hundred letters: key and dot are right, the extension is not."""
    name = f"key.{'long' * 40}.txt"
    with tarfile.open(tmp_path / "x.tar", "w", format=form) as archive:
        info = tarfile.TarInfo(name)
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
    (sample,) = SampleScan(tmp_path / "x.tar")
    data = read_range(tmp_path / "x.tar", sample.offset, sample.size)
    assert read_sample(data, key="key") == sample.members == {name.removeprefix("key."): b"abc"}


def test_crc_is_of_the_whole_file(shard):
    import zlib

    scan_ = SampleScan(shard)
    assert len(list(scan_)) == 3
    assert scan_.crc32 == zlib.crc32(shard.read_bytes()) and scan_.size == shard.stat().st_size


def test_url_is_read_through_fsspec(shard):
    import fsspec

    with fsspec.open("memory://bucket/x.tar", "wb") as file:
        file.write(shard.read_bytes())
    assert [sample.key for sample in SampleScan("memory://bucket/x.tar")] == ["a", "b", "c"]
    assert read_sample(read_range("memory://bucket/x.tar", 1024, 1536)) == {"json": b"x" * 600}


def test_read_sample_refuses_another_key_and_two_samples(shard):
    data = shard.read_bytes()
    with pytest.raises(
        DataError, match=r"x\.tar: sample 'z': byte 1,024: expected one sample here, found keys \['b'\]"
    ):
        read_sample(data[1024:2560], key="z", shard="x.tar", offset=1024)
    with pytest.raises(DataError, match=r"found keys \['a', 'b'\]"):
        read_sample(data[:2560])
    with pytest.raises(DataError, match=r"byte 1,536: truncated"):
        read_sample(data[1024:2048], key="b", shard="x.tar", offset=1024)
    with pytest.raises(DataError, match="the shard ends after"):
        read_range(shard, 10_000, 1000)


def test_data_error_keeps_its_place_through_pickle():
    error = pickle.loads(pickle.dumps(DataError.at("s.tar", 512, "bad", key="k")))
    assert (error.shard, error.key, error.offset) == ("s.tar", "k", 512)
    assert str(error) == "s.tar: sample 'k': byte 512: bad; rewrite the shard, or remove it from the source"
