"""Import the objects that a config specifies as ``module:attribute``."""

from __future__ import annotations

import importlib
import traceback
from typing import Any

__all__ = ["import_attribute"]


def import_attribute(path: str) -> Any:
    """Import and return the object at ``module:attribute``.

    Raises:
        ValueError: the module is not found, its import fails, or the attribute does not exist.

    >>> import_attribute("math:pi")
    3.141592653589793
    """
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module_name}.".startswith(f"{missing}."):
            reason = f"there is no module {missing!r}. Add its directory to PYTHONPATH."
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
    """Return the file and line of an error in an imported module."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    frame = [frame for frame in frames if not frame.filename.startswith("<frozen")][-1]
    return f"{frame.filename}, line {frame.lineno}"
