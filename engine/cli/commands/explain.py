"""``onecycle explain``: print the documentation of a validation rule."""

from __future__ import annotations

import argparse
from typing import TextIO

from engine.distributed.environment import OK

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onecycle explain`` to a parser."""
    parser.description = (
        "Print what a validation rule checks, why, and how to fix it. Without RULE, list all "
        "rules. `onecycle validate` prints the rule of each problem in brackets."
    )
    parser.add_argument("rule", metavar="RULE", nargs="?", help="rule name, such as unknown-key")


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Print the documentation of a rule, or a one-line summary of each rule."""
    from engine.config.rules.pages import RULEBOOK
    from schedules.core.spelling import find_nearest

    if args.rule is None:
        width = max(map(len, RULEBOOK))
        for name, page in RULEBOOK.items():
            print(f"{name:{width}}  {page.summary}", file=out)
        return OK
    if args.rule not in RULEBOOK:
        near = find_nearest(args.rule, RULEBOOK)
        fix = f"Did you mean `{near}`?" if near else "Run `onecycle explain` to list all rules."
        raise ValueError(f"Unknown rule `{args.rule}`. {fix}")
    page = RULEBOOK[args.rule]
    example = f"\n\nFor example:\n  {page.example}" if page.example else ""
    print(f"{args.rule}: {page.summary}\n\n{page.reason}{example}\n\n{page.fix}", file=out)
    return OK
