"""Import onecycle's `engine` package, and reject other modules that have the same name."""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType

__all__ = ["ROOT", "import_engine"]

ROOT = os.path.dirname(os.path.dirname(__file__))  # noqa: PTH120  # pathlib is slow to import
"""Directory that contains the packages ``onecycle``, ``engine``, ``schedules`` and ``schemas``."""


def import_engine() -> ModuleType:
    """Import and return onecycle's `engine` package.

    Raises:
        ImportError: one of the user's modules has the same name as onecycle's ``engine``,
            ``schedules`` or ``schemas`` package.
    """
    spec = importlib.util.find_spec("engine")
    found = spec and [*(spec.submodule_search_locations or ()), spec.origin][0]
    if found != os.path.join(ROOT, "engine"):  # noqa: PTH118
        raise ImportError(
            f"Python imports {found} instead of onecycle's package `engine`. Rename this file or "
            "directory, for example to `my_engine`."
        )
    import engine

    return engine
