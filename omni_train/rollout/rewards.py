"""Rewards of sampled answers: a weighted list of rules, each a small function over the answers to one prompt.

    answers + reference ──rule──▶ [N] ──weight──▶ Σ = the reward

A rule that raises, or gives a number that is not finite, is a RewardError that names the rule; the batch source writes
the sample down as a bad one within ``data.max_bad_samples``. What an answer says in ``<think>`` counts for ``format``
and ``overlong`` only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jiwer
import numpy as np
import torch

from omni_train.config import ConfigError, nearest
from omni_train.config.post_training import RewardConfig
from omni_train.data.chatml import final_answer

NUMBER = re.compile(r"[-−+]?\d[\d,]*(?:\.\d+)?")


class RewardError(ValueError):
    """A rule that failed on a sample."""


@dataclass(slots=True)
class Answered:
    """One answer to a prompt as text, without its stop token; ``is_ended`` if it has one. ``num_tokens`` counts it."""

    text: str
    reference: str
    question: str
    num_tokens: int
    is_ended: bool = True

    @property
    def final(self) -> str:
        """What is said after the reasoning, without white space around it."""
        return final_answer(self.text).strip()


Rule = Callable[[Sequence[Answered]], list[float]]
"""A reward for each of the answers to one prompt."""


def exact(answers: Sequence[Answered]) -> list[float]:
    """1 for the reference's very text, but for white space around it and upper case."""
    return [float(a.final.casefold() == a.reference.strip().casefold()) for a in answers]


def number_in(text: str) -> float | None:
    """The last number that a text writes in digits; None without one."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "").replace("−", "-")) if found else None


def numeric(answers: Sequence[Answered]) -> list[float]:
    """1 where the last number of the answer is the reference's. ValueError for a reference without a number."""
    rewards = []
    for answer in answers:
        expected = number_in(answer.reference)
        if expected is None:
            raise ValueError(f"the reference {answer.reference!r} holds no number")
        said = number_in(answer.final)
        rewards.append(float(said is not None and math.isclose(said, expected, rel_tol=1e-6, abs_tol=1e-9)))
    return rewards


def word_accuracy(answers: Sequence[Answered]) -> list[float]:
    """1 − word error rate of a transcript, at least 0. ValueError for an empty reference."""
    return [1.0 - min(1.0, jiwer.wer(_words(a), a.final.casefold() or " ")) for a in answers]


def character_accuracy(answers: Sequence[Answered]) -> list[float]:
    """1 − character error rate of a transcript, at least 0, for languages without spaces."""
    return [1.0 - min(1.0, jiwer.cer(_words(a), a.final.casefold() or " ")) for a in answers]


def _words(answer: Answered) -> str:
    if not answer.reference.strip():
        raise ValueError("the reference is empty: no transcript to compare with")
    return answer.reference.strip().casefold()


def matches(pattern: str) -> Rule:
    """1 where the whole answer, reasoning included, matches a regular expression (a dot matches line breaks too)."""
    compiled = re.compile(pattern, re.DOTALL)
    return lambda answers: [float(compiled.fullmatch(answer.text.strip()) is not None) for answer in answers]


def overlong(limit: int, buffer: int) -> Rule:
    """0 up to ``limit`` − ``buffer`` tokens, then down in a line to −1 at ``limit`` (Yu et al. 2025, arXiv 2503.14476,
    eq. 13)."""

    def rule(answers: Sequence[Answered]) -> list[float]:
        return [-min(1.0, max(0, answer.num_tokens - (limit - buffer)) / buffer) for answer in answers]

    return rule


class RewardModel:
    """A local transformers reward model: a sequence classifier with one output, whose score is the reward."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        model = AutoModelForSequenceClassification.from_pretrained(str(folder), local_files_only=True)
        if model.config.num_labels != 1:
            raise ConfigError(f"reward model '{folder}' has {model.config.num_labels} outputs; a reward is one number")
        self.model = model.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def __call__(self, answers: Sequence[Answered]) -> list[float]:
        """The score of (question, answer), as a chat where the tokenizer has a template, else as a pair of texts."""
        if self.tokenizer.chat_template:
            turns = [
                [{"role": "user", "content": a.question}, {"role": "assistant", "content": a.final}] for a in answers
            ]
            texts = [self.tokenizer.apply_chat_template(turn, tokenize=False) for turn in turns]
            rows = [self.tokenizer(text, return_tensors="pt", add_special_tokens=False) for text in texts]
        else:
            rows = [self.tokenizer(a.question, a.final, return_tensors="pt", truncation=True) for a in answers]
        # One by one: a score does not hang on how long the other answers are.
        scores = [self.model(**row.to(self.model.device)).logits for row in rows]
        return [float(score.squeeze()) for score in scores]


def build_rule(name: str, config: RewardConfig, max_new_tokens: int, device: torch.device | str = "cpu") -> Rule:
    """The function of a configured rule."""
    match config.rule:
        case "format":
            return matches(config.pattern)
        case "overlong":
            return overlong(max_new_tokens, config.buffer)
        case "model":
            if not Path(config.folder).is_dir():
                raise ConfigError(f"stage.gspo.rewards.{name}.folder '{config.folder}' does not exist")
            return RewardModel(Path(config.folder), device)
    return PLAIN[config.rule]


PLAIN: dict[str, Rule] = {
    "exact": exact,
    "numeric": numeric,
    "word_accuracy": word_accuracy,
    "character_accuracy": character_accuracy,
}
"""Rules without settings."""


class Rewards:
    """The weighted rules of a stage. A rule with ``sources`` counts for samples of these only."""

    def __init__(self, rules: Mapping[str, Rule], config: Mapping[str, RewardConfig], sources: Sequence[str]) -> None:
        for name, settings in config.items():
            for source in settings.sources:
                if source not in sources:
                    hint = nearest(source, sources)
                    raise ConfigError(f"stage.gspo.rewards.{name}.sources: no source is called '{source}'; {hint}")
        self.rules, self.config, self.sources = rules, config, list(sources)

    def __call__(self, source: str, answers: Sequence[Answered]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(rewards [N], what each rule that applies gave [N]) of the answers to one prompt. Raises RewardError."""
        total, by_rule = np.zeros(len(answers)), {}
        for name, rule in self.rules.items():
            settings = self.config[name]
            if settings.sources and source not in settings.sources:
                continue
            try:
                values = np.asarray(rule(answers), dtype=np.float64)
            except Exception as error:  # whatever a rule raises, the sample it stumbled over has to be named
                raise RewardError(f"reward '{name}' failed: {type(error).__name__}: {error}") from error
            if values.shape != total.shape:
                raise RewardError(f"reward '{name}' gave {values.size} values for {len(answers)} answers")
            if not np.isfinite(values).all():
                worst = answers[int(np.flatnonzero(~np.isfinite(values))[0])]
                raise RewardError(f"reward '{name}' is not finite for the answer {worst.text[:80]!r}")
            by_rule[name] = values
            total += settings.weight * values
        if not by_rule:
            raise RewardError(f"no reward counts for source '{source}'; give one without sources, or list it")
        return total, by_rule
