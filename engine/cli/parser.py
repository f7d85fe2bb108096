"""Build the argument parsers of the ``onecycle`` command and of its subcommands."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from typing import Any, NoReturn

from schedules.core.spelling import find_nearest

__all__ = ["COMMANDS", "build_command_parser", "build_parser", "find_command", "import_command"]

COMMANDS = {
    "validate": "report every problem in a config and how to fix it",
    "explain": "print what a validation rule checks, why, and how to fix a violation",
    "config": "print every config value that a run would use, and its origin",
    "plot": "plot the learning rate and momentum at every step",
    "memory": "estimate the memory of the model states on each rank, for each ZeRO stage",
    "schedules": "list every schedule, or print the documentation of one",
    "lr-test": "run an LR range test on a script and suggest learning-rate bounds",
    "launch": "start a script on one host or several, and stop all ranks if one fails",
    "ui": "open a web page for editing a config or viewing runs",
    "doctor": "report which features work on this machine, and why the others do not",
    "checkpoint": "list, verify, show or export the checkpoints of a run",
    "schema": "print the JSON Schema of configs, or of one schedule's params",
    "completion": "print a completion script for your shell",
}
"""Maps the name of each subcommand to its one-line help text.

The code of a subcommand is in the module of the same name in `engine.cli.commands`, with ``_`` in
place of ``-``.
"""

_EPILOG = """\
exit status: 0 success; 1 invalid config or checkpoint; 2 usage error, or a file cannot be read or
written; 130 interrupted by Ctrl-C. For the statuses of lr-test and launch, see their --help.

examples:
  onecycle validate ds_config.json --world-size 8
  onecycle plot ds_config.json -t
  onecycle schedules OneCycle
  onecycle COMMAND --help
"""


class _HelpFormatter(argparse.HelpFormatter):
    """Help formatter that wraps paragraphs, but not indented lines, such as examples."""

    def add_argument(self, action: argparse.Action) -> None:
        """Add an argument, and make the help's first column wide enough for subcommands."""
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001  # no public name
            self._action_max_length += self._indent_increment

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = []
        for paragraph in text.strip().split("\n\n"):
            head, newline, examples = paragraph.partition("\n  ")
            filled = super()._fill_text(head, width, indent)
            paragraphs.append(f"{filled}{newline}{examples}".rstrip())
        return "\n\n".join(paragraphs)


class CommandParser(argparse.ArgumentParser):
    """An argument parser that suggests the correct spelling of a mistyped option."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"formatter_class": _HelpFormatter, **settings})

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Return the parsed arguments. The error for an unknown option suggests a similar one."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            options = [name for name in self._option_string_actions if name.startswith("--")]
            near = find_nearest(unknown[0].partition("=")[0], options)
            hint = f". Did you mean `{near}`?" if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return parsed


class _Version(argparse.Action):
    """An argparse action that prints the versions of onecycle, torch and DeepSpeed, and exits."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from engine.config.versions import get_installed_version

        for package in ("onecycle", "torch", "deepspeed"):
            print(f"{package} {get_installed_version(package) or 'is not installed'}")
        parser.exit()


def find_command(name: str) -> str:
    """Return the lowercase name of the subcommand that ``name`` matches, ignoring case.

    Raises:
        ValueError: if the name is unknown. The message suggests a similar name.
    """
    if name.lower() in COMMANDS:
        return name.lower()
    near = find_nearest(name, COMMANDS)
    fix = f"Did you mean `{near}`?" if near else "Run `onecycle` to list the commands."
    raise ValueError(f"Unknown command `{name}`. {fix}")


def build_command_parser(name: str) -> argparse.ArgumentParser:
    """Build the parser of one subcommand, importing only that subcommand's module."""
    parser = CommandParser(prog=f"onecycle {name}")
    import_command(name).add_arguments(parser)
    return parser


def build_parser(complete: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Build the parser of the ``onecycle`` command, whose help lists the subcommands.

    Args:
        complete: names of the subcommands to add with all of their arguments. The other
            subcommands get only a name and a one-line help text.
    """
    parser = CommandParser(
        prog="onecycle",
        description="Validate a ds_config.json, preview its schedule, and launch and inspect runs.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print versions and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        added = commands.add_parser(name, help=text)
        if name in complete:
            import_command(name).add_arguments(added)
    return parser


def import_command(name: str) -> Any:
    """Import and return the module of a subcommand."""
    return importlib.import_module(f"engine.cli.commands.{name.replace('-', '_')}")
