"""Argument types that several commands share."""

from __future__ import annotations

import argparse

__all__ = ["positive"]


def positive(text: str) -> int:
    """Parse an integer >= 1; for the `type` of an argparse argument."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, but is {text!r}")
    return int(text)
