"""Read the versions of installed packages from their metadata, without importing them."""

from __future__ import annotations

__all__ = ["installed"]


def installed(package: str) -> str | None:
    """Return the installed version of a package, or None if it is not installed.

    >>> installed("no-such-package") is None
    True
    """
    # This import is slow: it takes longer than a whole run of `onecycle validate`.
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
