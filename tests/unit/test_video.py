"""Videos: the header says what the decoder gives, frames are those on screen, sound stands between them by time."""

from __future__ import annotations

import io
import json
import math
import random
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import yaml
from clips import grey, on_its_side, steady_video, video

from omni_train.config import load
from omni_train.data import video as module
from omni_train.data.chatml import Describe
from omni_train.data.contracts import Sample, SampleFacts
from omni_train.data.encode import Encoder
from omni_train.data.image import patches_of
from omni_train.data.media_tokens import MediaGeometry, video_grid
from omni_train.data.pipeline import media_geometry
from omni_train.data.positions import video_token_times
from omni_train.data.tokenizer import load_tokenizer, train_tokenizer
from omni_train.data.video import decode_video, resized, size_px, video_facts

GEOMETRY = MediaGeometry(patch_size=8, video_min_pixels=1_024, video_max_pixels=4_096, video_fps=4.0)


def greys(patches: np.ndarray, grid: tuple[int, int, int]) -> list[float]:
    """The grey of each frame that was looked at."""
    values = (patches.reshape(grid[0], -1, 3, 2, 64) * 0.5 + 0.5) * 255
    return values.mean(axis=(1, 2, 4)).flatten().round().tolist()


def test_the_header_gives_size_frames_rate_and_sound():
    facts = video_facts("v", video([n / 10 for n in range(20)], tones=32_000), with_sound=True)
    assert (facts.kind, facts.width, facts.height, facts.num_frames) == ("video", 64, 48, 20)
    assert facts.fps == pytest.approx(10, rel=0.06)  # the last frame's time is lost in this file
    assert facts.has_audio and facts.sample_rate_hz == 16_000
    assert facts.num_samples == pytest.approx(32_000, abs=2_100)
    assert not video_facts("v", video([0, 0.1])).has_audio


def test_frames_are_made_small_one_by_one(monkeypatch):
    """Minutes of frames as stored would be gigabytes; one that stays on screen is taken once."""
    taken = []
    monkeypatch.setattr(module, "resized", lambda frames, size: taken.append(frames.shape) or resized(frames, size))
    found = decode_video(video([0.0, 0.1, 1.5, 1.6], size=(320, 240)), GEOMETRY)
    assert taken and len(taken) < 2 * found.grid[0] and set(taken) == {(1, 240, 320, 3)}


