"""The configuration's error, and its hint."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """Something in the configuration that a user can mend; the message says what, where and how."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """'; did you mean ...' or the list of valid choices, for an error message."""
    choices = sorted(choices)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"valid: {', '.join(choices)}"
