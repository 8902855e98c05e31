"""Progress of a stage for the person who watches it: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as RichProgress

from omni_train.reporting.formatting import MISSING, MODALITY_ORDER, format_count, format_duration, sort_modalities

WINDOW_SEC = 30.0
LINE_INTERVAL_SEC = 5.0


class Progress:
    """Shows stage, tokens done of total, tokens/s, time left, loss per modality, learning rate and gradient norm.

    ``done_tokens`` is where a resumed stage starts; only tokens of this process count towards the rate, which is taken
    over the last 30 seconds. ``enabled`` is False on every rank but one. Tests pass ``clock`` (seconds) and ``stream``.
    """

    def __init__(
        self,
        stage: str,
        total_tokens: int,
        *,
        done_tokens: int = 0,
        enabled: bool,
        clock: Callable[[], float] = time.monotonic,
        stream: TextIO | None = None,
    ) -> None:
        self.stage = stage
        self.total_tokens = total_tokens
        self.done_tokens = done_tokens
        self.enabled = enabled
        self._clock = clock
        self._stream = stream if stream is not None else sys.stdout
        self._window: deque[tuple[float, int]] = deque([(clock(), done_tokens)])
        self._metrics: dict[str, float] = {}
        self._printed_at: float | None = None
        self._printed_tokens = -1
        self._bar: RichProgress | None = None
        if enabled and self._stream.isatty():
            self._bar = RichProgress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=20),
                TaskProgressColumn(),
                TextColumn("{task.fields[detail]}"),
                console=Console(file=self._stream),
            )
            self._task = self._bar.add_task(stage, total=total_tokens, completed=done_tokens, detail=self._detail())
            self._bar.start()

    def update(self, tokens: int, metrics: dict[str, float]) -> None:
        """Adds ``tokens`` (the tokens of this step, not the sum so far) and shows ``metrics``.

        Read from ``metrics``: ``loss`` or ``loss/<modality>``, ``lr`` or ``lr/<component>``, ``grad_norm`` or
        ``grad_norm/<engine>``. A modality that a step has no token of keeps the value it showed last.
        """
        self.done_tokens += tokens
        self._metrics |= metrics
        now = self._clock()
        self._window.append((now, self.done_tokens))
        while len(self._window) > 2 and self._window[1][0] <= now - WINDOW_SEC:
            self._window.popleft()
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done_tokens, detail=self._detail())
        elif self._printed_at is None or now - self._printed_at >= LINE_INTERVAL_SEC:
            self._print_line(now)

    def close(self) -> None:
        """Ends the bar, or prints the last line if it was not yet printed; a second call does nothing."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        elif self.enabled and self._printed_tokens != self.done_tokens:
            self._print_line(self._clock())
        self.enabled = False

    @property
    def tokens_per_second(self) -> float | None:
        """The rate over the window, or None before the first step."""
        (first_sec, first_tokens), (last_sec, last_tokens) = self._window[0], self._window[-1]
        return (last_tokens - first_tokens) / (last_sec - first_sec) if last_sec > first_sec else None

    def _print_line(self, now: float) -> None:
        percent = 100 * self.done_tokens / self.total_tokens if self.total_tokens else 100.0
        detail = self._detail().replace("\n", " · ")
        print(f"{self.stage} {percent:.0f}% {detail}", file=self._stream, flush=True)
        self._printed_at, self._printed_tokens = now, self.done_tokens

    def _detail(self) -> str:
        """Two lines, so that nothing is cut off on a narrow terminal: how far the stage is, and its metrics."""
        rate = self.tokens_per_second
        left_sec = max(self.total_tokens - self.done_tokens, 0) / rate if rate else None
        parts = [
            f"{format_count(self.done_tokens)}/{format_count(self.total_tokens)} tokens",
            f"{format_count(rate)} tok/s" if rate else f"{MISSING} tok/s",
            f"ETA {format_duration(left_sec)}",
        ]
        return "\n".join(" · ".join(line) for line in (parts, describe_metrics(self._metrics)) if line)


def describe_metrics(metrics: dict[str, float]) -> list[str]:
    """The parts of a progress line: losses (nats), learning rate (its range over components), gradient norm."""
    parts = []
    losses = {key.removeprefix("loss/"): value for key, value in metrics.items() if key.startswith("loss/")}
    whole = [f"{metrics['loss']:.3f}"] if "loss" in metrics and not set(losses) & set(MODALITY_ORDER) else []
    if losses or whole:
        named = [f"{name} {losses[name]:.3f}" for name in sort_modalities(set(losses))]
        parts.append("loss " + " ".join(whole + named))
    rates = [value for key, value in metrics.items() if key == "lr" or key.startswith("lr/")]
    if rates:
        low, high = min(rates), max(rates)
        parts.append(f"lr {high:.2e}" if low == high else f"lr {low:.2e}…{high:.2e}")
    norms = [value for key, value in metrics.items() if key == "grad_norm" or key.startswith("grad_norm/")]
    if norms:
        parts.append("grad " + " ".join(f"{norm:.2f}" for norm in norms))
    return parts
