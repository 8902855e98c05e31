import io
import json
import pickle

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from omni_train.data.chatml import Describe
from omni_train.data.codes import speech_member
from omni_train.data.contracts import MODALITIES, Sample, SampleFacts
from omni_train.data.encode import Encoder, collate, dummy_pack
from omni_train.data.media_tokens import MediaGeometry
from omni_train.data.tokenizer import load_tokenizer, train_tokenizer

RNG = np.random.default_rng(0)
GEOMETRY = MediaGeometry(patch_size=8, min_pixels=1_024, max_pixels=65_536)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["user\nassistant\nwhat is this? a cat, a dog\n"] * 8, 350, out)
    return out


@pytest.fixture(scope="module")
def encoder(folder):
    return Encoder(load_tokenizer(folder), GEOMETRY)


def audio(num_samples, rate=16_000):
    out = io.BytesIO()
    soundfile.write(out, RNG.standard_normal(num_samples) * 0.1, rate, format="FLAC")
    return out.getvalue()


def picture(width, height):
    out = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def sample(content, **members):
    return Sample("source", "shard.tar", "k", content, {"json": json.dumps(content).encode(), **members})


def mixed():
    parts = [{"type": "audio", "audio": "a"}, {"type": "image", "image": "i"}, {"type": "audio", "audio": "b"}]
    content = {
        "messages": [
            {"role": "user", "content": [*parts, {"type": "text", "text": "what is this?"}]},
            {"role": "assistant", "content": "a cat"},
        ]
    }
    return sample(content, a=audio(16_000), b=audio(11_111, 22_050), i=picture(70, 40))


TEXT = sample({"text": "a cat, a dog, what is this?"})


def test_labels_are_the_reply_and_its_end(encoder):
    document = encoder.encode(mixed())
    kept = document.labels != -100
    np.testing.assert_array_equal(document.labels[kept], document.input_ids[kept])
    assert encoder.tokenizer.decode(document.labels[kept]) == "a cat<|im_end|>"


def test_all_text_keeps_everything_but_media_and_the_first_token(encoder):
    document = Encoder(encoder.tokenizer, GEOMETRY, "all_text").encode(mixed())
    kept = document.labels != -100
    ids = encoder.ids
    media = (ids.audio_start, ids.audio_pad, ids.audio_end, ids.vision_start, ids.image_pad, ids.vision_end)
    expected = ~np.isin(document.input_ids, media)
    expected[0] = False
    np.testing.assert_array_equal(kept, expected)


def test_placeholders_are_as_many_as_features(encoder):
    document = encoder.encode(mixed())
    # 1 s → 13 tokens; 11,111 at 22,050 Hz → 8,062 samples → 50 frames → 7 tokens
    # 40 / 16 = 2.5 → 2 (half to even), 70 / 16 = 4.4 → 4: 32 × 64 pixels
    assert [mel.shape for mel in document.mels] == [(128, 100), (128, 50)]
    assert document.image_grids == [(1, 4, 8)] and document.image_patches[0].shape == (32, 384)
    assert (document.input_ids == encoder.ids.audio_pad).sum() == 13 + 7
    assert (document.input_ids == encoder.ids.image_pad).sum() == 8
    assert document.modality == "image"


def test_index_foretells_the_length(encoder, folder):
    describe = Describe(folder)
    for one in (mixed(), TEXT):
        facts = SampleFacts("k", 0, 0, *describe(one.key, one.members))
        assert encoder.num_tokens(facts) == encoder.encode(one).num_tokens


def test_plain_text_alone_may_be_cut(encoder, folder):
    turns = [{"role": "user", "content": "a cat"}, {"role": "assistant", "content": "a dog"}]
    for one, may_be_cut in ((TEXT, True), (sample({"messages": turns}), False), (mixed(), False)):
        facts = SampleFacts("k", 0, 0, *Describe(folder)(one.key, one.members))
        assert encoder.is_splittable(facts) is may_be_cut


def test_a_pickled_encoder_gives_the_same_document(encoder):
    one = mixed()
    again = pickle.loads(pickle.dumps(encoder)).encode(one)
    np.testing.assert_array_equal(again.input_ids, encoder.encode(one).input_ids)
    np.testing.assert_array_equal(again.mels[1], encoder.encode(one).mels[1])


def test_a_text_is_cut_into_documents_that_lose_nothing(encoder):
    whole = encoder.encode(TEXT)
    parts = [encoder.encode(TEXT, start, stop) for start, stop in ((0, 5), (5, 9), (9, whole.num_tokens))]
    np.testing.assert_array_equal(np.concatenate([part.input_ids for part in parts]), whole.input_ids)
    for part in parts:
        assert part.labels[0] == -100
        np.testing.assert_array_equal(part.labels[1:], part.input_ids[1:])
        np.testing.assert_array_equal(part.position_ids, np.tile(np.arange(part.num_tokens), (3, 1)))
    assert whole.input_ids[-1] == encoder.ids.endoftext


