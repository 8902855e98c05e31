"""Rollouts (C2): the training forward gives the log-probabilities that answers were sampled with, for every kind of
prompt, with and without expert parallelism, and others when the media are swapped."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from stock import MICRO, config_of, encoder_of, perturb, sample
from support import run_ranks, shard_all, tokenizer_folder

from omni_train.config import ComponentConfig
from omni_train.config.post_training import SamplingConfig
from omni_train.data.contracts import Document, Prompt
from omni_train.data.encode import collate
from omni_train.data.pipeline import media_geometry
from omni_train.data.tokenizer import load_tokenizer
from omni_train.engine import parallel
from omni_train.engine.deepspeed import build_engine
from omni_train.engine.export import write_processor
from omni_train.engine.parallel import Ranks
from omni_train.models.build import build_thinker, thinker_config
from omni_train.models.head import token_losses_at
from omni_train.models.thinker import Thinker, compose
from omni_train.rollout.sample import Answer, ThinkerSampler
from omni_train.rollout.source import continued, pack_answers

KINDS = ("text", "image", "audio", "video_audio")
COPIES = 3
SAMPLING = SamplingConfig(max_new_tokens=10, temperature=0.8, top_p=0.98, top_k=200)
TOLERANCE = 1e-4


def build(tokenizer: str) -> Thinker:
    thinker = build_thinker(thinker_config(MICRO, load_tokenizer(tokenizer)), seed=0)
    perturb(thinker)
    torch.nn.init.normal_(thinker.lm_head.weight, std=0.3, generator=torch.Generator().manual_seed(1))
    return compose(thinker).eval()


def prompts_of(kinds, media: Path, tokenizer: str) -> list[Prompt]:
    encoder = encoder_of(tokenizer)
    return [Prompt(encoder.prompt_and_answer(sample(kind, media))[0]) for kind in kinds]


def to_pack(documents: list[Document]):
    return collate(documents, patch_dim=media_geometry(MICRO.vision).patch_dim)


def sampler_of(thinker: Thinker, stop_id: int, batch: int = 64, is_open: Callable[[bool], bool] = bool):
    return ThinkerSampler(thinker, SAMPLING, to_pack, stop_id=stop_id, batch=batch, is_open_anywhere=is_open)


def answers_to(thinker: Thinker, prompts: list[Prompt], stop_id: int, **settings) -> list[list[Answer]]:
    keys = [f"7/{prompt.document.sample_id}" for prompt in prompts]
    return sampler_of(thinker, stop_id, **settings)(prompts, keys, COPIES)


def gaps(forward, prompts: list[Prompt], answers: list[list[Answer]]) -> list[float]:
    """For each prompt the largest difference between sampled and trained log-probabilities; one pack for all."""
    found = []
    for prompt, own in zip(prompts, answers, strict=True):
        documents = [(continued(prompt.document, answer, "a"), answer, 0.0) for answer in own]
        pack = pack_answers(documents, to_pack)
        with torch.no_grad():
            log_probabilities = -forward(pack, token_losses_at(SAMPLING.temperature))["losses"]
        sampled = pack.sampled_log_probabilities[pack.shift_labels != -100]
        assert len(sampled) == sum(len(answer.tokens) for answer in own)
        assert torch.equal(sampled, torch.from_numpy(np.concatenate([answer.log_probabilities for answer in own])))
        found.append(float((log_probabilities - sampled).abs().max()))
    return found


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    write_processor(MICRO, folder)
    load_tokenizer(tokenizer_folder()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def thinker():
    return build(tokenizer_folder())


@pytest.fixture(scope="module")
def prompts(media):
    return prompts_of(KINDS, media, tokenizer_folder())


@pytest.fixture(scope="module")
def answers(thinker, prompts):
    return answers_to(thinker, prompts, stop_id=-1)


def same(a: list[list[Answer]], b: list[list[Answer]]) -> bool:
    """Token for token, and log-probabilities up to the rounding of other batch mates."""
    return all(
        np.array_equal(x.tokens, y.tokens)
        and np.allclose(x.log_probabilities, y.log_probabilities, atol=TOLERANCE)
        and x.is_ended == y.is_ended
        for own, other in zip(a, b, strict=True)
        for x, y in zip(own, other, strict=True)
    )


def test_the_training_forward_reproduces_the_sampled_log_probabilities(thinker, prompts, answers):
    found = gaps(thinker, prompts, answers)
    print("\nlargest gap by kind:", {kind: f"{gap:.1e}" for kind, gap in zip(KINDS, found, strict=True)})
    assert max(found) < TOLERANCE
    tokens = {tuple(answer.tokens) for own in answers for answer in own}
    assert len(tokens) == len(KINDS) * COPIES, "answers to a prompt, and to different prompts, differ"


@pytest.mark.parametrize("kind", KINDS[1:])
def test_with_other_media_the_log_probabilities_are_others(kind, thinker, prompts, answers):
    n = KINDS.index(kind)
    original = prompts[n].document
    swapped = dataclasses.replace(
        original,
        mels=[mel[:, ::-1].copy() for mel in original.mels],
        image_patches=[patches[::-1].copy() for patches in original.image_patches],
        video_patches=[patches[::-1].copy() for patches in original.video_patches],
    )
    (gap,) = gaps(thinker, [Prompt(swapped)], [answers[n]])
    assert gap > 100 * TOLERANCE
    if kind == "video_audio":  # its sound alone, its frames alone
        for part in ("mels", "video_patches"):
            half = dataclasses.replace(original, **{part: getattr(swapped, part)})
            assert gaps(thinker, [Prompt(half)], [answers[n]])[0] > 100 * TOLERANCE


def test_an_answer_does_not_hang_on_batch_mates_or_order(thinker, prompts, answers):
    assert same(answers_to(thinker, prompts, stop_id=-1, batch=COPIES), answers)
    assert same(answers_to(thinker, prompts[::-1], stop_id=-1)[::-1], answers)


def test_an_answer_ends_with_its_stop_token_and_its_log_probability(thinker, prompts, answers):
    stop_id = int(answers[1][0].tokens[3])
    ended = sum(answers_to(thinker, prompts, stop_id=stop_id), [])
    for stopped, whole in zip(ended, sum(answers, []), strict=True):
        where = np.flatnonzero(whole.tokens == stop_id)
        length = int(where[0]) + 1 if len(where) else SAMPLING.max_new_tokens
        assert stopped.tokens.tolist() == whole.tokens[:length].tolist() and stopped.is_ended == bool(len(where))
        assert np.allclose(stopped.log_probabilities, whole.log_probabilities[:length], atol=TOLERANCE)
    assert any(len(answer.tokens) < SAMPLING.max_new_tokens for answer in ended)


def sample_on_rank(ranks: Ranks, tokenizer: str, media: str, zero_stage: int) -> tuple[list[list[Answer]], list[float]]:
    """Answers of this rank's prompts by a trained engine, its experts shared; ranks end at different lengths."""
    config = config_of(expert_parallel=2, folder=tokenizer)
    config.engine.zero_stage = zero_stage
    thinker = build(tokenizer)
    components = {name: ComponentConfig(lr=1e-3) for name in config.stage.components}
    with shard_all():
        engine = build_engine(thinker, config.engine, config.stage, components, micro_batches=1)
    folder = Path(media) / f"rank{ranks.rank}"
    folder.mkdir(exist_ok=True)
    prompts = prompts_of(KINDS[ranks.rank :: 2], folder, tokenizer)
    engine.train()
    answers = answers_to(
        engine.module, prompts, stop_id=-1, is_open=lambda is_open: parallel.any_rank(is_open, ranks.device)
    )
    assert engine.module.training, "sampling leaves the mode as it was"
    found = gaps(engine, prompts, answers)
    short = answers_to(  # one rank's answers end at once
        engine.module,
        prompts,
        stop_id=int(answers[0][0].tokens[0]) if ranks.rank == 0 else -1,
        is_open=lambda is_open: parallel.any_rank(is_open, ranks.device),
    )
    assert len(short[0][0].tokens) == (1 if ranks.rank == 0 else SAMPLING.max_new_tokens)
    return answers, found


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_ranks_that_share_experts_sample_the_same_answers_in_lockstep(zero_stage, answers, media):
    first, second = run_ranks(2, sample_on_rank, tokenizer_folder(), str(media), zero_stage)
    found = [own for pair in zip(first[0], second[0], strict=True) for own in pair]
    assert same(found, answers)
    print(f"\nZeRO {zero_stage}, EP 2, largest gap: {max(first[1] + second[1]):.1e}")
    assert max(first[1] + second[1]) < TOLERANCE
