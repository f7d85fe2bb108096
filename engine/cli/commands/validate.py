"""``onecycle validate``: report every problem in a config, with its location and fix."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from engine.cli.commands.arguments import (
    add_allow_imports,
    add_examples,
    add_set,
    parse_positive_int,
)
from engine.config import ConfigError, Problem, load_document
from engine.config.edits import apply_fixes
from engine.config.overrides import apply_assignments
from engine.config.parser import Document, parse
from engine.config.pointers import get_last_key
from engine.config.validate import check
from engine.config.wording import count_noun
from engine.display.problem_reports import FORMATS, Report
from engine.display.terminal import get_width, supports_color
from engine.distributed.environment import INVALID, OK, USAGE
from engine.errors import Fix, escape

__all__ = ["add_arguments", "run"]

_MAX_FIX_ROUNDS = 10
"""Maximum number of times that ``--fix`` checks a config again for more fixes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onecycle validate`` to a parser."""
    parser.description = (
        "Validate configs and report every problem with its location and how to fix it. "
        'Values that Hugging Face or another integration fills in may be "auto".'
    )
    parser.epilog = (
        "The text output names the rule of each problem in brackets. Run `onecycle explain RULE` "
        "for an explanation of the rule."
    )
    add_examples(
        parser,
        "onecycle validate ds_config.json --world-size 8",
        "onecycle validate ds_config.json --set train_batch_size=64",
        "onecycle validate --fix --yes ds_config.json",
        "onecycle validate --format sarif ds_config.json other.json > problems.sarif",
    )
    parser.add_argument(
        "files",
        metavar="FILE",
        nargs="+",
        help='path of a ds_config.json, or "-" for standard input',
    )
    parser.add_argument(
        "--world-size",
        type=parse_positive_int,
        metavar="N",
        help="check the batch sizes for N ranks (default: for any number of ranks)",
    )
    parser.add_argument(
        "--steps-per-epoch",
        type=parse_positive_int,
        metavar="N",
        help="assume N steps per epoch when checking durations in epochs (default: any number)",
    )
    parser.add_argument("--strict", action="store_true", help="treat warnings as errors")
    parser.add_argument(
        "--no-auto",
        action="store_true",
        help='treat "auto" values as errors. Use this option if no integration, such as Hugging '
        "Face, replaces these values",
    )
    parser.add_argument(
        "-q", "--quiet", action="store_true", help="omit notes and the summary line"
    )
    parser.add_argument(
        "--format", choices=FORMATS, default="text", help="output format (default: text)"
    )
    parser.add_argument(
        "--fix",
        action="store_true",
        help="fix the file: rename deprecated keys, convert values of the wrong type and remove "
        "trailing commas. In a terminal, also ask whether to replace each misspelled name with the "
        "suggested one",
    )
    parser.add_argument(
        "--yes",
        action="store_true",
        help="with --fix or --diff: accept every suggested name without asking",
    )
    parser.add_argument(
        "--diff",
        action="store_true",
        help="print the fixes as a diff and leave the file unchanged",
    )
    add_set(parser)
    add_allow_imports(parser)


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Validate each file, report its problems, and return the highest exit status."""
    if args.yes and not (args.fix or args.diff):
        raise ValueError("`--yes` requires `--fix` or `--diff`. Add one of them.")
    if args.fix and not args.diff and "-" in args.files:
        raise ValueError(
            "`--fix` cannot write to standard input. Pass a file, or use `--diff` instead."
        )
    return max(_validate(name, args, out) for name in args.files)


def _validate(name: str, args: argparse.Namespace, out: TextIO) -> int:
    color, width = supports_color(out), get_width(out)
    try:
        document = load_document(name)
        problems = _check(document, args)
    except ConfigError as error:  # the file cannot be read, or a value of `--set` is not finite
        report = Report(Document(name, None), error.problems, color, width)
        for line in FORMATS[args.format](report):
            print(line, file=out)
        return USAGE
    if args.fix or args.diff:
        document, problems = _apply_fixes(document, problems, args, out)
    if args.strict:
        problems = [_as_error(problem) for problem in problems]
    if args.quiet:
        problems = [problem for problem in problems if problem.severity != "note"]
    for line in FORMATS[args.format](Report(document, problems, color, width)):
        print(line, file=out)
    if args.format == "text" and not args.quiet:
        print(f"{name}: {_build_summary(problems, args.world_size)}", file=out)
    return INVALID if any(problem.severity == "error" for problem in problems) else OK


