"""The recogniser that measures speech: what it learns, how it counts words; loading codecs from folders."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support import micro_model, run_ranks
from transformers import MimiConfig, MimiModel

from omni_train.config import ConfigError, to_dict
from omni_train.data.contracts import Sample
from omni_train.engine.parallel import Ranks
from omni_train.evaluation.speech import (
    Clip,
    Recogniser,
    batch,
    clips_of,
    edit_distance,
    train_recogniser,
    word_accuracy,
)
from omni_train.models.codec import Codec, codec_mel, load_codec

MAIN = Ranks(0, 1, 0, torch.device("cpu"))
WORDS = {"low": 300.0, "mid": 1200.0, "high": 4000.0}


def tone(word: str, seed: int) -> np.ndarray:
    """0.3 s of a tone that stands for a word, with noise."""
    time, rng = np.arange(7200) / 24_000, np.random.default_rng(seed)
    wave = 0.3 * np.sin(2 * np.pi * WORDS[word] * rng.uniform(0.95, 1.05) * time) * np.hanning(7200)
    return (wave + 0.01 * rng.standard_normal(7200)).astype(np.float32)


def clip(words: list[str], seed: int) -> Clip:
    return Clip(np.concatenate([tone(word, seed + n) for n, word in enumerate(words)]), " ".join(words))


def test_it_learns_to_write_down_what_it_hears():
    rng = np.random.default_rng(0)
    clips = [clip(rng.choice(list(WORDS), 2).tolist(), seed=10 * n) for n in range(48)]
    listener = train_recogniser(clips[:40], MAIN, seed=0, num_steps=60)
    waves, lengths = batch([c.wave for c in clips[40:]])
    heard = [listener.snap(text) for text in listener.hear(codec_mel(waves), lengths.tolist())]
    assert word_accuracy(list(zip(heard, [c.text for c in clips[40:]], strict=True))) > 0.9


def weights_on(ranks: Ranks) -> dict[str, np.ndarray]:
    clips = [clip([one, other], seed=n) for n, (one, other) in enumerate(itertools.product(WORDS, repeat=2))]
    return {
        name: value.numpy() for name, value in train_recogniser(clips, ranks, seed=0, num_steps=3).state_dict().items()
    }


@pytest.mark.slow
def test_ranks_train_the_same_recogniser_together():
    (alone,) = run_ranks(1, weights_on)
    for found in (rank for world in (2, 3) for rank in run_ranks(world, weights_on)):  # the third has no part
        for name, value in found.items():
            assert np.allclose(value, alone[name], atol=2e-6), name
    assert alone["blocks.0.1.num_batches_tracked"] == 1 and np.abs(alone["blocks.0.1.running_mean"]).max() > 1e-3


def test_words_are_counted_by_edits():
    assert word_accuracy([("red dog runs", "red dog runs"), ("red frog", "red dog runs")]) == pytest.approx(1 - 2 / 6)
    assert word_accuracy([("a b c d e", "x")]) == 0.0


def test_a_word_is_snapped_to_the_nearest_of_the_lexicon():
    assert [edit_distance(*pair) for pair in (("kitten", "sitting"), ("", "abc"), ("same", "same"))] == [3, 3, 0]
    assert Recogniser(["dog", "frog", "tiger"]).snap("frg dg") == "frog dog"


def test_repeats_and_blanks_are_taken_out_of_a_path():
    listener = Recogniser(["aab", "ab"])
    path = torch.tensor([[1, 1, 28, 1, 2, 2, 28, 28]])  # a a – a b b – –
    listener.forward = lambda mel: torch.nn.functional.one_hot(path, 29).transpose(1, 2).float()
    assert listener.hear(torch.zeros(1, 80, 16), [16 * 240]) == ["aab"]
    assert listener.hear(torch.zeros(1, 80, 16), [960]) == ["a"]  # of its first 20 ms and what follows: a a –


def test_text_that_the_recogniser_cannot_spell_is_refused():
    content = {"messages": [{"role": "assistant", "content": "größer"}]}
    with pytest.raises(ConfigError, match="measure tasks of plain words"):
        clips_of([Sample("s", "s.tar", "0", content, {})])


def test_our_codec_loads_from_its_export(tmp_path):
    torch.manual_seed(0)
    model = micro_model(4)
    codec = Codec(model.codec).eval()
    codec.codec_encoder.quantizer.codebooks.normal_()
    save_file(dict(codec.state_dict()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "omni_train_codec", "model": to_dict(model)}))
    wave = torch.randn(3 * 1920 - 7)
    found = load_codec(tmp_path)(wave.numpy())
    padded = torch.nn.functional.pad(wave, (0, 7))[None]
    assert found.shape == (model.codec.num_codebooks, 3)
    np.testing.assert_array_equal(found, codec.codec_encoder.encode(padded)[0].numpy())
    np.testing.assert_array_equal(load_codec(tmp_path, 1)(wave.numpy()), found[:1])
    with pytest.raises(ConfigError, match="5 codebooks are asked for"):
        load_codec(tmp_path, 5)


def test_mimi_loads_from_a_local_folder(tmp_path):
    config = MimiConfig(
        hidden_size=32,
        num_filters=4,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        codebook_size=16,
        codebook_dim=8,
        vector_quantization_hidden_dimension=8,
        num_quantizers=4,
        upsample_groups=32,
    )
    torch.manual_seed(0)
    mimi = MimiModel(config).eval()
    for name, buffer in mimi.named_buffers():
        if name.endswith("embed_sum"):
            buffer.normal_()
    mimi.save_pretrained(tmp_path)
    wave = 0.1 * torch.randn(3 * 1920 - 7)
    found = load_codec(tmp_path, 2)(wave.numpy())
    padded = torch.nn.functional.pad(wave, (0, 7))[None, None]
    with torch.no_grad():
        np.testing.assert_array_equal(found, mimi.encode(padded, num_quantizers=2).audio_codes[0].numpy())
    assert found.shape == (2, 3)


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="has no config.json"):
        load_codec(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="of model type 'bert'"):
        load_codec(tmp_path)
