"""``onecycle schedules``: every schedule, or all about one."""

from __future__ import annotations

import argparse
from typing import TextIO

from engine.distributed.environment import OK

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = (
        "List every schedule with a little curve of its learning rate, or print one's "
        "parameters, units, defaults, formula and an example block."
    )
    parser.add_argument(
        "type", metavar="TYPE", nargs="?", help="a scheduler type, such as OneCycle"
    )


def run(args: argparse.Namespace, out: TextIO) -> int:
    """List all schedules, or print one's page."""
    from engine.display.catalog import listing, page
    from schedules.core.registry import find

    for line in page(find(args.type)) if args.type else listing():
        print(line, file=out)
    return OK
