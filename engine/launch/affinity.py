"""Bind a rank to its own CPU cores, then run its command."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

__all__ = ["main"]


def sort_by_core(cpus: Iterable[int], get_core: Callable[[int], int]) -> list[int]:
    """Return logical CPUs sorted by physical core.

    Args:
        cpus: indices of the logical CPUs.
        get_core: function that maps a logical CPU to its physical core.

    >>> sort_by_core([0, 1, 2, 3], get_core=lambda cpu: cpu % 2)
    [0, 2, 1, 3]
    """
    return sorted(cpus, key=lambda cpu: (get_core(cpu), cpu))


def select_cpus(cpus: Sequence[int], rank: int, ranks: int) -> Sequence[int]:
    """Return the logical CPUs for a rank.

    The list of CPUs is split into contiguous parts of about the same size, one per rank of this
    host. If there are more ranks than CPUs, every rank gets all CPUs.

    Args:
        cpus: logical CPUs of this host, sorted by core.
        rank: local rank.
        ranks: number of ranks on this host.

    >>> select_cpus([0, 1, 2, 3, 8], rank=1, ranks=2)
    [2, 3, 8]
    >>> select_cpus([0, 1], rank=2, ranks=3)
    [0, 1]
    """
    if len(cpus) < ranks:
        return cpus
    return cpus[rank * len(cpus) // ranks : (rank + 1) * len(cpus) // ranks]


def _find_core(cpu: int) -> int:
    """Return the ID of a logical CPU's physical core: the lowest logical CPU index on that core."""
    topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    try:
        return int(topology.read_text().replace("-", ",").partition(",")[0])
    except (OSError, ValueError):
        return cpu


def main(command: list[str]) -> None:
    """Bind this process to its rank's CPU cores, and replace the process with a command.

    The local rank and the number of ranks on this host are read from torchrun's variables
    ``LOCAL_RANK`` and ``LOCAL_WORLD_SIZE``.

    Args:
        command: command to run, with its arguments.
    """
    cpus = sort_by_core(os.sched_getaffinity(0), _find_core)
    own = select_cpus(cpus, int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    os.sched_setaffinity(0, own)
    os.execvp(command[0], command)  # noqa: S606  # the rank's own command


if __name__ == "__main__":
    main(sys.argv[1:])
