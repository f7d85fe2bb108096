"""``onecycle explain``: the page of a rule."""

from __future__ import annotations

import argparse
from typing import TextIO

from engine.distributed.environment import OK

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = (
        "Print the page of a rule, as `onecycle validate` names it in brackets, or the "
        "list of all rules."
    )
    parser.add_argument("rule", metavar="RULE", nargs="?", help="a rule, such as unknown-key")


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Print a rule's page, or all rules with a line each."""
    from engine.config.rules.pages import RULEBOOK
    from schedules.core.spelling import nearest

    if args.rule is None:
        width = max(map(len, RULEBOOK))
        for name, page in RULEBOOK.items():
            print(f"{name:{width}}  {page.summary}", file=out)
        return OK
    if args.rule not in RULEBOOK:
        near = nearest(args.rule, RULEBOOK)
        cure = f"Did you mean `{near}`?" if near else "`onecycle explain` lists all rules."
        raise ValueError(f"{args.rule!r} is no rule. {cure}")
    page = RULEBOOK[args.rule]
    example = f"\n\nFor example:\n  {page.wrong}" if page.wrong else ""
    print(f"{args.rule}: {page.summary}\n\n{page.why}{example}\n\n{page.cure}", file=out)
    return OK
