"""What an output stream can show."""

from __future__ import annotations

import os
from typing import IO

__all__ = ["supports_color"]


def supports_color(stream: IO[str]) -> bool:
    """Return whether a stream is a terminal whose user did not set ``NO_COLOR``.

    >>> import io
    >>> supports_color(io.StringIO())
    False
    """
    return stream.isatty() and "NO_COLOR" not in os.environ
