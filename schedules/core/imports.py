"""Import the objects that a config specifies as ``module:attribute``, if imports are allowed.

Importing a module runs its code. A training run imports the modules that its config names. Commands
that only read a config forbid these imports with ``imports_allowed(False)``, because the config may
come from an untrusted source.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

__all__ = [
    "ImportForbiddenError",
    "are_imports_allowed",
    "check_import_path",
    "import_attribute",
    "imports_allowed",
    "require_imports",
]

_NAME = r"[^\W\d]\w*"
_PATH = re.compile(rf"{_NAME}(\.{_NAME})*:{_NAME}")
_allowed: ContextVar[bool] = ContextVar("imports_allowed", default=True)


class ImportForbiddenError(ValueError):
    """Raised when a config names code that must be imported, but imports are forbidden.

    ValueError
    └── ImportForbiddenError
    """


@contextmanager
def imports_allowed(allowed: bool) -> Iterator[None]:
    """Within a ``with`` block, allow or forbid imports of code named in a config.

    >>> with imports_allowed(False):  # doctest: +ELLIPSIS
    ...     import_attribute("math:pi")
    Traceback (most recent call last):
    schedules.core.imports.ImportForbiddenError: 'math:pi' cannot be imported, because imports ...
    """
    token = _allowed.set(allowed)
    try:
        yield
    finally:
        _allowed.reset(token)


def are_imports_allowed() -> bool:
    """Return whether imports of code named in a config are allowed; see `imports_allowed`."""
    return _allowed.get()


def require_imports(name: str) -> None:
    """Raise an error if imports of code named in a config are forbidden.

    Args:
        name: import path or entry point to be imported.

    Raises:
        ImportForbiddenError: imports are not allowed here (see `imports_allowed`).
    """
    if not are_imports_allowed():
        raise ImportForbiddenError(
            f"{name!r} cannot be imported, because imports are disabled. If you trust the code, "
            "enable imports with `imports_allowed(True)` or `--allow-imports`."
        )


def check_import_path(path: str, directories: Sequence[str] = ()) -> bool:
    """Check the syntax of an import path, and return whether the module can be found.

    This function imports nothing, not even the packages that contain the module. If the module
    cannot be looked up without an import, return True.

    Args:
        path: import path of the form ``module:attribute``.
        directories: directories to search if the module is not on ``sys.path``.

    Raises:
        ValueError: the path does not have the form ``module:attribute``.

    >>> check_import_path("json.decoder:JSONDecoder"), check_import_path("no_such_module:f")
    (True, False)
    """
    if not _PATH.fullmatch(path):
        raise ValueError(
            f"{path!r} is not an import path. Write it as `module:attribute`, such as "
            "`my_package.my_module:my_function`."
        )
    package, *below = path.partition(":")[0].split(".")
    try:
        spec = importlib.util.find_spec(package) or importlib.machinery.PathFinder.find_spec(
            package, list(directories)
        )
        for name in below:
            if spec is None or spec.submodule_search_locations is None:
                return False
            package = f"{package}.{name}"
            # `importlib.util.find_spec` would import the package that contains the module.
            directories = list(spec.submodule_search_locations)
            spec = importlib.machinery.PathFinder.find_spec(package, directories)
    except (ImportError, AttributeError, KeyError, ValueError):
        return True  # a module without a spec, or found by a custom finder: it cannot be checked
    # A directory without Python files is a package without a loader.
    return spec is not None and spec.loader is not None


def import_attribute(path: str) -> Any:
    """Import and return the object at ``module:attribute``.

    Raises:
        ImportForbiddenError: imports are not allowed here (see `imports_allowed`).
        ValueError: the module is not found, its import fails, or the attribute does not exist.

    >>> import_attribute("math:pi")
    3.141592653589793
    """
    require_imports(path)
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module_name}.".startswith(f"{missing}."):
            reason = (
                f"no module {missing!r} was found. Add the directory that contains it to "
                "PYTHONPATH."
            )
        else:
            text = error.msg if isinstance(error, SyntaxError) else error
            kind, location = type(error).__name__, _location(error)
            reason = f"importing its module failed with {kind}: {text} ({location})."
        raise ValueError(f"{path!r} cannot be imported: {reason}") from error
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        raise ValueError(f"{path!r} cannot be imported: {error}.") from error


def _location(error: Exception) -> str:
    """Return the file and line where an import raised an error."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    frame = [frame for frame in frames if not frame.filename.startswith("<frozen")][-1]
    return f"{frame.filename}, line {frame.lineno}"
