"""Versions of what is installed, asked of the packages' own records: nothing is imported for it."""

from __future__ import annotations

__all__ = ["installed"]


def installed(package: str) -> str | None:
    """Return the version of a package; None if it is not installed.

    >>> installed("no-such-package") is None
    True
    """
    from importlib.metadata import PackageNotFoundError, version  # slower than a whole `validate`

    try:
        return version(package)
    except PackageNotFoundError:
        return None
