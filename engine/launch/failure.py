"""Format and parse the output line that reports the first failure on a host."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass

__all__ = ["FAILURE_PREFIX", "Failure", "format_failure", "parse_failure"]

FAILURE_PREFIX = "\x1eonecycle-failure "
"""Prefix of an output line that reports a failure."""


@dataclass(frozen=True)
class Failure:
    """The first failure on a host, either of a rank or of torchrun itself."""

    rank: int | None
    """The rank that failed; None if torchrun itself failed."""
    status: int
    """The exit status of the rank or of torchrun; 128 + n if signal n killed the rank."""
    time: float = math.inf
    """The Unix time of the failure in seconds; infinite if torchrun itself failed."""
    reason: str = ""
    """The error message of torchrun if torchrun itself failed; empty if a rank failed."""


def format_failure(failure: Failure) -> str:
    """Format a failure as one output line that `parse_failure` can read."""
    return FAILURE_PREFIX + json.dumps(asdict(failure))


def parse_failure(line: str) -> Failure | None:
    """Parse a line returned by `format_failure`. Return None if the line is invalid.

    >>> parse_failure(format_failure(Failure(rank=1, status=7, time=100.0)))
    Failure(rank=1, status=7, time=100.0, reason='')
    """
    try:
        return Failure(**json.loads(line.partition(FAILURE_PREFIX)[2]))
    except (TypeError, ValueError):
        return None
