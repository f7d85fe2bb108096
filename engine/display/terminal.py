"""Detect whether an output stream supports color."""

from __future__ import annotations

import os
from typing import IO

__all__ = ["supports_color"]


def supports_color(stream: IO[str]) -> bool:
    """Return whether a stream is a terminal and the environment variable ``NO_COLOR`` is not set.

    >>> import io
    >>> supports_color(io.StringIO())
    False
    """
    return stream.isatty() and "NO_COLOR" not in os.environ
