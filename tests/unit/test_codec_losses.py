"""Losses of codec and Code2Wav against formulas by hand."""

from __future__ import annotations

import math

import pytest
import torch

from omni_train.config import ReconstructionConfig
from omni_train.data.speech import SpeechEncoder
from omni_train.models.spectrogram import log_mel, magnitudes
from omni_train.objectives.code2wav import (
    SCALES,
    STFT_SIZES,
    adversarial_loss,
    code2wav_losses,
    discriminator_loss,
    feature_matching_loss,
    multi_scale_mel_loss,
    multi_scale_stft_loss,
)
from omni_train.objectives.codec import clip_means, codec_losses, mel_regression, num_frames, semantic_distance


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_mean_over_a_clip_leaves_out_what_lies_behind_it():
    values = torch.tensor([[[1.0, 2.0, 100.0], [3.0, 4.0, 100.0]], [[5.0, 9.0, 9.0], [7.0, 9.0, 9.0]]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert clip_means(values, mask).tolist() == [2.5, 6.0]
    assert clip_means(values, torch.zeros_like(mask)).tolist() == [0.0, 0.0]


def test_mel_regression_by_hand():
    """One band, 8 frames: fine |Δ| are 0 … 7 (mean 3.5); averages over four are 1.5 and 5.5 (mean 3.5) apart."""
    predicted, mel = torch.arange(8.0)[None, None], torch.zeros(1, 1, 8)
    assert mel_regression(predicted, mel, torch.ones(1, 8, dtype=torch.bool)).item() == pytest.approx(3.5)
    signs = torch.tensor([1.0, -1.0] * 4)[None, None]  # cancels where it is averaged
    assert mel_regression(signs, mel, torch.ones(1, 8, dtype=torch.bool)).item() == pytest.approx(0.5)
    half = torch.tensor([[True] * 4 + [False] * 4])
    assert mel_regression(predicted, mel, half).item() == pytest.approx(1.5)


@pytest.mark.parametrize("which", ["mel", "stft"])
def test_multi_scale_losses_are_means_over_scales_of_mean_differences(which):
    wave, target, lengths = noise(2, 4096), noise(2, 4096, seed=1), torch.tensor([4096, 2048])
    scales = SCALES if which == "mel" else [(size, None) for size in STFT_SIZES]
    expected = torch.zeros(2)
    for size, mels in scales:
        hop = size // 4
        if mels:
            difference = (log_mel(wave, size, hop, mels) - log_mel(target, size, hop, mels)).abs()
        else:
            difference = (magnitudes(wave, size, hop) / magnitudes(target, size, hop)).log().abs()
        for row, length in enumerate(lengths.tolist()):
            expected[row] += difference[row, :, : length // hop].mean() / len(scales)
    loss = multi_scale_mel_loss if which == "mel" else multi_scale_stft_loss
    assert torch.allclose(loss(wave, target, lengths), expected, rtol=1e-4)
    assert loss(target, target, lengths).tolist() == [0.0, 0.0]


def test_semantic_distance_is_one_minus_the_cosine():
    features = torch.tensor([[[1.0, 0.0], [1.0, 1.0], [9.0, 9.0]]])
    teacher = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]]])
    mask = torch.tensor([[True, True, False]])
    assert semantic_distance(features, teacher, mask).item() == pytest.approx((1 - math.sqrt(0.5)) / 2, abs=1e-6)


def test_adversarial_losses_by_hand():
    """Two discriminators with one layer and scores. Hinge: real 0.5 → 0.5, 2 → 0; fake −0.5 → 0.5, 1 → 2, −3 → 0."""
    real = [[torch.tensor([2.0, 4.0]), torch.tensor([0.5, 2.0])], [torch.tensor([1.0]), torch.tensor([2.0])]]
    fake = [[torch.tensor([1.0, 4.0]), torch.tensor([-0.5, 1.0])], [torch.tensor([3.0]), torch.tensor([-3.0])]]
    assert discriminator_loss(real, fake).item() == pytest.approx(((0.25 + 1.25) + (0 + 0)) / 2)
    assert adversarial_loss(fake).item() == pytest.approx(((1.5 + 0) / 2 + 4) / 2)
    assert feature_matching_loss(real, fake).item() == pytest.approx((0.5 / 3 + 2 / 1) / 2)


def output(frames=(3, 1)) -> dict[str, torch.Tensor]:
    return {
        "predicted": noise(2, 4, 24),
        "mel": noise(2, 4, 24, seed=1),
        "is_mel": torch.ones(2, 24, dtype=torch.bool),
        "is_real": torch.tensor([[True] * 3, [True, False, False]]),
        "frames": torch.tensor(frames),
        "commitment": torch.tensor([[1.0, 2.0, 3.0], [5.0, 100.0, 100.0]]),
        "usage": torch.tensor([3.0, 4.0], dtype=torch.float64),
        "semantic": noise(2, 3, 5),
        "teacher": noise(2, 3, 5, seed=1),
    }


def test_the_codecs_sums_weigh_a_clip_by_its_frames():
    given = output()
    found = codec_losses(given, ReconstructionConfig(commitment=0.5, semantic=2.0))
    mel, commitment, semantic = found.terms
    each = mel_regression(given["predicted"], given["mel"], given["is_mel"])
    assert mel.sum.item() == pytest.approx(float(3 * each[0] + each[1]), rel=1e-6)
    assert (commitment.sum.item(), commitment.weight) == (pytest.approx(3 * 2.0 + 5.0), 0.5)
    assert (semantic.name, semantic.weight) == ("semantic", 2.0)
    assert {term.engine for term in found.terms} == {"codec"} and {term.per for term in found.terms} == {"tokens"}
    assert found.reported["codec/codewords_in_use"].tolist() == [3.0, 4.0]
    assert [term.name for term in codec_losses(given, ReconstructionConfig()).terms] == ["mel", "commitment"]


def test_code2wavs_terms_belong_to_their_engines():
    given = {
        "wave": noise(2, 4096),
        "target": noise(2, 4096, seed=1),
        "lengths": torch.tensor([4096, 2048]),
        "frames": torch.tensor([2, 1]),
    }
    maps = {name: [[noise(2, 3, seed=n), noise(2, 1, seed=n)]] for n, name in enumerate(("real", "fake", "generated"))}
    weights = ReconstructionConfig(stft=0.5, adversarial=0.1, feature_matching=2.0)
    found = {term.name: term for term in code2wav_losses(given, weights, maps).terms}
    each = multi_scale_mel_loss(given["wave"], given["target"], given["lengths"])
    assert found["mel"].sum.item() == pytest.approx(float(2 * each[0] + each[1]), rel=1e-6)
    assert found["discriminator"].engine == "discriminators"
    assert {found[name].engine for name in ("mel", "stft", "adversarial", "features")} == {"code2wav"}
    assert found["adversarial"].sum.item() == pytest.approx(3 * adversarial_loss(maps["generated"]).item(), rel=1e-6)
    assert (found["adversarial"].weight, found["features"].weight, found["stft"].weight) == (0.1, 0.2, 0.5)
    assert list(t.name for t in code2wav_losses(given, ReconstructionConfig(), None).terms) == ["mel"]


def test_a_pack_counts_its_frames_and_a_dummy_nothing():
    dummy = SpeechEncoder().dummy()
    assert num_frames(dummy) == {"tokens": 0}
    dummy.sample_ids = ["one"]
    assert num_frames(dummy) == {"tokens": 1}
