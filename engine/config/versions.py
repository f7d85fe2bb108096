"""Read the versions of installed packages from their metadata, without importing them."""

from __future__ import annotations

__all__ = ["get_installed_version"]


def get_installed_version(package: str) -> str | None:
    """Return the installed version of a package, or None if it is not installed.

    >>> get_installed_version("no-such-package") is None
    True
    """
    # This import takes longer than a whole run of `onecycle validate`.
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
