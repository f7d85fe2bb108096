"""``onecycle schedules``: list all schedules, or print the documentation of one."""

from __future__ import annotations

import argparse
from typing import TextIO

from engine.distributed.environment import OK

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onecycle schedules`` to a parser."""
    parser.description = (
        "List every schedule with a small plot of its learning rate. With TYPE, print the formula, "
        "parameters, units, defaults and an example block of one schedule."
    )
    parser.add_argument("type", metavar="TYPE", nargs="?", help="schedule type, such as OneCycle")


def run(args: argparse.Namespace, out: TextIO) -> int:
    """List all schedules, or print the documentation of one."""
    from engine.display.catalog import format_page, list_schedules
    from schedules.core.registry import find

    for line in format_page(find(args.type)) if args.type else list_schedules():
        print(line, file=out)
    return OK
