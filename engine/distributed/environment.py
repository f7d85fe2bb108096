"""Names of the `ONECYCLE_*` environment variables, and exit statuses of the commands.

This module does not import torch.
"""

from __future__ import annotations

__all__ = [
    "ELASTIC",
    "FAILURE_FILE",
    "INTERRUPTED",
    "INVALID",
    "JOB_ID",
    "LR_TEST",
    "NODE_LOST",
    "OK",
    "PREFIX",
    "SAVED_AND_ENDED",
    "SET",
    "SSH_FAILED",
    "TIMED_OUT",
    "TIMEOUT",
    "UNREACHABLE",
    "USAGE",
    "to_exit_status",
]

PREFIX = "ONECYCLE_"
"""Prefix of the environment variables that `onecycle launch` always passes to the ranks."""

ELASTIC = "ONECYCLE_ELASTIC"
"""Set if the number of hosts may change during the run while the batch size stays the same."""

FAILURE_FILE = "ONECYCLE_FAILURE"
"""Path of the file to which a node of a Slurm job appends its failure time and exit status."""

JOB_ID = "ONECYCLE_JOB_ID"
"""Unique name of the launch; the same on all ranks."""

LR_TEST = "ONECYCLE_LR_TEST"
"""JSON settings of the LR range test to run in `initialize`. Set by `onecycle lr-test`."""

SET = "ONECYCLE_SET"
"""JSON list of ``KEY=VALUE`` strings that override config values. Set by the option ``--set``."""

TIMEOUT = "ONECYCLE_TIMEOUT"
"""Timeout of collectives, in seconds."""

OK = 0
"""Exit status: success."""

INVALID = 1
"""Exit status: the config is invalid, or a check found problems."""

USAGE = 2
"""Exit status: invalid command-line arguments, or a file that cannot be read or written."""

UNREACHABLE = 69
"""Exit status (EX_UNAVAILABLE): a host failed the preflight check."""

SAVED_AND_ENDED = 75
"""Exit status (EX_TEMPFAIL, retry): the run received a signal, saved a checkpoint and exited."""

INTERRUPTED = 130
"""Exit status (128 + SIGINT): Ctrl-C ended the run. A checkpoint may have been saved first."""

NODE_LOST = 75
"""Exit status (EX_TEMPFAIL, retry): the launcher lost the connection to a host."""

TIMED_OUT = 124
"""Exit status: the hosts did not connect in time (same status as the `timeout` command)."""

SSH_FAILED = 255
"""Exit status of ssh if it could not connect or lost the connection."""


def to_exit_status(returncode: int) -> int:
    """Convert a return code of `subprocess` to the exit status that a shell reports.

    Args:
        returncode: return code of a process; -n if signal n killed the process.

    >>> to_exit_status(7), to_exit_status(-15)
    (7, 143)
    """
    return returncode if returncode >= 0 else 128 - returncode
