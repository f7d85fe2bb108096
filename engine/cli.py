"""The command ``onecycle``: a thin shell over the library."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TextIO

from engine.commands import config, explain, plot, schedules, schema, validate
from engine.commands.arguments import INVALID, OK, USAGE
from engine.config import ConfigError
from engine.config.document import Document
from engine.reports import FORMATS, Report

__all__ = ["main"]

_COMMANDS = (validate, explain, config, plot, schedules, schema)

_EPILOG = """\
exit status: 0 done, 1 the config is wrong, 2 wrong usage, or a file that cannot be read or written

examples:
  onecycle validate ds_config.json --world-size 8
  onecycle explain unknown-key
  onecycle config ds_config.json
  onecycle plot ds_config.json -o curves.png
  onecycle plot ds_config.json --csv - | head
  onecycle schedules
  onecycle schedules OneCycle
  onecycle schema OneCycle
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
    args = _parser().parse_args(arguments)
    try:
        status: int = args.run(args, out)
    except ConfigError as error:
        unreadable = any(problem.rule == "unreadable" for problem in error.problems)
        report = Report(Document(error.name, None), error.problems)
        for line in FORMATS["text"](report):
            print(line, file=err if unreadable else out)
        return USAGE if unreadable else INVALID
    except ValueError as error:
        print(f"onecycle: {error}", file=err)
        return USAGE
    except BrokenPipeError:
        # The reader of a pipe has enough (`… --csv - | head`); nothing is left to be written.
        sys.stderr.close()
        return OK
    except OSError as error:
        print(f"onecycle: {error.filename or 'output'}: {error.strerror}", file=err)
        return USAGE
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="onecycle",
        description="Prove a ds_config.json right and see its schedule, before anything runs.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
