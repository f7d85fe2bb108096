"""Run torchrun in this process, and report the first failed rank and its exit status.

The ``torchrun`` command exits with status 1 for every failure. `main` instead returns the exit
status of the rank that failed first, or 128 + n if signal n killed that rank. The last line of
output names the rank.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from engine.distributed.environment import FAILURE_FILE, TIMED_OUT, to_exit_status
from engine.errors import LaunchError
from engine.launch.failure import Failure, format_failure
from engine.launch.open_files import raise_open_file_limit

__all__ = ["LOCAL_RANK_ARGUMENT", "main", "remove_directory"]

LOCAL_RANK_ARGUMENT = "--local_rank=${local_rank}"
"""Argument in which torchrun replaces ``${local_rank}`` with the local rank of each process."""

_CONNECTIONS_PER_RANK = 2  # one of the store, one of gloo


def main(arguments: list[str]) -> int:
    """Run torchrun with the given arguments.

    Return 0 if all ranks succeed, or the exit status of the first failed rank.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    options = parse_args(arguments)  # type: ignore[no-untyped-call]  # untyped in torch
    options.training_script_args = [*map(_escape, options.training_script_args)]
    if not options.no_python:  # the script is then an argument of Python
        options.training_script = _escape(options.training_script)
    _raise_open_file_limit(options.nnodes, options.nproc_per_node)
    try:
        with tempfile.TemporaryDirectory(
            prefix=_get_prefix(os.getpid()), ignore_cleanup_errors=True
        ) as directory:
            # torchrun never removes the directory that it creates if no --log-dir is given.
            options.log_dir = options.log_dir or directory
            run(options)  # type: ignore[no-untyped-call]  # untyped in torch
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        # torch reports -n for signal n. If it reports a failed rank with exit code 0, return 128.
        status = to_exit_status(failure.exitcode) or 128
        _print_failure(Failure(rank, status, failure.timestamp))
        return _append_to_file(status, failure.timestamp)
    except SignalException as error:
        return _append_to_file(to_exit_status(-error.sigval), time.time())
    except Exception as error:  # noqa: BLE001  # the rendezvous raises many types of exceptions
        status = TIMED_OUT if "Timeout" in type(error).__name__ else 1
        _print_failure(Failure(None, status, reason=f"{type(error).__name__}: {error}"))
        return _append_to_file(status, time.time())
    return 0


def remove_directory(pid: int) -> None:
    """Remove the temporary directory that `main` left behind when process ``pid`` was killed."""
    for directory in Path(tempfile.gettempdir()).glob(f"{_get_prefix(pid)}*"):
        shutil.rmtree(directory, ignore_errors=True)


def _raise_open_file_limit(nnodes: str, nproc: str) -> None:
    """Raise the limit on open files, so that ranks can connect to each other and to the `TCPStore`.

    If the hard limit is too low, only print a warning, because some scripts need fewer connections.

    Args:
        nnodes: number of hosts, or a range MIN:MAX.
        nproc: number of ranks per host, or a word such as ``gpu``.
    """
    if nproc.isdecimal():
        ranks = int(nnodes.rpartition(":")[2]) * int(nproc)
        try:
            raise_open_file_limit(_CONNECTIONS_PER_RANK * ranks)
        except LaunchError as error:
            print(f"onecycle launch: warning: {error}", file=sys.stderr, flush=True)


def _get_prefix(pid: int) -> str:
    return f"torchelastic_{pid}_"


def _escape(argument: str) -> str:
    """Escape a script argument, because torchrun treats each argument as a `string.Template`."""
    return argument if argument == LOCAL_RANK_ARGUMENT else argument.replace("$", "$$")


def _append_to_file(status: int, seconds: float) -> int:
    """Append the failure time and exit status to the failure file, and return the status.

    Only Slurm jobs have a failure file. In other jobs, nothing is written.
    """
    path = os.environ.get(FAILURE_FILE)
    if path:
        with contextlib.suppress(OSError), Path(path).open("a") as file:
            file.write(f"{int(seconds)} {status}\n")
    return status


def _print_failure(failure: Failure) -> None:
    sys.stderr.flush()
    print(format_failure(failure), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
