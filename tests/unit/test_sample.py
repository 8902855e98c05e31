"""Sampling: the distribution drawn from by hand, and random numbers that hang on nothing but their key."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from omni_train.config import ConfigError
from omni_train.config.post_training import SamplingConfig
from omni_train.rollout.sample import draw, uniforms

# Probabilities 0.5, 0.1, 0.3, 0.1 of tokens 0 … 3; in order of likelihood 0, 2, 1, 3.
LOGITS = torch.tensor([0.5, 0.1, 0.3, 0.1]).log()


def drawn(values: list[float], **settings) -> tuple[list[int], list[float]]:
    sampling = SamplingConfig(max_new_tokens=1, **settings)
    tokens, logs = draw(LOGITS.expand(len(values), 4), torch.tensor(values, dtype=torch.float64), sampling)
    return tokens.tolist(), logs.exp().tolist()


def test_a_uniform_number_picks_by_cumulative_probability():
    tokens, probabilities = drawn([0.0, 0.49, 0.51, 0.79, 0.81, 0.89, 0.91, 0.999999])
    assert tokens == [0, 0, 2, 2, 1, 1, 3, 3]
    assert probabilities == pytest.approx([0.5, 0.5, 0.3, 0.3, 0.1, 0.1, 0.1, 0.1])


def test_top_k_and_top_p_cut_the_tail_but_not_the_log_probability():
    # Of two tokens 0.5 and 0.3: the first up to 0.625.
    assert drawn([0.62, 0.63, 0.999999], top_k=2) == ([0, 2, 2], pytest.approx([0.5, 0.3, 0.3]))
    assert drawn([0.62, 0.63, 0.999999], top_p=0.79)[0] == [0, 2, 2]
    assert drawn([0.0, 0.999999], top_p=0.01)[0] == [0, 0]
    assert drawn([0.999999], top_p=0.81)[0] == [1]


def test_some_tokens_are_never_drawn():
    tokens, logs = draw(
        LOGITS.expand(2, 4), torch.tensor([0.0, 0.7]).double(), SamplingConfig(max_new_tokens=1), [0, 3]
    )
    assert tokens.tolist() == [2, 2] and logs.exp().tolist() == pytest.approx([0.3, 0.3])


def test_temperature_sharpens_and_the_log_probability_is_at_it():
    tokens, probabilities = drawn([0.68, 0.7], temperature=0.5)  # squares: 0.25, 0.01, 0.09, 0.01 of 0.36
    assert tokens == [0, 2] and probabilities == pytest.approx([0.25 / 0.36, 0.09 / 0.36])


def test_many_draws_follow_the_distribution():
    tokens, _ = drawn(uniforms("key", 20_000).tolist())
    shares = np.bincount(tokens, minlength=4) / len(tokens)
    assert shares == pytest.approx([0.5, 0.1, 0.3, 0.1], abs=4 * math.sqrt(0.25 / 20_000))


def test_random_numbers_hang_on_their_key_alone():
    first = uniforms("0/1/0/sample#2", 5)
    np.random.seed(3)
    torch.manual_seed(3)
    assert np.array_equal(uniforms("0/1/0/sample#2", 8)[:5], first)
    assert not np.array_equal(uniforms("0/1/0/sample#3", 5), first)
    assert ((first >= 0) & (first < 1)).all()


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SamplingConfig(max_new_tokens=1, **wrong)
