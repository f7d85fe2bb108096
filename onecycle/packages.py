"""Import `engine`, and not a module of the user that has the same name."""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType

__all__ = ["ROOT", "import_engine"]

ROOT = os.path.dirname(os.path.dirname(__file__))  # noqa: PTH120  # pathlib is slow to import
"""Directory that contains the packages ``onecycle``, ``engine``, ``schedules`` and ``schemas``."""


def import_engine() -> ModuleType:
    """Import and return the package `engine`.

    Raises:
        ImportError: a module of the user has the name ``engine``, ``schedules`` or ``schemas``.
            `engine` itself checks the last two.
    """
    spec = importlib.util.find_spec("engine")
    found = spec and [*(spec.submodule_search_locations or ()), spec.origin][0]
    if found != os.path.join(ROOT, "engine"):  # noqa: PTH118
        raise ImportError(
            f"`engine` must be a package of onecycle, but Python imports {found} under this name. "
            "Rename that file or directory, for example to `my_engine`."
        )
    import engine

    return engine