def _apply_fixes(
    document: Document, problems: list[Problem], args: argparse.Namespace, out: TextIO
) -> tuple[Document, list[Problem]]:
    """Apply automatic fixes to a config file or, with ``--diff``, only print them.

    Returns:
        A tuple ``(document, problems)``, updated if the file was fixed.
    """
    name = document.name
    can_ask = not args.diff and sys.stdin.isatty() and out.isatty()
    refused: list[tuple[str, Fix | None]] = []
    replaced: set[str] = set()
    fixed, remaining = document, problems

    def accept(problem: Problem) -> bool:
        answered = (problem.pointer, problem.fix)
        # A value that the user has agreed to is not replaced again by a guess of a later round.
        if answered in refused or problem.pointer in replaced:
            return False
        is_accepted = args.yes or (can_ask and _ask(_describe_fix(fixed, problem, "Replace"), out))
        if not is_accepted:
            refused.append(answered)
            return False
        if args.yes and not args.diff and args.format == "text":
            print(escape(f"{_describe_fix(fixed, problem, 'Replaced')}."), file=out)
        replaced.add(problem.pointer)
        return True

    # A renamed key or a new type can reveal problems with other fixes.
    for _ in range(_MAX_FIX_ROUNDS):
        text = apply_fixes(fixed, remaining, accept)
        if text == fixed.text:
            break
        fixed = parse(fixed.encode_text(text).decode(), name)
        remaining = _check(fixed, args)
    if refused and not can_ask and args.format == "text":
        suggestions = count_noun(len(refused), "suggested name")
        print(
            f"{name}: {suggestions} not applied. Use `--yes` to accept every suggestion.", file=out
        )
    if fixed is document:
        return document, problems
    if args.diff:
        before, after = (each.text.splitlines(keepends=True) for each in (document, fixed))
        out.writelines(difflib.unified_diff(before, after, name, f"{name} (fixed)"))
        return document, problems
    Path(name).write_bytes(fixed.encode_text(fixed.text))
    return fixed, remaining


def _describe_fix(document: Document, problem: Problem, verb: str) -> str:
    """Return the position of a fix, and what it replaces."""
    assert problem.fix is not None
    if problem.fix.key:
        old, new = get_last_key(problem.pointer), problem.fix.key
    else:
        old, new = document.get_value(problem.pointer), problem.fix.value
    where = f"{document.name}:{problem.line}:{problem.column}"
    return f"{where}: {verb} `{old}` with `{new}`"


def _ask(change: str, out: TextIO) -> bool:
    """Ask the user in the terminal whether to apply a fix, and return the answer."""
    print(escape(f"{change}? [y/N] "), end="", file=out, flush=True)
    return sys.stdin.readline().strip().lower() in {"y", "yes"}


def _check(document: Document, args: argparse.Namespace) -> list[Problem]:
    return check(
        apply_assignments(document, args.set)[0],
        args.world_size,
        steps_per_epoch=args.steps_per_epoch,
        reject_auto=args.no_auto,
        allow_imports=args.allow_imports,
    )


def _as_error(problem: Problem) -> Problem:
    is_warning = problem.severity == "warning"
    return dataclasses.replace(problem, severity="error") if is_warning else problem


def _build_summary(problems: Sequence[Problem], world_size: int | None) -> str:
    counts = {
        severity: sum(problem.severity == severity for problem in problems)
        for severity in ("error", "warning")
    }
    parts = [count_noun(count, word) for word, count in counts.items() if count]
    if counts["error"]:
        return ", ".join(parts)
    ranks = f" for {count_noun(world_size, 'rank')}" if world_size else ""
    return ", ".join((f"valid{ranks}", *parts))
