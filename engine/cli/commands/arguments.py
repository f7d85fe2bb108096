"""Argument types shared by several subcommands."""

from __future__ import annotations

import argparse

__all__ = ["parse_positive_int"]


def parse_positive_int(text: str) -> int:
    """Parse an integer >= 1. Pass this function to ``add_argument`` as ``type``."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text!r}")
    return int(text)
