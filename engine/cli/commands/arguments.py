"""Argument types and options shared by several subcommands."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from schedules import Schedule

__all__ = [
    "SET_HELP",
    "add_allow_imports",
    "add_examples",
    "add_set",
    "find_schedule",
    "find_schedule_name",
    "parse_positive_int",
]

_LARGEST = 2**53

SET_HELP = (
    "override a config value, such as optimizer.params.lr=0.01; can be repeated. VALUE is JSON, or "
    "a string without quotes"
)


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


def add_set(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--set`` to a parser."""
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=SET_HELP)


def add_examples(parser: argparse.ArgumentParser, *examples: str) -> None:
    """Add example commands to the end of a parser's help.

    A unit test runs each example. The examples may use the files ds_config.json, other.json,
    train.py, hostfile and losses.csv, and the ``checkpoints`` directory.
    """
    lines = "".join(f"\n  {example}" for example in examples)
    parser.epilog = f"{parser.epilog or ''}\n\nexamples:{lines}"


def find_schedule_name(name: str) -> str | None:
    """Return the name of a built-in or registered schedule, matched case-insensitively.

    Return None if the name is unknown.
    """
    from schedules import SCHEDULES

    if name in SCHEDULES:
        return name
    return {known.lower(): known for known in SCHEDULES}.get(name.lower())


def find_schedule(name: str) -> type[Schedule[Any]]:
    """Return the schedule class with the given name (case-insensitive) or import path.

    Raises:
        ValueError: if the name is unknown, or the imported object is not a schedule. For an unknown
            name, the message may suggest a similar one.
    """
    from schedules.core.registry import find, suggest

    try:
        return find(find_schedule_name(name) or name)
    except ValueError as error:
        if ":" in name:
            raise
        near = suggest(name)
        fix = f"Did you mean `{near}`?" if near else "Run `onecycle schedules` for a list."
        raise ValueError(f"Unknown schedule `{name}`. {fix}") from error
