"""Let commands import the user's modules from the current directory."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["current_directory_on_path"]


@contextlib.contextmanager
def current_directory_on_path() -> Iterator[None]:
    """Allow imports from the current directory inside a ``with`` block."""
    directory = str(Path.cwd())
    sys.path.insert(0, directory)
    try:
        yield
    finally:
        sys.path.remove(directory)
