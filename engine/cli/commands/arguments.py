"""Argument types and options shared by several subcommands."""

from __future__ import annotations

import argparse

__all__ = ["add_allow_imports", "parse_positive_int"]

_LARGEST = 2**53


def parse_positive_int(text: str) -> int:
    """Parse a command-line value as an integer from 1 to 2**53.

    Pass this function to ``ArgumentParser.add_argument`` as ``type``.
    """
    if not text.isdecimal() or len(text) > 16 or not 0 < int(text) <= _LARGEST:
        shown = text if len(text) <= 20 else f"{text[:20]}…"
        raise argparse.ArgumentTypeError(f"must be an integer from 1 to {_LARGEST}, got {shown!r}")
    return int(text)


def add_allow_imports(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--allow-imports`` to a parser."""
    parser.add_argument(
        "--allow-imports",
        action="store_true",
        help="import and run the code that the config names, such as a custom schedule. Use this "
        "option only if you trust the config",
    )
