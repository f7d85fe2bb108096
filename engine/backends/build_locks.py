"""Find the lock files of C++ extension builds, including stale locks left by killed processes.

DeepSpeed compiles its ops with `torch.utils.cpp_extension`. During a build, the op's build
directory contains a file named ``lock``. While the file exists, every run that needs the op waits
silently. The locks of `torch.compile` need no check, because the operating system releases them
when the process that holds them exits.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import NamedTuple

__all__ = ["BuildLock", "find_build_locks", "log_build_locks"]

log = logging.getLogger("onecycle")


class BuildLock(NamedTuple):
    """A lock file in a build directory, and the process that has it open."""

    path: Path
    holder: int | None
    """ID of the process that holds the lock; None if no such process is visible on this host."""

    def __str__(self) -> str:
        op = self.path.parent.name
        if self.holder is not None:
            return (
                f"Process {self.holder} is building `{op}`. A run that needs `{op}` waits until "
                f"that process removes {self.path}. If that process hangs, end it and delete the "
                "file."
            )
        return (
            f"{self.path} is the lock of an interrupted build of `{op}`: no process on this host "
            f"has it open. While the file exists, a run that needs `{op}` waits indefinitely. "
            "Delete that file and start the run again."
        )


def find_build_locks() -> list[BuildLock]:
    """Return all lock files in the directories in which PyTorch builds C++ extensions."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root is not None:
        paths = Path(root).glob("*/lock")
    else:
        from torch.utils.cpp_extension import get_default_build_root

        version = f"py{sys.version_info.major}{sys.version_info.minor}"
        paths = Path(get_default_build_root()).glob(f"{version}_*/*/lock")
    locks = [BuildLock(path, _find_holder(path)) for path in sorted(paths)]
    return [lock for lock in locks if lock.path.exists()]  # a build can end during the search


def log_build_locks() -> None:
    """Log an error for each stale lock file, and a warning for each lock that a process holds."""
    for lock in find_build_locks():
        log.log(logging.ERROR if lock.holder is None else logging.WARNING, "%s", lock)


def _find_holder(path: Path) -> int | None:
    """Return the ID of a process that has ``path`` open, or None if no such process is visible."""
    wanted = path.resolve()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # the file was closed, or its process ended
            if link.readlink() == wanted:
                return int(link.parts[2])
    return None
