"""The first failure of a host's ranks, reported to the runner as one line of output."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass

__all__ = ["FAILURE_PREFIX", "Failure", "format_failure", "parse_failure"]

FAILURE_PREFIX = "\x1eonecycle-failure "
"""Start of a line that reports a failure."""


@dataclass(frozen=True)
class Failure:
    """The first failure among the ranks of one host."""

    rank: int | None
    """Failed rank; None: torchrun itself failed."""
    status: int
    """Exit status of the rank: 128 + n for signal n."""
    time: float = math.inf
    """Seconds since the epoch."""
    reason: str = ""
    """Reason why torchrun failed."""


def format_failure(failure: Failure) -> str:
    """Return the line that reports a failure."""
    return FAILURE_PREFIX + json.dumps(asdict(failure))


def parse_failure(line: str) -> Failure | None:
    """Return the failure that a line reports; None if the line is incomplete.

    >>> parse_failure(format_failure(Failure(rank=1, status=7, time=100.0)))
    Failure(rank=1, status=7, time=100.0, reason='')
    """
    try:
        return Failure(**json.loads(line.partition(FAILURE_PREFIX)[2]))
    except (TypeError, ValueError):
        return None
