"""``onecycle explain``: print the documentation of a validation rule."""

from __future__ import annotations

import argparse
from typing import TextIO

from engine.cli.commands.arguments import add_examples
from engine.display.terminal import format_rows, get_width, wrap
from engine.distributed.environment import OK

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onecycle explain`` to a parser."""
    parser.description = (
        "Print what a validation rule checks, why, and how to fix a violation. Without RULE, list "
        "all rules. `onecycle validate` prints the name of the violated rule in brackets."
    )
    parser.add_argument("rule", metavar="RULE", nargs="?", help="rule name, such as unknown-key")
    add_examples(parser, "onecycle explain", "onecycle explain unknown-key")


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Print a rule's documentation, or a list of all rules, and return the exit status."""
    from engine.config.rules.pages import RULEBOOK
    from schedules.core.spelling import find_nearest

    width = get_width(out)
    if args.rule is None:
        rows = [(name, page.summary) for name, page in RULEBOOK.items()]
        print(*format_rows(rows, width), sep="\n", file=out)
        return OK
    name = args.rule.lower()
    if name not in RULEBOOK:
        near = find_nearest(name, RULEBOOK)
        fix = f"Did you mean `{near}`?" if near else "Run `onecycle explain` to list all rules."
        raise ValueError(f"Unknown rule `{args.rule}`. {fix}")
    page = RULEBOOK[name]
    example = f"For example:  {page.example}" if page.example else ""
    shown = [text for text in (f"{name}: {page.summary}", page.reason, example, page.fix) if text]
    print("\n\n".join("\n".join(wrap(text, width, indent=0)) for text in shown), file=out)
    return OK
