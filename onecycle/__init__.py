"""All public names of `engine`, and the package `schedules`, under the name of the distribution.

``onecycle.initialize`` is `engine.initialize`, and ``onecycle.schedules`` is the package
``schedules``. Names are imported on first use; ``__init__.pyi`` declares their types.

If a module of the user has the name of a package that onecycle needs, for example an ``engine.py``
next to the training script, importing this package raises an ImportError that names the file.
"""

from __future__ import annotations

import sys
from typing import Any

from onecycle.packages import import_engine


def __getattr__(name: str) -> Any:
    engine = import_engine()
    if name == "__all__":
        return sorted([*engine.__all__, "schedules"])
    if name == "schedules":
        import schedules

        return schedules
    if name in engine.__all__:
        return getattr(engine, name)
    try:
        return engine.__getattr__(name)  # also DeepSpeed's names, but no module of the package
    except AttributeError:
        raise AttributeError(f"module 'onecycle' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})


# `python -m onecycle` imports this file before `isolated.py` can remove the working directory from
# `sys.path`. During that time, `sys.argv[0]` is "-m"; the first use of a name checks the packages.
if sys.argv[:1] != ["-m"]:
    import_engine()
