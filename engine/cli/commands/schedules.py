"""``onecycle schedules``: list all schedules, or print the documentation of one."""

from __future__ import annotations

import argparse
from typing import TextIO

from engine.cli.commands.arguments import add_examples, find_schedule
from engine.display.terminal import get_width
from engine.distributed.environment import OK

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onecycle schedules`` to a parser."""
    parser.description = (
        "List all schedules, grouped by source, each with a small plot of its learning rate. With "
        "TYPE, print that schedule's formula, its parameters with their units and defaults, and an "
        "example block."
    )
    parser.add_argument("type", metavar="TYPE", nargs="?", help="schedule type, such as OneCycle")
    add_examples(parser, "onecycle schedules", "onecycle schedules OneCycle")


def run(args: argparse.Namespace, out: TextIO) -> int:
    """List all schedules or print the documentation of one, and return the exit status."""
    from engine.display.catalog import format_page, list_schedules

    width = get_width(out)
    lines = format_page(find_schedule(args.type), width) if args.type else list_schedules(width)
    for line in lines:
        print(line, file=out)
    return OK
