"""A rank on cores of its own: takes its share of this host's, then becomes the command."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

__all__ = ["main", "share"]


def share(cores: Sequence[int], rank: int, ranks: int) -> Sequence[int]:
    """Return a rank's part of the cores: neighbours, as even as it goes; all if there are too few.

    >>> share([0, 1, 2, 3, 8], rank=1, ranks=2)
    [2, 3, 8]
    >>> share([0, 1], rank=2, ranks=3)
    [0, 1]
    """
    if len(cores) < ranks:
        return cores
    return cores[rank * len(cores) // ranks : (rank + 1) * len(cores) // ranks]


def main(command: list[str]) -> None:
    """Bind this process, by the ``LOCAL_RANK`` that torchrun gave it, and run a command in it."""
    cores = sorted(os.sched_getaffinity(0))
    own = share(cores, int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    os.sched_setaffinity(0, own)
    os.execvp(command[0], command)  # noqa: S606  # the rank's own command


if __name__ == "__main__":
    main(sys.argv[1:])
