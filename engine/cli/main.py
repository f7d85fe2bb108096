"""The ``onecycle`` command: select a subcommand, run it, and report errors."""

from __future__ import annotations

import codecs
import contextlib
import gc
import io
import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

from engine.cli.import_path import current_directory_on_path
from engine.cli.parser import build_command_parser, build_parser, find_command, import_command
from engine.display.terminal import count_columns, get_width, wrap
from engine.distributed.environment import INTERRUPTED, INVALID, OK, USAGE
from schedules.core.extras import MissingExtraError

__all__ = ["main"]

_REPLACE = "onecycle.replace"
"""Name of the error handler that replaces characters that the encoding lacks."""
_STRICT = {"strict", "surrogateescape"}
"""Error handlers that raise an error for a character that the encoding lacks."""


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
        with _replace_unencodable(out), _replace_unencodable(err):
            return _run(sys.argv[1:] if arguments is None else arguments, out, err)
    except KeyboardInterrupt:
        print("onecycle: interrupted", file=err)
        return INTERRUPTED
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def _replace_unencodable(stream: TextIO) -> Iterator[None]:
    """Write "?" for characters that a stream cannot encode, instead of raising an error.

    A stream whose error handler was set to a more lenient one, such as "backslashreplace", is not
    changed.
    """
    if not isinstance(stream, io.TextIOWrapper) or stream.errors not in _STRICT:
        yield
        return
    errors = stream.errors
    stream.reconfigure(errors=_REPLACE)
    try:
        yield
    finally:
        # `reconfigure` flushes the stream, which may be closed or have lost its reader.
        with contextlib.suppress(OSError, ValueError):
            stream.reconfigure(errors=errors)


def _replace_character(error: UnicodeError) -> tuple[str, int]:
    """Return one "?" per terminal column, so that charts, tables and carets stay aligned."""
    assert isinstance(error, UnicodeEncodeError)
    return "?" * count_columns(error.object[error.start : error.end]), error.end


codecs.register_error(_REPLACE, _replace_character)


def _run(arguments: Sequence[str], out: TextIO, err: TextIO) -> int:
    if not arguments:
        build_parser().print_help(out)
        return OK
    if arguments[0].startswith("-"):
        build_parser().parse_args(arguments)  # prints the help, the versions or an error, and exits

    from engine.config import ConfigError
    from engine.display.problem_reports import write_error

    try:
        # Import only the module of the requested command, so that `validate` starts fast.
        name = find_command(arguments[0])
        args = build_command_parser(name).parse_args(arguments[1:])
        may_import = getattr(args, "allow_imports", False)
        with current_directory_on_path() if may_import else contextlib.nullcontext():
            status: int = import_command(name).run(args, out)
    except ConfigError as error:
        unreadable = any(problem.rule == "unreadable" for problem in error.problems)
        write_error(error, err if unreadable else out)
        return USAGE if unreadable else INVALID
    except (ValueError, MissingExtraError) as error:
        return _report(error, err)
    except BrokenPipeError:
        # The reader of the output closed the pipe, as in `onecycle plot … --csv - | head`.
        sys.stderr.close()
        return OK
    except OSError as error:
        message = f"{error.filename or 'output'}: {error.strerror}"
        return _report(message if error.strerror else error, err)
    return status


def _report(message: object, err: TextIO) -> int:
    for paragraph in f"onecycle: {message}".splitlines():
        print(*wrap(paragraph, get_width(err)), sep="\n", file=err)
    return USAGE


if __name__ == "__main__":
    sys.exit(main())
