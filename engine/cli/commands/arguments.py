"""What the arguments of several commands have in common."""

from __future__ import annotations

import argparse

__all__ = ["INVALID", "OK", "USAGE", "positive"]

OK, INVALID, USAGE = 0, 1, 2
"""Exit statuses: done, the config is wrong, wrong usage or a file that cannot be read."""


def positive(text: str) -> int:
    """Return a whole number of at least 1, as an argument's type."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, but is {text!r}")
    return int(text)
