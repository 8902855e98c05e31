"""Answers written side by side: those that have ended are dropped, and nobody else notices."""

from __future__ import annotations

import random

import torch

from omni_train.rollout.generate import extend

STOP, VOCAB = 0, 11


class Scripts:
    """A language model that says a script a row, and counts the rows that it is asked for."""

    def __init__(self, scripts: list[list[int]]) -> None:
        self.scripts = scripts
        self.rows = torch.arange(len(scripts))
        self.asked: list[int] = []

    def logits(self, number: int) -> torch.Tensor:
        scripts = [self.scripts[row] for row in self.rows.tolist()]
        return torch.nn.functional.one_hot(torch.tensor([s[min(number, len(s) - 1)] for s in scripts]), VOCAB).float()

    def step(self, token: torch.Tensor, number: int, mask: torch.Tensor) -> torch.Tensor:
        assert len(token) == len(mask) == len(self.rows)
        self.asked.append(len(token))
        return self.logits(number)

    def keep(self, index: torch.Tensor) -> None:
        self.rows = self.rows[index]

    def answers(self, drops: bool, is_open_anywhere=bool) -> list[list[int]]:
        is_real = torch.ones(len(self.scripts), 4, dtype=torch.bool)
        return extend(
            self.logits(0),
            is_real,
            self.step,
            stop_id=STOP,
            max_new_tokens=20,
            is_open_anywhere=is_open_anywhere,
            keep=self.keep if drops else None,
        )


def test_dropping_ended_rows_changes_no_answer_and_saves_work():
    rng = random.Random(0)
    for _ in range(50):
        scripts = [[rng.randint(1, VOCAB - 1) for _ in range(rng.randint(0, 19))] + [STOP] for _ in range(9)]
        expected = [script[:-1] for script in scripts]
        whole, dropping = Scripts(scripts), Scripts(scripts)
        assert whole.answers(drops=False) == dropping.answers(drops=True) == expected
        assert len(whole.asked) == len(dropping.asked) and sum(dropping.asked) <= sum(whole.asked)
    assert sum(dropping.asked) < 0.8 * sum(whole.asked)


def test_a_rank_whose_rows_have_all_ended_goes_on_with_one_while_others_write():
    scripts = Scripts([[3, STOP], [STOP], [4, 5, STOP]])
    calls = iter([True] * 8 + [False])
    assert scripts.answers(drops=True, is_open_anywhere=lambda _: next(calls)) == [[3], [], [4, 5]]
    assert len(scripts.asked) == 8 and scripts.asked[-1] == 1


def test_an_answer_is_cut_at_the_most_tokens():
    scripts = Scripts([[2] * 40, [STOP], [STOP]])
    assert scripts.answers(drops=True) == [[2] * 20, [], []] and scripts.asked[1:] == [1] * 18
