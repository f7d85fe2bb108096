"""Optional packages, and the extras of onecycle that install them."""

from __future__ import annotations

import importlib.util

__all__ = ["EXTRAS", "MissingExtraError", "require_package"]

EXTRAS = {
    "matplotlib": "plot",
    "plotext": "plot",
    "tensorboard": "tensorboard",
    "werkzeug": "ui",
}
"""Maps each optional package to the extra in pyproject.toml that installs it."""


class MissingExtraError(ImportError):
    """Raised when a feature requires an optional package that is not installed."""


def require_package(name: str, feature: str) -> None:
    """Check that an optional package is installed, without importing it.

    Args:
        name: name of the package, a key of `EXTRAS`.
        feature: subject of the error message, such as "A plot".

    Raises:
        MissingExtraError: the package is not installed; the message names the extra.
    """
    if importlib.util.find_spec(name) is None:
        raise MissingExtraError(
            f"{feature} requires {name}, which is not installed. Run `pip install {name}`, or "
            f"install onecycle with the extra `{EXTRAS[name]}`.",
            name=name,
        )
