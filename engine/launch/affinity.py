"""A rank on cores of its own: takes its share of this host's, then becomes the command."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

__all__ = ["main", "neighbours", "share"]


def neighbours(cpus: Iterable[int], core_of: Callable[[int], int]) -> list[int]:
    """Return logical CPUs with those of one core side by side, however they are numbered.

    >>> neighbours([0, 1, 2, 3], core_of=lambda cpu: cpu % 2)
    [0, 2, 1, 3]
    """
    return sorted(cpus, key=lambda cpu: (core_of(cpu), cpu))


def share(cpus: Sequence[int], rank: int, ranks: int) -> Sequence[int]:
    """Return a rank's part: neighbours, as even as it goes; all if there are too few.

    >>> share([0, 1, 2, 3, 8], rank=1, ranks=2)
    [2, 3, 8]
    >>> share([0, 1], rank=2, ranks=3)
    [0, 1]
    """
    if len(cpus) < ranks:
        return cpus
    return cpus[rank * len(cpus) // ranks : (rank + 1) * len(cpus) // ranks]


def _core_of(cpu: int) -> int:
    """Return the first of the logical CPUs that share a core with this one."""
    topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    try:
        return int(topology.read_text().replace("-", ",").partition(",")[0])
    except (OSError, ValueError):
        return cpu


def main(command: list[str]) -> None:
    """Bind this process, by the ``LOCAL_RANK`` that torchrun gave it, and run a command in it."""
    cpus = neighbours(os.sched_getaffinity(0), _core_of)
    own = share(cpus, int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    os.sched_setaffinity(0, own)
    os.execvp(command[0], command)  # noqa: S606  # the rank's own command


if __name__ == "__main__":
    main(sys.argv[1:])