def test_errors_name_the_sample(encoder):
    one = mixed()
    del one.members["b"]
    with pytest.raises(
        ValueError, match=r"sample source/shard\.tar/k: message 0 names audio member 'b'.*has a, i, json"
    ):
        encoder.encode(one)
    one.members["b"] = audio(100)
    with pytest.raises(ValueError, match=r"shard\.tar/k: member 'b': audio of 100 samples"):
        encoder.encode(one)
    with pytest.raises(ValueError, match="token range 3–900 does not lie in its"):
        encoder.encode(TEXT, 3, 900)
    with pytest.raises(ValueError, match="would cut a document with image"):
        encoder.encode(mixed(), 1)
    with pytest.raises(ValueError, match="no assistant message"):
        encoder.prompt_and_answer(TEXT)


def test_a_reply_that_only_calls_a_tool_has_no_text_to_compare_with(encoder):
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [{"name": "a", "arguments": {}}]}]
    prompt, answer = encoder.prompt_and_answer(Sample("s", "s.tar", "0", {"messages": messages}, {}))
    assert answer == "" and prompt.num_tokens > 0
    assert speech_member({"messages": messages}) is None


def test_prompt_is_the_start_of_the_training_document(encoder):
    one = mixed()
    prompt, answer = encoder.prompt_and_answer(one)
    whole = encoder.encode(one)
    np.testing.assert_array_equal(prompt.input_ids, whole.input_ids[: prompt.num_tokens])
    np.testing.assert_array_equal(prompt.position_ids, whole.position_ids[:, : prompt.num_tokens])
    assert encoder.tokenizer.decode(prompt.input_ids).endswith("<|im_start|>assistant\n")
    assert answer == "a cat" and (prompt.labels == -100).all() and len(prompt.mels) == 2


def test_pack_by_hand(encoder):
    image, text = encoder.encode(mixed()), encoder.encode(TEXT, 0, 4)
    pack = collate([text, image, text], audio_window_sec=[2, 5])
    n = image.num_tokens
    assert pack.cu_seqlens.tolist() == [0, 4, 4 + n, 8 + n] and pack.cu_seqlens.dtype == torch.int32
    ids = text.input_ids.tolist()
    assert pack.input_ids[:4].tolist() == ids == pack.input_ids[-4:].tolist()
    assert pack.shift_labels[:4].tolist() == [*ids[1:], -100] == pack.shift_labels[-4:].tolist()
    labels = pack.shift_labels[4 : 4 + n]
    assert labels[-1] == -100
    np.testing.assert_array_equal(labels[:-1].numpy(), image.labels[1:])
    assert pack.position_ids[0].tolist() == [*range(4), *range(n), *range(4)]
    np.testing.assert_array_equal(pack.position_ids[1:, 4 : 4 + n].numpy(), image.position_ids)
    assert pack.doc_modality.tolist() == [MODALITIES.index(m) for m in ("text", "image", "text")]
    assert pack.mel.shape == (128, 150) and pack.mel_lengths.tolist() == [100, 50]
    np.testing.assert_array_equal(pack.mel[:, 100:].numpy(), image.mels[1])
    assert pack.audio_window_sec.tolist() == [2, 5]
    assert pack.image_grid_thw.tolist() == [[1, 4, 8]] and pack.pixel_values.shape == (32, 384)
    assert pack.sample_ids == ["source/shard.tar/k"] * 3


def test_empty_media_have_no_rows_but_their_width_and_type(encoder):
    pack = collate([encoder.encode(TEXT)], patch_dim=384)
    assert pack.mel.shape == (128, 0) and pack.pixel_values.shape == pack.pixel_values_videos.shape == (0, 384)
    assert pack.image_grid_thw.shape == pack.video_grid_thw.shape == (0, 3)
    assert pack.mel_lengths.shape == pack.audio_window_sec.shape == (0,)
    assert pack.image_grid_thw.dtype == pack.mel_lengths.dtype == torch.int64
    assert collate([encoder.encode(mixed())]).audio_window_sec.tolist() == [8, 8]


def test_dummy_pack_has_no_label_and_the_same_types_as_a_full_one(encoder):
    pack, full = dummy_pack(GEOMETRY, encoder.ids), collate([encoder.encode(mixed())])
    assert (pack.shift_labels == -100).all() and pack.num_tokens == 2 and pack.sample_ids == []
    assert pack.cu_seqlens.tolist() == [0, 2] and pack.position_ids.tolist() == [[0, 1]] * 4
    for name in pack.__slots__:
        mine, other = getattr(pack, name), getattr(full, name)
        if isinstance(mine, torch.Tensor):
            assert mine.dtype == other.dtype and mine.ndim == other.ndim, name


def test_what_cannot_be_packed_is_refused(encoder):
    with pytest.raises(ValueError, match="at least one document"):
        collate([])
    with pytest.raises(ValueError, match="1 audio windows are given for 2 clips"):
        collate([encoder.encode(mixed())], audio_window_sec=[8])
    with pytest.raises(ValueError, match="did you mean 'all_text'"):
        Encoder(encoder.tokenizer, GEOMETRY, "alltext")
