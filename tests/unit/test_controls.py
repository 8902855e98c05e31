"""Controls: what stays, what is taken from another item, and what is left of a video without its motion."""

from __future__ import annotations

import numpy as np
import pytest
from clips import spoken, video
from test_video import GEOMETRY, greys

from omni_train.config import Control
from omni_train.data.contracts import Document, Sample
from omni_train.data.video import decode_video
from omni_train.evaluation.controls import changeable, changed, without_motion


def test_a_control_keeps_question_and_reference_and_takes_the_media_of_another():
    samples = [spoken(n, f"word {n}") for n in range(7)]
    swapped = changed(samples, Control.media_swapped)
    for before, after in zip(samples, swapped, strict=True):
        assert after.content is before.content and after.members["json"] == before.members["json"]
        assert after.members["a.flac"] != before.members["a.flac"]
    assert {s.members["a.flac"] for s in swapped} == {s.members["a.flac"] for s in samples}
    assert [s.members for s in changed(samples, Control.media_swapped)] == [s.members for s in swapped]


def test_a_control_takes_media_of_the_same_kinds_only():
    samples = [spoken(n, f"word {n}") for n in range(6)]
    for sample in samples[::2]:
        sample.members["b.flac"] = b"second " + sample.members["json"]
    for before, after in zip(samples, changed(samples, Control.media_swapped), strict=True):
        assert set(after.members) == set(before.members)
        assert after.members["a.flac"] != before.members["a.flac"]


def test_what_has_nothing_to_swap_with_is_not_in_the_control():
    samples = [spoken(n, f"word {n}") for n in range(4)]
    samples[1].members["b.flac"] = b"second"
    assert changeable(samples, Control.media_swapped) == [samples[0], *samples[2:]]
    assert changeable(samples, Control.frames_frozen) == samples


def test_a_control_leaves_the_system_turns_out():
    turns = [{"role": "system", "content": "in capitals"}, {"role": "user", "content": "hi"}]
    sample = Sample("s", "shard", "0", {"messages": turns, "task": "t"}, {})
    (other,) = changed([sample], Control.system_left_out)
    assert other.content == {"messages": turns[1:], "task": "t"} and sample.content["messages"] == turns


def watched(number: int, num_frames: int, tones: int) -> Sample:
    times = [n / 10 for n in range(num_frames)]
    return Sample("video", "shard", str(number), {}, {"a.mp4": video(times, tones=tones), "json": b"%d" % number})


def heard(data: bytes) -> np.ndarray:
    return decode_video(data, GEOMETRY, with_sound=True).wave


def test_a_video_keeps_its_pictures_and_takes_the_sound_of_another():
    samples = [watched(n, 10 + 5 * n, tones=8_000 * (n + 1)) for n in range(2)]
    swapped = changed(samples, Control.sound_swapped)
    for before, after, other in zip(samples, swapped, samples[::-1], strict=True):
        old, new, from_ = (sample.members["a.mp4"] for sample in (before, after, other))
        assert np.array_equal(decode_video(old, GEOMETRY).patches, decode_video(new, GEOMETRY).patches)
        assert np.array_equal(heard(new), heard(from_))
        assert not np.array_equal(heard(new), heard(old))
        assert after.members["json"] == before.members["json"]


def test_beside_a_picture_the_sound_alone_is_swapped():
    samples = [Sample("s", "s", str(n), {}, {"a.png": b"p%d" % n, "b.flac": b"s%d" % n}) for n in range(2)]
    swapped = changed(samples, Control.sound_swapped)
    assert [s.members for s in swapped] == [
        {"a.png": b"p0", "b.flac": b"s1"},
        {"a.png": b"p1", "b.flac": b"s0"},
    ]


@pytest.mark.parametrize("control", [Control.frames_frozen, Control.frames_shuffled])
def test_frames_are_frozen_or_shuffled(control):
    film = decode_video(video([n / 4 for n in range(12)]), GEOMETRY)
    empty = np.empty(0, np.int64)
    document = Document("id", "video", empty, empty, empty, video_patches=[film.patches], video_grids=[film.grid])
    before, after = (
        greys(d.video_patches[0], film.grid) for d in (document, without_motion(document, control, GEOMETRY))
    )
    assert len(set(before)) == len(before) > 5
    if control is Control.frames_frozen:
        assert after == [before[0]] * len(before)
    else:
        assert after != before and sorted(after) == sorted(before)


def test_other_controls_leave_frames_alone():
    document = Document("id", "video", *[np.empty(0, np.int64)] * 3)
    assert without_motion(document, Control.media_swapped, GEOMETRY) is document
    samples = [watched(n, 10, tones=0) for n in range(2)]
    assert changed(samples, Control.frames_frozen) is samples


def test_silent_videos_have_no_sound_to_swap():
    with pytest.raises(ValueError, match="without sound has none to swap"):
        changed([watched(n, 10, tones=0) for n in range(2)], Control.sound_swapped)