def test_a_video_of_a_phone_held_upright_is_seen_upright():
    def left_is_bright(number: int, size: tuple[int, int]) -> np.ndarray:
        return np.repeat(np.where(np.arange(size[0]) < size[0] // 2, 220, 30)[None, :, None], size[1], 0).repeat(3, 2)

    stored = video([n / 10 for n in range(20)], size=(64, 32), picture=lambda *a: left_is_bright(*a).astype(np.uint8))
    data = on_its_side(stored)
    assert [(f.width, f.height) for f in (video_facts("v", stored), video_facts("v", data))] == [(64, 32), (32, 64)]
    found = decode_video(data, GEOMETRY)
    assert found.grid == (decode_video(stored, GEOMETRY).grid[0], 8, 4)
    halves = found.patches.reshape(found.grid[0], 2, -1).mean(-1) * 127.5 + 127.5  # top and bottom, by time
    assert np.abs(halves - [220, 30]).max() < 3


def test_frames_are_those_on_screen_in_the_middle_of_their_share():
    found = decode_video(video([n / 10 for n in range(20)]), GEOMETRY)
    assert found.grid[0] == 4 and found.seconds_per_grid == pytest.approx(7 / 13)
    middles = (np.arange(8) + 0.5) * found.seconds_per_grid / 2
    expected = [20 + 10 * min(19, int(at * 10)) for at in middles]
    assert np.abs(np.array(greys(found.patches, found.grid)) - expected).max() <= 3


def test_a_variable_frame_rate_is_looked_at_by_time():
    """One frame for a second and a half, then nine in half a second: four fifths of the looks show the first."""
    times = [0.0, *(1.5 + n / 18 for n in range(9))]
    data = video(times, seconds=2.0)
    found = decode_video(data, GEOMETRY)
    middles = (np.arange(2 * found.grid[0]) + 0.5) * found.seconds_per_grid / 2
    expected = [20 + 10 * int(np.searchsorted(times, at, side="right") - 1) for at in middles]
    assert np.abs(np.array(greys(found.patches, found.grid)) - expected).max() <= 3
    assert expected.count(20) == 5 or expected.count(20) == 6


@pytest.mark.parametrize("seconds, fps", [(0.1, 10), (0.9, 30), (2.0, 12), (3.3, 25)])
def test_the_grid_of_the_facts_is_that_of_the_data(seconds, fps):
    data = video([n / fps for n in range(max(2, round(seconds * fps)))])
    facts = video_facts("v", data)
    found = decode_video(data, GEOMETRY)
    assert found.grid == video_grid(facts.width, facts.height, facts.num_frames, facts.fps, GEOMETRY)
    assert found.patches.shape == (np.prod(found.grid), GEOMETRY.patch_dim)


def test_patches_of_frames_by_a_plain_loop():
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (4, 32, 48, 3), dtype=np.uint8)
    rows = patches_of(resized(frames, size_px((2, 4, 6), GEOMETRY)), (2, 4, 6), GEOMETRY)
    number = 0
    for t in range(2):
        for block_y in range(2):
            for block_x in range(3):
                for y in (2 * block_y, 2 * block_y + 1):
                    for x in (2 * block_x, 2 * block_x + 1):
                        patch = frames[2 * t : 2 * t + 2, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
                        expected = (patch.transpose(3, 0, 1, 2).reshape(-1) / 255 - 0.5) / 0.5
                        assert np.abs(rows[number] - expected).max() < 1e-6
                        number += 1


def test_sound_has_the_length_that_was_counted():
    data = video([0, 0.5, 1.0], tones=16_000)
    num_samples = video_facts("v", data, with_sound=True).num_samples
    wave = decode_video(data, GEOMETRY, with_sound=True).wave
    assert wave.shape == (num_samples,) and wave.dtype == np.float32
    assert 0.1 < float(np.sqrt((wave[2_000:12_000] ** 2).mean())) < 0.3
    assert decode_video(data, GEOMETRY).wave is None


@pytest.mark.parametrize("kind", ["mp4", "matroska"])
@pytest.mark.parametrize(("pictures_from", "sound_from"), [(0.0, 0.96), (0.96, 0.0), (0.0, 0.1)])
def test_sound_stays_with_the_pictures_where_their_tracks_begin_at_different_times(kind, pictures_from, sound_from):
    """As long as it is stored and by what it begins later, silent until then; what is before the pictures is cut.
    Matroska stores no length of a track: the sound is as long as the film there."""
    times = [pictures_from + n / 10 for n in range(20)]
    data = video(times, tones=16_000, sound_from=sound_from, kind=kind)
    num_samples = video_facts("v", data, with_sound=True).num_samples
    wave = decode_video(data, GEOMETRY, with_sound=True).wave
    lead = sound_from - pictures_from if abs(sound_from - pictures_from) >= 0.2 else 0.0
    seconds = 1 + lead if kind == "mp4" else 2
    assert wave.shape == (num_samples,) and num_samples == pytest.approx(16_000 * seconds, abs=2_100)  # AAC's frames
    loud = np.flatnonzero(np.abs(wave) > 0.1)
    assert loud[0] == pytest.approx(16_000 * max(0.0, lead), abs=1_100)
    assert loud[-1] == pytest.approx(16_000 * (1 + lead), abs=1_100)


def test_a_damaged_frame_of_h264_is_refused_where_ffmpeg_knows_of_it():
    """FFmpeg makes up what is missing of a frame and goes on; sometimes it says so."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("h264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.thread_count = 1
        rng = np.random.default_rng(0)
        for _ in range(20):
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    data, found = out.getvalue(), []
    decode_video(data, GEOMETRY)
    body = data.index(b"mdat")
    for at in range(body + 1_000, body + 20_000, 500):
        try:
            decode_video(data[:at] + b"\xaa" * 6 + data[at + 6 :], GEOMETRY)
        except ValueError as error:
            found.append(str(error))
    assert any("cannot decode the video: its frame at" in message for message in found)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "video is empty"),
        (b"no video", "cannot read video of 8 bytes"),
        (video([0, 0.1])[:300], "video is cut short: its box 'moov'"),
    ],
)
def test_a_broken_file_is_named(data, message):
    with pytest.raises(ValueError, match=message):
        decode_video(data, GEOMETRY)


def test_a_silent_file_whose_sound_is_wanted_is_named():
    with pytest.raises(ValueError, match="has no sound, but its part says use_audio_in_video"):
        video_facts("v", video([0, 0.1]), with_sound=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["user\nassistant\nwhat moves? a cat, a dog\n"] * 8, 350, out)
    return out


def sample(has_sound: bool, data: bytes | None = None) -> Sample:
    part = {"type": "video", "video": "v.mp4", "use_audio_in_video": has_sound}
    content = {
        "messages": [
            {"role": "user", "content": [part, {"type": "text", "text": "what moves?"}]},
            {"role": "assistant", "content": "a cat"},
        ]
    }
    data = data or video([n / 10 for n in range(20)], tones=30_000)
    return Sample("video", "shard.tar", "k", content, {"json": json.dumps(content).encode(), "v.mp4": data})


@pytest.mark.parametrize(
    ("stage", "size", "seconds", "frames", "tokens"),
    [
        ("s2_general", (1_280, 720), 10, 20, 10 * 18 * 33),
        ("s2_general", (1_280, 720), 100, 78, 39 * 9 * 16),
        ("s2_general", (320, 240), 100, 78, 39 * 10 * 14),
        ("s3_long_context", (1_280, 720), 600, 318, 159 * 9 * 16),
        ("s3_long_context", (320, 240), 600, 318, 159 * 10 * 14),
    ],
)
def test_a_long_video_fits_the_context_of_its_stage(stage, size, seconds, frames, tokens):
    """With its sound, under the limits of the published size's recipe; grids by hand."""
    recipe = yaml.safe_load((Path(__file__).parents[2] / "recipes/qwen3_omni_30b_a3b.yaml").read_text())
    (own,) = (entry["overrides"] for entry in recipe["stages"] if entry["stage"] == stage)
    config = load(stage, [*recipe["overrides"], *(value for value in own if not value.startswith("+init"))])
    grid = video_grid(*size, 25 * seconds, 25.0, media_geometry(config.model.vision))
    assert (2 * grid[0], math.prod(grid) // 4) == (frames, tokens)
    assert tokens + 13 * seconds + 64 < config.stage.context


@pytest.mark.parametrize("has_sound", [False, True])
def test_the_index_counts_the_tokens_that_the_encoder_makes(folder, has_sound):
    """For any size, rate and length of picture and sound, more frames than the limit among them."""
    geometry = replace(GEOMETRY, video_max_frames=12, video_total_pixels=20_000)
    encoder, describe = Encoder(load_tokenizer(folder), geometry), Describe(folder)
    rng = random.Random(0)
    found = set()
    for _ in range(25):
        fps = rng.choice([Fraction(1), Fraction(5, 2), Fraction(6), Fraction(24_000, 1001), Fraction(30)])
        num_frames = rng.randrange(1, 1 + int(6 * fps))
        size = rng.randrange(16, 120), rng.randrange(16, 120)
        tones = rng.randrange(1, 60_000) if has_sound else 0
        clip = sample(has_sound, steady_video(num_frames, fps, size, tones, grey))
        document = encoder.encode(clip)
        facts = SampleFacts("k", 0, 512, *describe("k", clip.members))
        assert document.num_tokens == encoder.num_tokens(facts), (fps, size, tones)
        assert document.modality == ("video_audio" if has_sound else "video")
        ids = document.input_ids.tolist()
        assert ids.count(encoder.ids.video_pad) == np.prod(document.video_grids[0]) // 4
        assert (ids.count(encoder.ids.audio_pad) > 0) == has_sound == bool(document.mels)
        found.add(document.video_grids[0][0])
    assert found == {1, 2, 3, 4, 5, 6}


def test_sound_stands_between_the_frames_by_time(folder):
    encoder = Encoder(load_tokenizer(folder), GEOMETRY)
    document = encoder.encode(sample(True))
    ids = document.input_ids.tolist()
    start, end = ids.index(encoder.ids.audio_start), ids.index(encoder.ids.audio_end)
    assert ids[start - 1] == encoder.ids.vision_start and ids[end + 1] == encoder.ids.vision_end
    between = ids[start + 1 : end]
    assert set(between) == {encoder.ids.video_pad, encoder.ids.audio_pad}
    times = video_token_times(document.video_grids[0], document.video_seconds_per_grid[0], GEOMETRY)
    heard = seen = 0
    for token in between:
        if token == encoder.ids.video_pad:
            assert heard >= times[seen], "everything heard before this frame stands before it"
            seen += 1
        else:
            assert seen == len(times) or times[seen] > heard
            heard += 1
