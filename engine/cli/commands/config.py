"""``onecycle config``: print every config value that a run would use, and its origin."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from engine.cli.commands.arguments import (
    add_allow_imports,
    add_examples,
    add_set,
    parse_positive_int,
)
from engine.cli.commands.models import build_model
from engine.display.terminal import format_rows, get_width, wrap
from engine.distributed.environment import OK
from engine.errors import escape

if TYPE_CHECKING:
    from engine.config.provenance import Entry
    from engine.config.rules import RuleContext

__all__ = ["add_arguments", "run"]

_WIDEST_CELL = 45
"""Maximum width to which cells are padded. A longer cell shifts the rest of its row."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onecycle config`` to a parser."""
    parser.description = (
        "Print the resolved config: every value that a run would use, and its origin (a line of "
        "the file, a default or a derived value)."
    )
    parser.add_argument(
        "file", metavar="FILE", help='path of a ds_config.json, or "-" for standard input'
    )
    parser.add_argument(
        "--world-size",
        type=parse_positive_int,
        default=1,
        metavar="N",
        help="number of ranks (default: 1)",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--json",
        action="store_true",
        help="print the resolved config as JSON that can be used as a config file",
    )
    how.add_argument(
        "--diff",
        metavar="OTHER",
        help="print only the keys whose values differ from those in another config. The last "
        "column shows the values in the other config. '-' marks a missing key",
    )
    how.add_argument(
        "--model",
        metavar="MODULE:FUNCTION",
        help="also print the param groups of a model. FUNCTION is the model's class, or a function "
        "that returns the model. MODULE is imported; the current directory is searched first. If "
        "possible, the model is built on the meta device, without allocating its weights",
    )
    add_set(parser)
    add_allow_imports(parser)
    add_examples(
        parser,
        "onecycle config ds_config.json --world-size 8",
        "onecycle config ds_config.json --set fp16.enabled=true --diff ds_config.json",
        "onecycle config ds_config.json --json > complete.json",
        "onecycle config ds_config.json --model train:build_model",
    )


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Print the resolved config or a diff (``--diff``), and return the exit status."""
    from engine.config.provenance import as_config

    entries, context = _resolve(args.file, args, args.set)
    groups = () if args.model is None else ("", *_list_param_groups(context, args.model))
    if args.diff is not None:
        _print_differences(entries, _resolve(args.diff, args)[0], out)
    elif args.json:
        print(json.dumps(as_config(entries), indent=2), file=out)
    else:
        rows = [(entry.name, json.dumps(entry.value), entry.origin) for entry in entries]
        _print_table(rows, out)
    for group in groups:
        for line in wrap(escape(group), get_width(out)):
            print(line, file=out)
    return OK


def _resolve(
    name: str, args: argparse.Namespace, assignments: Sequence[str] = ()
) -> tuple[list[Entry], RuleContext]:
    from engine.config import ConfigError, load_document
    from engine.config.overrides import apply_assignments
    from engine.config.provenance import trace_origins
    from engine.config.validate import examine
    from schedules.core.imports import imports_allowed

    document, _ = apply_assignments(load_document(name), assignments)
    problems, context = examine(document, args.world_size, allow_imports=args.allow_imports)
    errors = [problem for problem in problems if problem.severity == "error"]
    if errors or context is None:
        raise ConfigError(document.name, errors)
    with imports_allowed(args.allow_imports):
        return list(trace_origins(context)), context


def _list_param_groups(context: RuleContext, path: str) -> list[str]:
    """Return the lines that `initialize` logs for the param groups of a model.

    Raises:
        ValueError: if the model cannot be imported or built, or does not fit the config.
    """
    from engine.config.optimizer_block import build_optimizer_block
    from engine.config.param_groups import find_group_schedulers
    from engine.display.param_groups import format_param_groups
    from engine.training.param_groups import build_param_groups

    config = context.config
    block = build_optimizer_block(config.get("optimizer"), context.backend.name)
    if block is None:
        raise ValueError(
            "`--model` requires a config with an `optimizer` section, which describes the param "
            "groups. Add the section, or omit the option."
        )
    model = build_model(path)
    wrap = context.get_section("engine").get("wrap", ())
    types = {index: each["type"] for index, _, each in find_group_schedulers(config)}
    groups = build_param_groups(model, block, wrap=wrap)
    rows = [group.describe(block, types) for group in groups]
    return [f"param group {line}" for line in format_param_groups(rows)]


def _print_differences(first: Sequence[Entry], second: Sequence[Entry], out: TextIO) -> None:
    """Print the keys whose values, including defaults, differ between two configs."""
    here, there = (
        {each.name: json.dumps(each.value) for each in entries} for entries in (first, second)
    )
    names = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    _print_table([(name, here.get(name, "-"), there.get(name, "-")) for name in names], out)


def _print_table(rows: Sequence[tuple[str, str, str]], out: TextIO) -> None:
    escaped = [tuple(map(escape, row)) for row in rows]
    for line in format_rows(escaped, get_width(out), widest=_WIDEST_CELL):
        print(line, file=out)
