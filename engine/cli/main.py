"""The ``onecycle`` command: select a subcommand, run it, and report errors."""

from __future__ import annotations

import argparse
import gc
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn, TextIO

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "validate": "report every problem in a config and how to fix it",
    "explain": "print what a validation rule checks, why, and how to fix it",
    "config": "print every config value that a run would use, and its origin",
    "plot": "plot the learning rate and momentum at every step",
    "memory": "estimate the memory of the model states on each rank, for each ZeRO stage",
    "schedules": "list every schedule, or print the documentation of one",
    "lr-test": "run an LR range test on a script and suggest learning-rate bounds",
    "launch": "start a script on one host or several, and stop all ranks if one fails",
    "ui": "open a page in the browser that edits a config or shows a run",
    "doctor": "report which features work on this machine, and why the others do not",
    "checkpoint": "list, verify, show or export the checkpoints of a run",
    "schema": "print the JSON Schema of configs, or of one schedule's params",
}
"""Maps the name of each subcommand to its one-line help.

The code of a subcommand is in the module of the same name in `engine.cli.commands`.
"""

_EPILOG = """\
exit status: 0 success; 1 the config is invalid; 2 wrong usage, or a file cannot be read or written.
lr-test and launch have additional statuses, see their --help.

examples:
  onecycle validate ds_config.json --world-size 8
  onecycle explain unknown-key
  onecycle config ds_config.json
  onecycle plot ds_config.json -o curves.png
  onecycle plot ds_config.json --csv - | head
  onecycle memory ds_config.json --params 7e9 --world-size 8
  onecycle schedules
  onecycle schedules OneCycle
  onecycle schema OneCycle
  onecycle lr-test -- train.py --epochs 1
"""


def main(
    arguments: Sequence[str] | None = None,
    out: TextIO | None = None,
    err: TextIO | None = None,
) -> int:
    """Run the ``onecycle`` command and return its exit status.

    Args:
        arguments: command-line arguments without the program name (default: ``sys.argv[1:]``).
        out: stream for results and for problems in configs (default: standard output).
        err: stream for other errors, such as an unreadable file (default: standard error).
    """
    out, err = out or sys.stdout, err or sys.stderr
    # Garbage collection costs time, and most commands exit before it would free any memory.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return _run(sys.argv[1:] if arguments is None else arguments, out, err)
    finally:
        if was_enabled:
            gc.enable()


def _run(arguments: Sequence[str], out: TextIO, err: TextIO) -> int:
    if not arguments or arguments[0] not in COMMANDS:
        _print_help_or_error(arguments)
    # Import only the module of the requested command, so that `validate` starts fast.
    name = arguments[0].replace("-", "_")
    command = importlib.import_module(f"engine.cli.commands.{name}")
    parser = argparse.ArgumentParser(prog=f"onecycle {arguments[0]}")
    command.add_arguments(parser)
    args = parser.parse_args(arguments[1:])

    from engine.config import ConfigError
    from engine.display.problem_reports import write_error
    from engine.distributed.environment import INVALID, OK, USAGE

    try:
        status: int = command.run(args, out)
    except ConfigError as error:
        unreadable = any(problem.rule == "unreadable" for problem in error.problems)
        write_error(error, err if unreadable else out)
        return USAGE if unreadable else INVALID
    except ValueError as error:
        print(f"onecycle: {error}", file=err)
        return USAGE
    except BrokenPipeError:
        # The reader of the output closed the pipe, as in `onecycle plot … --csv - | head`.
        sys.stderr.close()
        return OK
    except OSError as error:
        message = f"{error.filename or 'output'}: {error.strerror}"
        print(f"onecycle: {message if error.strerror else error}", file=err)
        return USAGE
    return status


class _Version(argparse.Action):
    """An argparse action that prints the versions of onecycle, torch and DeepSpeed, and exits."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from engine.config.versions import get_installed_version

        for package in ("onecycle", "torch", "deepspeed"):
            print(f"{package} {get_installed_version(package) or 'is not installed'}")
        parser.exit()


def _print_help_or_error(arguments: Sequence[str]) -> NoReturn:
    """Print the requested help or a usage error, then exit."""
    parser = argparse.ArgumentParser(
        prog="onecycle",
        description="Validate a ds_config.json and preview its schedule before launch.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print versions and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text)
    parser.parse_args(arguments)
    raise AssertionError("argparse did not exit, although no valid command was given")


if __name__ == "__main__":
    sys.exit(main())
