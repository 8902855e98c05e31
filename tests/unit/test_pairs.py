"""Preference pairs: the best reply over the worst, and what is left out."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from omni_train.data.contracts import Sample
from omni_train.data.shard import DataError, SampleScan
from omni_train.data.talker_sequence import CODES, REJECTED
from omni_train.pairs import Reply, add_pairs


def reply(mark: int, cer: float, likeness: float = 0.0, is_whole: bool = True) -> Reply:
    return Reply(torch.full((4, 3 if is_whole else 1), mark), cer, likeness, is_whole)


REPLIES = {
    "clear": [reply(1, 0.4), reply(2, 0.1), reply(3, 0.9)],
    "alike": [reply(1, 0.30), reply(2, 0.35), reply(3, 0.32)],
    "cut": [reply(1, 0.0, is_whole=False), reply(2, 0.5), reply(3, 0.9, is_whole=False)],
    "voiced": [reply(1, 0.3, 0.2), reply(2, 0.3, 0.9), reply(3, 0.2, 0.1)],
}
HEATS = (1.0, 0.5, 2.0)
SAID = {key: f" {key} words" for key in REPLIES}


class Maker:
    """Replies by hand, one a heat."""

    def replies(self, samples: list[Sample], texts: list[str], heat: float) -> list[Reply]:
        assert texts == [SAID[sample.key].strip() for sample in samples]
        return [REPLIES[sample.key][HEATS.index(heat)] for sample in samples]


def write(path: Path, role: str = "assistant") -> Path:
    with webdataset.TarWriter(str(path), mtime=0.0) as writer:
        for key, text in SAID.items():
            said = [{"type": "text", "text": text}, {"type": "audio", "audio": "a.flac"}]
            content = {"task": "talker", "messages": [{"role": role, "content": said}]}
            writer.write({"__key__": key, "json": json.dumps(content).encode(), "a.flac": key.encode()})
    return path


def pairs(path: Path) -> dict[str, tuple[int, int]]:
    """{key: (mark of the chosen, mark of the rejected)}"""
    found = {}
    for sample in SampleScan(path):
        chosen, rejected = (np.load(io.BytesIO(sample.members[name])) for name in (CODES, REJECTED))
        assert sample.members["a.flac"] == sample.key.encode() and chosen.shape == rejected.shape == (4, 3)
        found[sample.key] = (int(chosen[0, 0]), int(rejected[0, 0]))
    return found


@pytest.mark.parametrize(
    ("weight", "expected"),
    [(0.0, {"clear": (2, 3), "voiced": (3, 1)}), (1.0, {"clear": (2, 3), "voiced": (2, 3)})],
)
def test_the_best_reply_is_chosen_over_the_worst(tmp_path, weight, expected):
    out = tmp_path / "new" / "pairs.tar"
    assert add_pairs(write(tmp_path / "talk.tar"), out, Maker(), HEATS, weight, margin=0.09) == 2
    assert pairs(out) == expected


def test_a_reply_that_cannot_be_judged_leaves_nothing_behind(tmp_path):
    with pytest.raises(DataError, match="no reply with its clip"):
        add_pairs(write(tmp_path / "talk.tar", role="user"), tmp_path / "new" / "pairs.tar", Maker(), HEATS, 0.0, 0.0)
    assert list((tmp_path / "new").iterdir()) == []
