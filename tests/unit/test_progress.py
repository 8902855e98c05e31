"""The progress of a stage: rates over a window, plain lines in time, a bar on a terminal."""

from __future__ import annotations

import io

import pytest

from omni_train.reporting.formatting import format_count, format_duration, format_value, sort_modalities
from omni_train.reporting.progress import Progress, describe_metrics


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_come_every_five_seconds_and_at_the_end():
    clock, stream = Clock(), io.StringIO()
    progress = Progress("s1", 10_000, enabled=True, clock=clock, stream=stream)
    for _ in range(8):
        clock.now += 2.0
        progress.update(1_000, {"loss/text": 3.0})
    progress.close()
    progress.close()
    done = [line.split(" · ")[0] for line in stream.getvalue().splitlines()]
    # Updates at 2, 4, …, 16 s: the first, then the first at or after 5 s since the last line, then the end.
    assert done == [
        "s1 10% 1.00k/10.0k tokens",
        "s1 40% 4.00k/10.0k tokens",
        "s1 70% 7.00k/10.0k tokens",
        "s1 80% 8.00k/10.0k tokens",
    ]


def test_a_line_holds_rate_time_left_and_metrics():
    clock, stream = Clock(), io.StringIO()
    progress = Progress("s2", 100_000, done_tokens=40_000, enabled=True, clock=clock, stream=stream)
    clock.now += 4.0
    progress.update(20_000, {"loss": 3.2, "loss/audio": 3.4, "loss/text": 3.1, "lr/llm": 1e-3, "grad_norm/main": 1.25})
    # 20,000 tokens in 4 s; the 40,000 of before the resume do not count. 40,000 are left: 8 s.
    assert stream.getvalue() == (
        "s2 60% 60.0k/100k tokens · 5.00k tok/s · ETA 8s · loss text 3.100 audio 3.400 · lr 1.00e-03 · grad 1.25\n"
    )


def test_the_rate_forgets_a_slow_start():
    clock = Clock()
    progress = Progress("s1", 10**6, enabled=False, clock=clock)
    assert progress.tokens_per_second is None
    clock.now += 100.0  # the first step compiles
    progress.update(1_000, {})
    assert progress.tokens_per_second == 10.0
    for _ in range(30):
        clock.now += 1.0
        progress.update(1_000, {})
    assert progress.tokens_per_second == 1_000.0


def test_a_modality_keeps_its_last_value():
    clock, stream = Clock(), io.StringIO()
    progress = Progress("s1", 100, enabled=True, clock=clock, stream=stream)
    for metrics in ({"loss/text": 3.0, "loss/image": 5.0}, {"loss/text": 2.0}):
        clock.now += 6.0
        progress.update(10, metrics)
    assert stream.getvalue().splitlines()[-1].endswith("loss text 2.000 image 5.000")


def test_a_disabled_progress_prints_nothing():
    stream = io.StringIO()
    progress = Progress("s1", 100, enabled=False, clock=Clock(), stream=stream)
    progress.update(100, {"loss": 1.0})
    progress.close()
    assert stream.getvalue() == ""


def test_a_narrow_terminal_gets_a_bar_with_the_same_content(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    clock, stream = Clock(), Terminal()
    progress = Progress("s1_adapters", 200, enabled=True, clock=clock, stream=stream)
    clock.now += 2.0
    progress.update(100, {"loss/text": 3.125})
    progress.close()
    screen = " ".join(stream.getvalue().split())
    for part in ("s1_adapters", "50%", "100/200 tokens", "50 tok/s", "ETA 2s", "loss text 3.125"):
        assert part in screen


def test_learning_rates_are_a_range_and_a_lone_loss_is_shown():
    metrics = {"loss": 2.0, "lr/llm": 1e-4, "lr/audio_adapter": 1e-3, "grad_norm": 0.5}
    assert describe_metrics(metrics) == ["loss 2.000", "lr 1.00e-04…1.00e-03", "grad 0.50"]
    assert describe_metrics({"loss": 2.0, "loss/commitment": 0.004}) == ["loss 2.000 commitment 0.004"]
    assert describe_metrics({"loss": 2.0, "loss/text": 2.0, "loss/router": 1.0}) == ["loss text 2.000 router 1.000"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "–"), (0, "0"), (950, "950"), (1000, "1.00k"), (20_480, "20.5k"), (1_234_567, "1.23M"), (2.26e12, "2.26T")]
    + [(999_999, "1.00M"), (99_990, "100k"), (float("nan"), "–")],
)
def test_counts(count, text):
    assert format_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "–"), (41.6, "42s"), (59.7, "1m 00s"), (185, "3m 05s"), (7_800, "2h 10m"), (356_400, "4d 03h")],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (3, "3"), (0.0, "0.000"), (0.12345, "0.123"), (0.000123, "0.000123"), (12_345.0, "12.3k")]
    + [("nan", "nan"), (float("inf"), "inf")],
)
def test_values(value, text):
    assert format_value(value) == text


def test_modalities_keep_the_order_of_the_contract():
    assert sort_modalities({"router", "video", "text", "c0", "audio"}) == ["text", "audio", "video", "c0", "router"]
