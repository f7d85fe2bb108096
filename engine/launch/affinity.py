"""Bind this process to some CPU cores, and replace it with the command of a rank."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

__all__ = ["main"]


def sort_by_core(cpus: Iterable[int], core_of: Callable[[int], int]) -> list[int]:
    """Sort logical CPUs so that the CPUs of the same core are adjacent.

    >>> sort_by_core([0, 1, 2, 3], core_of=lambda cpu: cpu % 2)
    [0, 2, 1, 3]
    """
    return sorted(cpus, key=lambda cpu: (core_of(cpu), cpu))


def select_cpus(cpus: Sequence[int], rank: int, ranks: int) -> Sequence[int]:
    """Split the CPUs evenly among the ranks, and return the contiguous part of one rank.

    If there are more ranks than CPUs, return all CPUs.

    >>> select_cpus([0, 1, 2, 3, 8], rank=1, ranks=2)
    [2, 3, 8]
    >>> select_cpus([0, 1], rank=2, ranks=3)
    [0, 1]
    """
    if len(cpus) < ranks:
        return cpus
    return cpus[rank * len(cpus) // ranks : (rank + 1) * len(cpus) // ranks]


def _find_core(cpu: int) -> int:
    """Return the first logical CPU of the core to which a logical CPU belongs."""
    topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    try:
        return int(topology.read_text().replace("-", ",").partition(",")[0])
    except (OSError, ValueError):
        return cpu


def main(command: list[str]) -> None:
    """Bind this process to the CPUs of its rank, and replace it with a command.

    torchrun sets the rank in ``LOCAL_RANK`` and the number of ranks in ``LOCAL_WORLD_SIZE``.
    """
    cpus = sort_by_core(os.sched_getaffinity(0), _find_core)
    own = select_cpus(cpus, int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    os.sched_setaffinity(0, own)
    os.execvp(command[0], command)  # noqa: S606  # the rank's own command


if __name__ == "__main__":
    main(sys.argv[1:])
