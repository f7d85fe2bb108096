"""torchrun in this process, so that the first failing rank and its exit status are known.

The command ``torchrun`` ends with 1 whatever happened. This ends with the status of the rank that
failed first (128 + n for a signal), and its last line on standard error says which that was.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

__all__ = ["FAILURE", "main"]

FAILURE = "\x1eonecycle-failure "
"""Begins the line that tells of a failure."""


def main(arguments: list[str]) -> int:
    """Run torchrun with these arguments; return the status of the first rank that failed."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    try:
        run(parse_args(arguments))  # type: ignore[no-untyped-call]  # torch's own
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        status = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        _tell({"rank": rank, "status": status, "time": failure.timestamp})
        return _noted(status, failure.timestamp)
    except SignalException as error:
        return _noted(128 + int(error.sigval), time.time())
    except Exception as error:  # noqa: BLE001  # rendezvous has many of its own
        timed_out = "Timeout" in type(error).__name__
        status = 124 if timed_out else 1
        _tell({"rank": None, "status": status, "why": f"{type(error).__name__}: {error}"})
        return _noted(status, time.time())
    return 0


def _noted(status: int, seconds: float) -> int:
    """Write when it failed, and the status, where the job of Slurm looks for what came first."""
    path = os.environ.get("ONECYCLE_FAILURE")
    if path:
        with contextlib.suppress(OSError), Path(path).open("a") as file:
            file.write(f"{int(seconds)} {status}\n")
    return status


def _tell(failure: dict[str, Any]) -> None:
    sys.stderr.flush()
    print(FAILURE + json.dumps(failure), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
