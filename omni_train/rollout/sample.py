"""Sampled answers with the training modules: what on-policy stages learn from.

    prompts ──Sampler──▶ for each, ``copies`` answers: tokens, their log-probabilities, whether they ended

An answer draws from random numbers of its own, keyed by a text: it does not hang on ranks, batch mates or the order of
work, and there is no generator whose state a checkpoint would have to hold. ``ThinkerSampler`` uses the weights in
training as they are; an engine outside (one that serves models) takes its place by the same call.

Shapes: D prompts, B answers being written (D × copies), V vocabulary.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from omni_train.config.post_training import SamplingConfig
from omni_train.data.contracts import Document, Pack, Prompt
from omni_train.models.thinker import Thinker
from omni_train.rollout.generate import IsOpen, extend, prefill


@dataclass(slots=True)
class Answer:
    """What was sampled: ``tokens`` int64 [n], the stop token included if it ``is_ended`` by one, and their log-
    probabilities in nats, float32 [n], of softmax(logits / temperature) before top-k and top-p cut it."""

    tokens: np.ndarray
    log_probabilities: np.ndarray
    is_ended: bool


class Sampler(Protocol):
    """Anything that answers prompts."""

    def __call__(self, prompts: Sequence[Prompt], keys: Sequence[str], copies: int) -> list[list[Answer]]:
        """``copies`` answers to each prompt; ``keys``, one a prompt, name the random numbers.

        Collective: all ranks call it equally often.
        """
        ...


def uniforms(key: str, count: int) -> np.ndarray:
    """``count`` random numbers in [0, 1), float64, that hang on ``key`` alone."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=16).digest()
    seed = int.from_bytes(digest, "little")
    return np.random.Generator(np.random.Philox(key=seed)).random(count)


def draw(
    logits_BV: Tensor, uniforms_B: Tensor, sampling: SamplingConfig, never: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """(tokens [B], their log-probabilities float32 [B]) by inverting each row's cumulative distribution.

    Of softmax(logits / temperature), the ids in ``never`` left out, only the ``top_k`` most likely tokens (0: all) take
    part, and of these the fewest that hold ``top_p`` of the whole.
    """
    log_probabilities = (logits_BV.float() / sampling.temperature).log_softmax(-1)
    probabilities = log_probabilities.double().exp()
    probabilities[:, list(never)] = 0.0
    ordered, order = probabilities.sort(stable=True, dim=-1, descending=True)
    if sampling.top_k:
        ordered[:, sampling.top_k :] = 0.0
    before = ordered.cumsum(-1) - ordered
    ordered = ordered.masked_fill(before >= sampling.top_p, 0.0)
    cumulative = ordered.cumsum(-1)
    rank = torch.searchsorted(cumulative, (uniforms_B * cumulative[:, -1])[:, None], right=True)
    tokens = order.gather(-1, rank)
    return tokens[:, 0], log_probabilities.gather(-1, tokens)[:, 0]


@torch.no_grad()
def sample(
    thinker: Thinker,
    pack: Pack,
    keys: Sequence[str],
    copies: int,
    sampling: SamplingConfig,
    *,
    stop_id: int,
    is_open_anywhere: IsOpen = bool,
) -> list[list[Answer]]:
    """``copies`` answers to each document of ``pack``, drawn by ``keys`` (one a document).

    Placeholders of media are never drawn: to whoever reads the answer they would stand for media that are not there.
    """
    llm = thinker.llm
    never = (llm.audio_token_id, llm.image_token_id, llm.video_token_id)
    device = pack.input_ids.device
    numbers = [uniforms(f"{key}/{copy}", sampling.max_new_tokens) for key in keys for copy in range(copies)]
    uniforms_BN = torch.from_numpy(np.stack(numbers)).to(device)
    tokens: list[list[int]] = [[] for _ in numbers]
    log_probabilities: list[list[float]] = [[] for _ in numbers]
    num_chosen = itertools.count()

    def choose(logits_BV: Tensor, rows_B: Tensor) -> Tensor:
        token, log_probability = draw(logits_BV, uniforms_BN[rows_B, next(num_chosen)], sampling, never)
        for row, own, log in zip(rows_B.tolist(), token.tolist(), log_probability.tolist(), strict=True):
            tokens[row].append(own)
            log_probabilities[row].append(log)
        return token

    logits, is_real, step, keep = prefill(llm, pack, thinker.towers(pack), copies)
    written = extend(
        logits,
        is_real,
        step,
        stop_id=stop_id,
        max_new_tokens=sampling.max_new_tokens,
        is_open_anywhere=is_open_anywhere,
        choose=choose,
        keep=keep,
    )
    answers = []
    for own, drawn, logs in zip(written, tokens, log_probabilities, strict=True):
        is_ended = len(own) < len(drawn) and drawn[len(own)] == stop_id
        length = len(own) + is_ended
        answers.append(Answer(np.array(drawn[:length]), np.array(logs[:length], np.float32), is_ended))
    return [answers[n : n + copies] for n in range(0, len(answers), copies)]


class ThinkerSampler:
    """Answers by a Thinker of ours, trained or frozen, ``batch`` at a time; ranks take equally many steps."""

    def __init__(
        self,
        thinker: Thinker,
        sampling: SamplingConfig,
        to_pack: Callable[[list[Document]], Pack],
        *,
        stop_id: int,
        batch: int,
        is_open_anywhere: IsOpen = bool,
    ) -> None:
        self.thinker, self.sampling, self.to_pack = thinker, sampling, to_pack
        self.stop_id, self.batch, self.is_open_anywhere = stop_id, batch, is_open_anywhere

    def __call__(self, prompts: Sequence[Prompt], keys: Sequence[str], copies: int) -> list[list[Answer]]:
        size = max(1, self.batch // copies)
        was_training = self.thinker.training
        self.thinker.eval()  # recomputed layers keep no cache
        found: list[list[Answer]] = []
        for first in range(0, len(prompts), size):
            part = slice(first, first + size)
            found += sample(
                self.thinker,
                self.to_pack([prompt.document for prompt in prompts[part]]),
                keys[part],
                copies,
                self.sampling,
                stop_id=self.stop_id,
                is_open_anywhere=self.is_open_anywhere,
            )
        self.thinker.train(was_training)
        return found
