"""What a user gets for a wrong input: one message with what, where and the fix, status 2, before any rank trains."""

from __future__ import annotations

import shutil
import tarfile
import time
from io import BytesIO
from pathlib import Path

import pytest
from corpus import micro_corpus, omni_train, overrides

CONFIG_LIMIT_SEC = 5.0


def message_of(*arguments: str, limit_sec: float) -> str:
    """The one line that the command ends with; asserts status 2, no traceback, and the time."""
    started = time.monotonic()
    done = omni_train(*arguments, timeout=60.0)
    seconds = time.monotonic() - started
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("omni-train: error: "), done.stderr
    print(f"\n[{seconds:.1f} s] {lines[0]}")
    assert seconds < limit_sec, f"{seconds:.1f} s"
    return lines[0]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["s2_general", "data.contxt=8192"], ["'data.contxt'", "did you mean 'stage.context'"]),
        (["s2_generl"], ["'s2_generl'", "did you mean 's2_general'"]),
        (["s2_general", "model=tyni"], ["model preset", "'tyni'", "did you mean 'tiny'"]),
        (["s2_general", "engine.expert_parallel=3"], ["engine.expert_parallel (3)", "num_experts (8)", "try 2"]),
        (
            ["s2_general", "+stage.components.audio_encodr.lr=1e-3"],
            ["'audio_encodr'", "did you mean 'audio_encoder'"],
        ),
        (
            ["aut_pretrain", "+stage.components.llm.lr=1e-3"],
            ["stage.components.llm", "aut_pretrain", "audio_encoder, aut_decoder"],
        ),
        (["s2_general", "data.root=no/such/corpus"], ["data.root 'no/such/corpus'", "omni-train data prepare"]),
        (["s2_general", "+init.llm=no/such/export"], ["init.llm", "'no/such/export'"]),
    ],
    ids=["key", "stage", "preset", "experts", "component", "foreign-component", "root", "init"],
)
def test_a_configuration_error_is_one_line_in_seconds(arguments: list[str], expected: list[str]) -> None:
    message = message_of("train", *arguments, limit_sec=CONFIG_LIMIT_SEC)
    for part in expected:
        assert part in message


@pytest.fixture
def own_corpus(tmp_path: Path) -> Path:
    """A copy of the micro corpus to damage."""
    return Path(shutil.copytree(micro_corpus(), tmp_path / "corpus"))


def first_shard(corpus: Path, source: str) -> Path:
    return sorted(corpus.glob(f"train/{source}/*.tar"))[0]


def test_a_missing_shard_is_named(own_corpus: Path, tmp_path: Path) -> None:
    shard = first_shard(own_corpus, "mixed")
    shard.unlink()
    pattern = f"mixture.mixed.shards=[train/mixed/{shard.name}]"
    command = overrides(tmp_path / "run", f"data.root={own_corpus}", pattern)
    message = message_of("train", "s2_general", *command, limit_sec=CONFIG_LIMIT_SEC)
    assert shard.name in message and str(own_corpus / "train" / "mixed") in message


def test_a_truncated_shard_is_named_with_the_byte(own_corpus: Path, tmp_path: Path) -> None:
    shard = first_shard(own_corpus, "speech")
    with open(shard, "r+b") as file:
        file.truncate(shard.stat().st_size // 2 + 100)
    message = message_of("train", "s2_general", *overrides(tmp_path / "run", f"data.root={own_corpus}"), limit_sec=30.0)
    assert shard.name in message and "byte " in message and "rewrite the shard" in message
    assert not (tmp_path / "run").exists()


def test_a_message_naming_a_missing_member_is_named_with_its_sample(own_corpus: Path, tmp_path: Path) -> None:
    shard = first_shard(own_corpus, "pictures")
    content = b'{"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]}'
    with tarfile.open(shard, "a") as tar:
        member = tarfile.TarInfo("lonely.json")
        member.size = len(content)
        tar.addfile(member, BytesIO(content))
    Path(f"{shard}.idx").unlink()  # tar pads to 10,240 bytes: one more sample may leave the size as it was
    message = message_of("train", "s2_general", *overrides(tmp_path / "run", f"data.root={own_corpus}"), limit_sec=30.0)
    for part in (shard.name, "'lonely'", "a.png", "mend the sample"):
        assert part in message
