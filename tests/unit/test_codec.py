"""The codec's parts: quantiser against naive formulas, causality, padding, revival; the teacher's frames."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from support import micro_model

from omni_train.config import CodecModelConfig
from omni_train.data.encode import collate
from omni_train.data.media_tokens import SAMPLES_PER_CODEC_FRAME as FRAME
from omni_train.data.speech import SpeechEncoder, document_of
from omni_train.models.build import build_encoder
from omni_train.models.codec import (
    CANDIDATES_PER_PACK,
    Codec,
    CodecEncoder,
    CodeStatistics,
    ResidualQuantizer,
    SpeechFeatures,
    codec_mel,
    draw_in_canonical_order,
    frame_mask,
    straight_through,
)

CONFIG = CodecModelConfig(encoder_dim=8, latent_dim=4, num_codebooks=3, codebook_size=8, ema_decay=0.9)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantizer(decay: float = 0.9, revive_below: float = 0.0) -> ResidualQuantizer:
    """With random codebooks, in training."""
    made = ResidualQuantizer(dataclasses.replace(CONFIG, ema_decay=decay, revive_below=revive_below))
    made.codebooks.copy_(noise(*made.codebooks.shape, seed=1))
    made.sizes.fill_(1.0)
    made.sums.copy_(made.codebooks)
    return made


def everything(made: ResidualQuantizer, latents: torch.Tensor) -> CodeStatistics:
    """The statistics of latents [B, T, D], all real."""
    made(latents, torch.ones(latents.shape[:2], dtype=torch.bool))
    return made.take_statistics()


def test_codes_are_those_of_a_search_by_hand_and_decode_to_the_sum_of_their_words():
    made, latents = quantizer(), noise(2, 5, 4)
    codes = made.encode(latents)
    for row, own in zip(latents.reshape(-1, 4), codes.reshape(-1, 3), strict=True):
        rest = row.clone()
        for book, code in zip(made.codebooks, own, strict=True):
            distances = [float((rest - word).square().sum()) for word in book]
            assert int(code) == int(np.argmin(distances))
            rest = rest - book[code]
    words = sum(made.codebooks[g][codes[..., g]] for g in range(3))
    assert torch.allclose(made.decode(codes), words)
    found = made(latents, torch.ones(2, 5, dtype=torch.bool))
    assert torch.equal(found.codes, codes) and torch.allclose(found.vectors, words, atol=1e-6)


def test_the_gradient_passes_straight_through_and_the_commitment_draws_latents_to_words():
    latents, words = noise(3, 4).requires_grad_(), noise(3, 4, seed=1).requires_grad_()
    weights = noise(3, 4, seed=2)
    passed = straight_through(latents, words)
    assert torch.allclose(passed, words)
    (passed * weights).sum().backward()
    assert torch.equal(latents.grad, weights) and words.grad is None

    made, latents = quantizer(), noise(1, 6, 4).requires_grad_()
    found = made(latents, torch.ones(1, 6, dtype=torch.bool))
    found.commitment.sum().backward()
    residual, expected, value = latents.detach(), torch.zeros(1, 6, 4), 0.0
    for book, code in zip(made.codebooks, found.codes.unbind(-1), strict=True):
        residual = residual - book[code]
        value = value + residual.square().mean(-1) / 3
        expected += 2 * residual / 4 / 3
    assert torch.allclose(found.commitment, value, atol=1e-6)
    assert torch.allclose(latents.grad, expected, atol=1e-6)


def test_codebooks_move_by_the_exponential_average_of_what_was_assigned():
    made, latents = quantizer(decay=0.75), noise(2, 9, 4)
    before_sizes, before_sums = made.sizes.clone(), made.sums.clone()
    found = made(latents, torch.ones(2, 9, dtype=torch.bool))
    books = made.codebooks.clone()
    made.update(made.take_statistics(), seed=0)
    residual = latents.reshape(-1, 4)
    for g, code in enumerate(found.codes.reshape(-1, 3).T):
        for k in range(8):
            mine = residual[code == k]
            size = 0.75 * before_sizes[g, k] + 0.25 * len(mine)
            total = 0.75 * before_sums[g, k] + 0.25 * mine.sum(0)
            assert torch.allclose(made.sizes[g, k], size, atol=1e-6)
            assert torch.allclose(made.codebooks[g, k], total / size, atol=1e-5)
        residual = residual - books[g][code]


def test_padding_is_neither_counted_nor_revived():
    made, latents = quantizer(), noise(2, 4, 4)
    is_real = torch.tensor([[True, True, True, True], [True, False, False, False]])
    made(latents, is_real)
    found = made.take_statistics()
    assert found.counts.sum(-1).tolist() == [5.0, 5.0, 5.0]
    present = found.candidates[~found.candidates[:, 0, 0].isnan()]
    assert torch.equal(present[:, 0], latents[is_real])
    assert len(found.candidates) == CANDIDATES_PER_PACK


def test_statistics_of_packs_add_up_to_those_of_one_pack():
    latents = noise(4, 6, 4)
    whole = everything(quantizer(), latents)
    parts = quantizer()
    for pack in latents.split(2):
        parts(pack, torch.ones(2, 6, dtype=torch.bool))
    found = parts.take_statistics()
    assert torch.equal(found.counts, whole.counts) and torch.allclose(found.sums, whole.sums, atol=1e-6)


def test_dead_codewords_are_revived_by_latents_the_same_for_a_seed_and_any_order_of_ranks():
    latents = noise(4, 6, 4)
    statistics = everything(quantizer(), latents)
    shuffled = dataclasses.replace(statistics, candidates=statistics.candidates.flip(0))

    def revived(given: CodeStatistics, seed: int) -> ResidualQuantizer:
        made = quantizer(revive_below=0.95)
        made.update(given, seed)
        return made

    one, again, other = revived(statistics, 0), revived(shuffled, 0), revived(statistics, 1)
    dead = quantizer().sizes * 0.9 + 0.1 * statistics.counts < 0.95
    assert dead.any() and not dead.all()
    assert torch.equal(one.codebooks, again.codebooks)
    assert not torch.equal(one.codebooks[dead], other.codebooks[dead])
    assert torch.equal(one.codebooks[~dead], other.codebooks[~dead])
    assert (one.sizes[dead] == 1.0).all()
    candidates = statistics.candidates[~statistics.candidates[:, 0, 0].isnan()]
    for g in range(3):
        for word in one.codebooks[g][dead[g]]:
            assert (candidates[:, g] == word).all(-1).any()


def test_a_draw_is_the_same_in_any_order_of_what_is_drawn_from():
    vectors = noise(20, 4)
    draws = [
        draw_in_canonical_order(given, 7, torch.Generator().manual_seed(3)) for given in (vectors, vectors.flip(0))
    ]
    assert torch.equal(*draws) and len({tuple(row.tolist()) for row in draws[0]}) > 1


def test_evaluation_leaves_no_statistics():
    made = quantizer().eval()
    made(noise(1, 3, 4), torch.ones(1, 3, dtype=torch.bool))
    assert made.noted == []


def test_use_is_the_share_of_codewords_over_the_threshold():
    made = quantizer(revive_below=0.5)
    made.sizes[0, :3] = 0.1
    assert made.usage().tolist() == [21.0, 24.0]


@pytest.fixture(scope="module")
def encoder() -> CodecEncoder:
    torch.manual_seed(0)
    return CodecEncoder(CONFIG).eval()


def test_latents_see_the_past_and_half_an_analysis_window_ahead(encoder):
    wave = noise(1, 12 * FRAME)
    changed = wave.clone()
    changed[:, 6 * FRAME + 512 :] += 1.0
    before, after = (encoder.latents(codec_mel(x)) for x in (wave, changed))
    assert before.shape == (1, 12, 4)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6:], after[:, 6:])


def test_a_clip_has_the_codes_that_it_has_alone(encoder):
    encoder.quantizer.codebooks.copy_(noise(3, 8, 4))
    clip = noise(1, 3 * FRAME)
    batch = torch.zeros(2, 7 * FRAME)
    batch[0, : 3 * FRAME], batch[1] = clip, noise(7 * FRAME, seed=1)
    codes = encoder.encode(batch)
    assert codes.shape == (2, 3, 7) and codes.dtype == torch.int64
    assert torch.equal(codes[:1, :, :3], encoder.encode(clip))


def pack_of(*lengths: int):
    waves = [noise(n, seed=n).numpy() for n in lengths]
    return collate([document_of(f"d{n}", [wave], -(-len(wave) // FRAME)) for n, wave in enumerate(waves)])


def test_the_codec_gives_back_mel_of_the_shape_it_hears_and_masks_what_is_padding():
    torch.manual_seed(0)
    codec = Codec(CONFIG, semantic_dim=5)
    output = codec(pack_of(2 * FRAME, FRAME + 250))
    assert output["predicted"].shape == output["mel"].shape == (2, 80, 16)
    assert output["semantic"].shape == (2, 2, 5)
    assert output["frames"].tolist() == [2, 2]
    assert output["is_mel"].sum(-1).tolist() == [16, 10]  # 1,920 + 250 samples reach into the tenth hop of 240


def test_a_pack_without_sound_reaches_every_parameter_and_moves_none():
    torch.manual_seed(0)
    codec = Codec(CONFIG)
    output = codec(SpeechEncoder().dummy())
    assert output["frames"].tolist() == [0] and not output["is_mel"].any()
    (output["predicted"] * 0.0).sum().backward()
    missing = [name for name, p in codec.named_parameters() if p.grad is None]
    assert missing == []
    assert codec.codec_encoder.quantizer.take_statistics().counts.sum() == 0


def test_frames_that_start_before_the_end_of_a_clip_are_real():
    assert frame_mask(torch.tensor([0, 1, 240, 241]), 3, 240).tolist() == [
        [False, False, False],
        [True, False, False],
        [True, False, False],
        [True, True, False],
    ]


def test_the_teacher_has_a_feature_a_codec_frame_between_those_of_aut():
    torch.manual_seed(0)
    model = micro_model(4)
    teacher = SpeechFeatures(build_encoder(model, "audio", seed=0)).eval()
    documents = []
    for number, frames in enumerate((5, 9)):
        document = document_of(f"d{number}", [noise(frames * FRAME, seed=number).numpy()], frames)
        document.mels = [noise(128, 8 * frames, seed=number).numpy()]
        documents.append(document)
    pack = collate(documents, [8, 8])
    features = teacher(pack)
    assert features.shape == (2, 9, model.audio.d_model)
    assert torch.equal(features[0, 5:], torch.zeros(4, model.audio.d_model))
    alone = teacher(collate(documents[:1], [8]))
    assert torch.allclose(features[:1, :5], alone, atol=1e-5)
    assert not torch.allclose(features[0, 0], features[0, 4], atol=1e-3)
