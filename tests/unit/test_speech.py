"""Waves for the codec: frames counted as encoded, cut and padded; codes into new shards and out again."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import webdataset

from omni_train.config import LayoutConfig
from omni_train.data.codes import add_codes, speech_member
from omni_train.data.contracts import MediaFacts, Sample, SampleFacts
from omni_train.data.encode import RangeError, collate
from omni_train.data.media_tokens import codec_num_frames
from omni_train.data.shard import DataError, SampleScan
from omni_train.data.speech import SpeechEncoder
from omni_train.data.talker_sequence import CODES, read_codes

FRAME = 1920


def noise(num_samples: int, seed: int = 0) -> np.ndarray:
    return (0.3 * np.random.default_rng(seed).standard_normal(num_samples)).clip(-1, 1).astype(np.float32)


def flac(wave: np.ndarray, rate: int = 24_000) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format="FLAC", subtype="PCM_24")
    return file.getvalue()


def messages(*names: str, role: str = "assistant") -> dict:
    parts = [{"type": "text", "text": "hello"}, *({"type": "audio", "audio": name} for name in names)]
    return {"messages": [{"role": "user", "content": "say: hello"}, {"role": role, "content": parts}]}


def sample(**members: bytes) -> Sample:
    named = {name.replace("_", "."): data for name, data in members.items()}
    return Sample("talk", "talk.tar", "0", messages(*named), named)


@pytest.mark.parametrize("rate", [16_000, 22_050, 24_000, 48_000])
@pytest.mark.parametrize("num_samples", [3_000, 12_345])
def test_a_document_has_as_many_tokens_as_the_planner_counted(rate, num_samples):
    facts = SampleFacts("0", 0, 0, 5, [MediaFacts("a.flac", "audio", num_samples=num_samples, sample_rate_hz=rate)])
    document = SpeechEncoder().encode(sample(a_flac=flac(noise(num_samples), rate)))
    assert document.num_tokens == SpeechEncoder().num_tokens(facts) == codec_num_frames(num_samples, rate)
    assert len(document.waves[0]) == (2 * num_samples * 24_000 + rate) // (2 * rate)


def test_text_alone_is_refused():
    with pytest.raises(ValueError, match="sample 7 has no audio"):
        SpeechEncoder().num_tokens(SampleFacts("7", 0, 0, 5))


def test_pieces_of_a_recording_are_its_frames():
    wave = noise(4 * FRAME + 100)
    given = sample(a_flac=flac(wave))
    whole = SpeechEncoder().encode(given).waves[0]
    pieces = [SpeechEncoder().encode(given, *span).waves[0] for span in ((0, 2), (2, 4), (4, 5))]
    assert [len(piece) for piece in pieces] == [2 * FRAME, 2 * FRAME, 100]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    with pytest.raises(RangeError, match="frames 4–6 do not lie in its 5"):
        SpeechEncoder().encode(given, 4, 6)


def test_clips_of_a_sample_follow_each_other_and_stay_apart():
    given = sample(a_flac=flac(noise(FRAME + 10)), b_flac=flac(noise(3 * FRAME, seed=1)))
    document = SpeechEncoder().encode(given)
    assert document.num_tokens == 5 and [len(wave) for wave in document.waves] == [FRAME + 10, 3 * FRAME]
    part = SpeechEncoder().encode(given, 1, 4)
    assert [len(wave) for wave in part.waves] == [10, 2 * FRAME]


def test_what_aut_hears_is_cut_at_the_same_frames():
    given = sample(a_flac=flac(noise(4 * FRAME + 100)))
    encoder = SpeechEncoder(with_mels=True)
    whole = encoder.encode(given).mels[0]
    assert whole.shape == (128, 5 * 8)
    np.testing.assert_array_equal(encoder.encode(given, 2, 4).mels[0], whole[:, 16:32])


def test_a_pack_pads_with_silence_to_whole_frames():
    documents = [SpeechEncoder().encode(sample(a_flac=flac(noise(n)))) for n in (FRAME + 10, 3 * FRAME)]
    pack = collate(documents)
    assert pack.waves.shape == (2, 3 * FRAME) and pack.wave_lengths.tolist() == [FRAME + 10, 3 * FRAME]
    assert not pack.waves[0, FRAME + 10 :].any() and pack.num_tokens == 2 + 3
    torch.testing.assert_close(pack.waves[1], torch.from_numpy(documents[1].waves[0]))
    dummy = SpeechEncoder().dummy()
    assert dummy.sample_ids == [] and dummy.waves.shape == (0, 0)


def test_the_speech_of_a_sample_is_its_last_replys():
    assert speech_member(messages("a.flac", "b.flac")) == "b.flac"
    assert speech_member(messages("a.flac", role="user")) == "a.flac"
    assert speech_member(messages()) is None and speech_member({"text": "no speech"}) is None
    with pytest.raises(ValueError, match="are all prompts"):
        speech_member(messages("a.flac", "b.flac", role="user"))


def first_samples(wave: np.ndarray) -> np.ndarray:
    """A stand-in for a codec: two codebooks, one frame a 1,920 samples."""
    frames = wave[: len(wave) // FRAME * FRAME].reshape(-1, FRAME)
    return np.stack([np.arange(len(frames)), np.abs(frames[:, 0] * 100).astype(int)])


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "talk-000000.tar"
    with webdataset.TarWriter(str(path), mtime=0.0) as writer:
        for n in range(3):
            content = messages("a.flac") if n else {"text": "no speech"}
            media = {"a.flac": flac(noise(n * FRAME, seed=n))} if n else {}
            writer.write({"__key__": f"k{n}", "json": json.dumps(content).encode(), **media})
    return path


def test_new_shards_hold_what_the_old_did_and_the_codes(shard, tmp_path):
    before, out = shard.read_bytes(), tmp_path / "new" / shard.name
    assert add_codes(shard, out, first_samples, LayoutConfig()) == 2
    assert shard.read_bytes() == before
    old, new = list(SampleScan(shard)), list(SampleScan(out))
    assert [s.key for s in new] == [s.key for s in old] == ["k0", "k1", "k2"]
    for one, other in zip(old, new, strict=True):
        assert {name: data for name, data in other.members.items() if name != CODES} == one.members
    assert CODES not in new[0].members
    found = np.load(io.BytesIO(new[2].members[CODES]))
    assert found.dtype == np.int16 and found.shape == (2, 2)
    np.testing.assert_array_equal(found, read_codes(new[2].members[CODES]))
    again = tmp_path / "again" / shard.name
    add_codes(out, again, first_samples, LayoutConfig())  # codes that are there are made anew
    assert again.read_bytes() == out.read_bytes()
    with pytest.raises(FileExistsError, match="codes go into new shards"):
        add_codes(shard, out, first_samples, LayoutConfig())


def test_a_shard_that_cannot_be_read_leaves_nothing_behind(shard, tmp_path):
    def fail(wave: np.ndarray) -> np.ndarray:
        raise ValueError("too loud")

    with pytest.raises(DataError, match="k1.*too loud|too loud.*k1"):
        add_codes(shard, tmp_path / "new" / "x.tar", fail, LayoutConfig())
    assert list((tmp_path / "new").iterdir()) == []
