"""Run a module of onecycle, even if the working directory has a module with the same name.

``python -m`` puts the working directory first on ``sys.path``. If a project has its own
``engine.py``, ``python -m engine.launch.agent`` would import that file. Python's option ``-P``
prevents this, but with ``-P``, Python also ignores a checkout of onecycle in the working directory
that is not installed. ``python -m onecycle.isolated engine.launch.agent`` ignores the project's
``engine.py`` and finds the checkout.
"""

from __future__ import annotations

import runpy
import sys

from onecycle.packages import ROOT, import_engine

__all__ = ["run_isolated"]


def run_isolated(module: str) -> None:
    """Remove the working directory from ``sys.path``, then run a module as ``python -m`` does.

    A working directory that is a checkout of onecycle stays on ``sys.path``. Call this function
    only in a process that was started with ``python -m``.

    Args:
        module: full name of the module. Its arguments are ``sys.argv[1:]``.
    """
    # Keep the working directory if it is a checkout of onecycle, which may not be installed.
    if not sys.flags.safe_path and sys.path[0] != ROOT:
        del sys.path[0]
    import_engine()  # raises an error if, for example, PYTHONPATH leads to an `engine.py`
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    run_isolated(sys.argv.pop(1))
