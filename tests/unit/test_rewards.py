"""Rewards: each rule by hand, the weighted sum, and what happens when one fails."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from omni_train.config import ConfigError
from omni_train.config.post_training import GspoConfig, RewardConfig
from omni_train.rollout.rewards import (
    Answered,
    RewardError,
    Rewards,
    build_rule,
    character_accuracy,
    exact,
    matches,
    number_in,
    numeric,
    overlong,
    word_accuracy,
)


def said(*texts: str, reference: str = "red dog runs", num_tokens: int = 3) -> list[Answered]:
    return [Answered(text, reference, "what is said?", num_tokens) for text in texts]


def test_exact_looks_at_what_follows_the_reasoning():
    answers = said("red dog runs", " Red dog runs\n", "red dog", "<think>red dog?</think>\n\nred dog runs", "")
    assert exact(answers) == [1, 1, 0, 1, 0]
    assert exact(said("<think>red dog runs</think>", reference="red dog runs")) == [0]


@pytest.mark.parametrize(
    "text, number",
    [("12", 12), ("it is 1,234.5!", 1234.5), ("3 and 4 make 7.", 7), ("−3", -3), ("-0.5", -0.5), ("none", None)],
)
def test_the_last_number_of_a_text(text, number):
    assert number_in(text) == number


def test_numeric_compares_numbers_not_texts():
    assert numeric(said("7", "the sum is 7.0", "8", "seven", "7 or 8", reference="7")) == [1, 1, 0, 0, 0]
    with pytest.raises(ValueError, match="'many' holds no number"):
        numeric(said("7", reference="many"))


def test_transcripts_earn_one_minus_their_error_rate():
    # Of three words: none wrong, one dropped, one wrong and one added, nothing said, five wrong ones (never below 0).
    answers = said("red dog runs", "red dog", "red cat runs fast", "", "a b c d e")
    assert word_accuracy(answers) == pytest.approx([1, 2 / 3, 1 / 3, 0, 0])
    assert character_accuracy(said("ab", "abcd", "", reference="abcd")) == pytest.approx([0.5, 1, 0])
    with pytest.raises(ValueError, match="reference is empty"):
        word_accuracy(said("a", reference=" "))


def test_format_matches_the_whole_answer_with_its_reasoning():
    rule = matches(r"<think>.+</think>\s*\d+")
    assert rule(said("<think>1 and\n2</think>\n\n3", "3", "<think>1</think> 3 apples")) == [1, 0, 0]


def test_overlong_falls_in_a_line_over_the_last_tokens():
    rule = overlong(limit=10, buffer=4)
    answers = [Answered("", "", "", num_tokens) for num_tokens in (1, 6, 7, 9, 10, 12)]
    assert rule(answers) == [0, 0, -0.25, -0.75, -1, -1]


def rewards_of(**config: RewardConfig) -> Rewards:
    return Rewards({name: build_rule(name, own, 10) for name, own in config.items()}, config, ["speech", "digits"])


def test_the_reward_is_the_weighted_sum_of_the_rules_that_apply():
    rewards = rewards_of(
        right=RewardConfig(rule="numeric", weight=1.0),
        form=RewardConfig(rule="format", pattern=r"\d+", weight=0.5, sources=["digits"]),
        length=RewardConfig(rule="overlong", buffer=5, weight=2.0),
    )
    answers = [Answered("7", "7", "", 6), Answered("seven", "7", "", 1)]
    total, by_rule = rewards("digits", answers)
    assert total.tolist() == pytest.approx([1 + 0.5 - 2 * 0.2, 0])
    assert {name: values.tolist() for name, values in by_rule.items()} == {
        "right": [1, 0],
        "form": [1, 0],
        "length": [-0.2, 0],
    }
    total, by_rule = rewards("speech", answers)
    assert total.tolist() == pytest.approx([1 - 2 * 0.2, 0]) and set(by_rule) == {"right", "length"}


@pytest.mark.parametrize(
    "rule, expected",
    [
        (lambda answers: [math.nan, 1.0], "reward 'own' is not finite for the answer 'a'"),
        (lambda answers: [1.0, math.inf], "reward 'own' is not finite for the answer 'b'"),
        (lambda answers: [1.0], "reward 'own' gave 1 values for 2 answers"),
        (lambda answers: [{}["missing"]], "reward 'own' failed: KeyError: 'missing'"),
        (lambda answers: 1 / 0, "reward 'own' failed: ZeroDivisionError"),
    ],
)
def test_a_rule_that_fails_is_named(rule, expected):
    rewards = Rewards({"own": rule}, {"own": RewardConfig(rule="exact")}, ["speech"])
    with pytest.raises(RewardError, match=expected):
        rewards("speech", said("a", "b"))


def test_a_source_that_no_rule_counts_for_is_an_error():
    rewards = rewards_of(right=RewardConfig(rule="exact", sources=["digits"]))
    with pytest.raises(RewardError, match="no reward counts for source 'speech'"):
        rewards("speech", said("a"))
    with pytest.raises(ConfigError, match="rewards.right.sources: no source is called 'digit'; did you mean 'digits'"):
        rewards_of(right=RewardConfig(rule="exact", sources=["digit"]))


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"rule": "exakt"}, "no rule is called 'exakt'; did you mean 'exact'"),
        ({"rule": "format"}, "rule format needs 'pattern'"),
        ({"rule": "exact", "pattern": "a"}, "rule exact has no use for 'pattern'"),
        ({"rule": "format", "pattern": "(a"}, "is no regular expression"),
        ({"rule": "overlong"}, "rule overlong needs 'buffer'"),
        ({"rule": "model"}, "rule model needs 'folder'"),
    ],
)
def test_wrong_settings_are_named(settings, expected):
    with pytest.raises(ConfigError, match=expected):
        RewardConfig(**settings)


def test_gspo_needs_rewards_and_sane_clipping():
    with pytest.raises(ConfigError, match="nothing to learn from"):
        GspoConfig(rewards={})
    with pytest.raises(ConfigError, match="clip_low"):
        GspoConfig(rewards={"right": RewardConfig(rule="exact")}, clip_low=1.5)


def test_a_local_reward_model_scores_question_and_answer(tmp_path):
    from support import tokenizer_folder
    from transformers import Qwen3Config, Qwen3ForSequenceClassification

    from omni_train.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_folder())
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=320, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, num_labels=1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = Qwen3ForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    rule = build_rule("judge", RewardConfig(rule="model", folder=str(tmp_path)), 10)
    scores = rule(said("a cat", "a dog"))
    text = "<|im_start|>user\nwhat is said?<|im_end|>\n<|im_start|>assistant\na cat<|im_end|>\n"
    with torch.no_grad():
        expected = model(torch.tensor([tokenizer.encode(text)])).logits.item()
    assert scores[0] == pytest.approx(expected, abs=1e-6) and scores[0] != scores[1]
    assert np.isfinite(scores).all()
    with pytest.raises(ConfigError, match="rewards.judge.folder 'nowhere' does not exist"):
        build_rule("judge", RewardConfig(rule="model", folder="nowhere"), 10)
