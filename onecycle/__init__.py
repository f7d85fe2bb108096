"""Re-export the public API of `engine`, and the package ``schedules`` as ``onecycle.schedules``.

For example, ``onecycle.initialize`` is `engine.initialize`. Names are imported lazily.
``__init__.pyi`` declares their types.

If one of the user's files, such as an ``engine.py`` next to the training script, shadows the
package ``engine``, ``schedules`` or ``schemas``, importing ``onecycle`` raises an ImportError that
names the file.
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
        return engine.__getattr__(name)  # finds names of DeepSpeed, but no modules of `engine`
    except AttributeError:
        raise AttributeError(f"module 'onecycle' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})


# `python -m onecycle` imports this file before `isolated.py` can remove the working directory from
# `sys.path`. At that time, `sys.argv[0]` is "-m", and `isolated.py` checks the packages later.
if sys.argv[:1] != ["-m"]:
    import_engine()
