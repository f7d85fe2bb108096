"""Raise the limit on open files for a launch with many hosts or ranks."""

from __future__ import annotations

from engine.errors import LaunchError

__all__ = ["raise_open_file_limit"]

_OTHER_FILES = 128  # files and libraries that a process has open anyway


def raise_open_file_limit(count: int) -> None:
    """Raise this process's soft limit on open files if the limit is too low for ``count`` files.

    The limit is not raised further than necessary, because child processes inherit it, and programs
    that use `select` cannot handle file descriptors above 1,023.

    Args:
        count: number of files, pipes and connections that this process will open.

    Raises:
        LaunchError: if the hard limit is too low.
    """
    import resource  # resource does not exist on Windows, where `doctor` imports this module

    needed = count + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft == unlimited or soft >= needed:
        return
    if hard != unlimited and hard < needed:
        raise LaunchError(
            f"The hard limit on open files must be >= {needed}, got {hard}. As root, raise the "
            f"limit with `ulimit -Hn {needed}` or in /etc/security/limits.conf, or use fewer hosts."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
