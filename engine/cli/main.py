"""The command ``onecycle``: a thin shell over the library."""

from __future__ import annotations

import argparse
import gc
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn, TextIO

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "validate": "say all that is wrong with a config",
    "explain": "say what a rule finds, why, and what mends it",
    "config": "print every value that a run would use, and where it comes from",
    "plot": "show the learning rate and momentum that every update will use",
    "schedules": "list every schedule, or print all about one",
    "lr-test": "find the learning rates to cycle between, by a range test of a script",
    "launch": "start a script on one machine or many, and stop all of it when a part fails",
    "doctor": "say what runs here, and why the rest does not",
    "checkpoint": "list, verify, show or export the checkpoints of a run",
    "schema": "print the JSON schema of configs, or of one schedule's params",
}
"""Each command, which is a module of `engine.cli.commands`, and what it does in a line."""

_EPILOG = """\
exit status: 0 done, 1 the config is wrong, 2 wrong usage, or a file that cannot be read or written;
lr-test and launch have more, see their own --help

examples:
  onecycle validate ds_config.json --world-size 8
  onecycle explain unknown-key
  onecycle config ds_config.json
  onecycle plot ds_config.json -o curves.png
  onecycle plot ds_config.json --csv - | head
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
    """Run the command and return its exit status.

    Args:
        arguments: those of the command line; by default the process's own.
        out: where findings and results go; by default standard output.
        err: where trouble of the tool itself goes; by default standard error.
    """
    out, err = out or sys.stdout, err or sys.stderr
    # Most commands are over before the collector of garbage would have anything to collect.
    collects = gc.isenabled()
    gc.disable()
    try:
        return _run(sys.argv[1:] if arguments is None else arguments, out, err)
    finally:
        if collects:
            gc.enable()


def _run(arguments: Sequence[str], out: TextIO, err: TextIO) -> int:
    if not arguments or arguments[0] not in COMMANDS:
        _refuse(arguments)
    # A command's module is loaded when it is named: `validate` is to start in no time.
    name = arguments[0].replace("-", "_")
    command = importlib.import_module(f"engine.cli.commands.{name}")
    parser = argparse.ArgumentParser(prog=f"onecycle {arguments[0]}")
    command.add(parser)
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
        # The reader of a pipe has enough (`… --csv - | head`); nothing is left to be written.
        sys.stderr.close()
        return OK
    except OSError as error:
        of_system = f"{error.filename or 'output'}: {error.strerror}"
        print(f"onecycle: {of_system if error.strerror else error}", file=err)
        return USAGE
    return status


class _Version(argparse.Action):
    """Prints the versions that a report of trouble should name."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from engine.versions import installed

        for package in ("onecycle", "torch", "deepspeed"):
            print(f"{package} {installed(package) or 'is not installed'}")
        parser.exit()


def _refuse(arguments: Sequence[str]) -> NoReturn:
    """Print the help that is asked for, or say which commands there are, and end the process."""
    parser = argparse.ArgumentParser(
        prog="onecycle",
        description="Prove a ds_config.json right and see its schedule, before anything runs.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print versions, and end")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text)
    parser.parse_args(arguments)
    raise AssertionError("the parser has refused what is no command")


if __name__ == "__main__":
    sys.exit(main())
