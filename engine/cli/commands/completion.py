"""``onecycle completion``: print a completion script for a shell."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any, TextIO

from engine.cli.commands.arguments import add_examples
from engine.distributed.environment import OK

__all__ = ["add_arguments", "run"]

_SHELLS = ("bash", "zsh", "tcsh")
_FILES = {"FILE", "PNG", "CSV", "OTHER", "F", "FILE|TYPE", "SCRIPT ARGS", "EXE"}
_DIRECTORIES = {"DIR", "D"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onecycle completion`` to a parser."""
    parser.description = (
        "Print a script that completes commands, options, schedules, rules and files when you "
        "press Tab. Load it in the startup file of your shell."
    )
    parser.add_argument("shell", type=str.lower, choices=_SHELLS, help="your shell")
    add_examples(
        parser,
        'eval "$(onecycle completion bash)"',
        "onecycle completion zsh > _onecycle",
    )


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Print the completion script for a shell, and return the exit status."""
    import shtab

    from engine.cli.parser import COMMANDS, build_parser
    from engine.config.rules.pages import RULEBOOK
    from schedules import SCHEDULES

    parser = build_parser(complete=tuple(COMMANDS))
    choices: dict[str, Any] = {"TYPE": list(SCHEDULES), "RULE": list(RULEBOOK)}
    for action in _list_arguments(parser):
        name = action.metavar if isinstance(action.metavar, str) else action.dest
        if name in choices:
            action.choices = choices[name]
        elif name in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]  # shtab's interface
        elif name in _DIRECTORIES:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    print(shtab.complete(parser, args.shell), file=out)
    return OK


def _list_arguments(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the arguments of a parser and of its subcommands."""
    for action in parser._actions:  # noqa: SLF001  # argparse has no public list of them
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001  # no public name
            for each in action.choices.values():
                yield from _list_arguments(each)
        else:
            yield action
