"""Detect the width and color support of a terminal, wrap text, and align tables."""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import IO

__all__ = ["format_rows", "get_width", "supports_color", "wrap"]

_GAP = 2
_INDENT = 4
_LEAST = 32
"""Minimum width of a wrapped cell. If less space is left, the cell starts on a new line."""


def supports_color(stream: IO[str]) -> bool:
    """Return whether a stream is a terminal and the environment variable ``NO_COLOR`` is not set.

    >>> import io
    >>> supports_color(io.StringIO())
    False
    """
    return stream.isatty() and "NO_COLOR" not in os.environ


def get_width(stream: IO[str]) -> int | None:
    """Return the number of columns of the terminal, or None if the stream is not a terminal.

    Output to a file or a pipe is not wrapped, so that other programs can read one result per line.
    """
    return shutil.get_terminal_size().columns if stream.isatty() else None


def wrap(text: str, width: int | None, indent: int = _INDENT) -> list[str]:
    """Wrap a paragraph at word boundaries.

    Words that are longer than a line, such as paths, are not split, so that they can be copied.

    Args:
        text: paragraph without line breaks.
        width: number of columns; None to keep the paragraph on one line.
        indent: number of spaces before each line except the first.

    >>> wrap("one two three", 8, indent=2)
    ['one two', '  three']
    """
    if width is None or len(text) <= width:
        return [text]
    return textwrap.wrap(
        text,
        width,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    ) or [""]


def format_rows(
    rows: Iterable[Sequence[str]], width: int | None, *, indent: int = 0, widest: int | None = None
) -> Iterator[str]:
    """Yield the lines of a table without borders, with aligned columns.

    If a row does not fit, its last cell is wrapped. If too little space is left next to the other
    cells, the last cell starts on a new line.

    Args:
        rows: rows with the same number of cells.
        width: width of the terminal in characters; None for no limit.
        indent: number of spaces before each row.
        widest: maximum width to which cells are padded; None for no limit. A longer cell shifts the
            rest of its row to the right.

    >>> list(format_rows([("a", "one"), ("bcd", "two")], None))
    ['a    one', 'bcd  two']
    """
    table = [tuple(row) for row in rows]
    columns = zip(*(row[:-1] for row in table), strict=True)
    widths = [min(max(map(len, column)), widest or max(map(len, column))) for column in columns]
    for *cells, last in table:
        padded = [cell.ljust(size + _GAP) for cell, size in zip(cells, widths, strict=True)]
        head = " " * indent + "".join(
            cell if cell.endswith(" ") else f"{cell}  " for cell in padded
        )
        yield from _append_cell(head, last, width, indent)


def _append_cell(head: str, last: str, width: int | None, indent: int) -> Iterator[str]:
    if width is None or len(head) + len(last) <= width:
        yield f"{head}{last}".rstrip()
        return
    start = len(head)
    if width - start < min(_LEAST, len(last)):
        yield head.rstrip()
        start = indent + _INDENT
        head = " " * start
    lines = wrap(last, max(_LEAST, width - start), indent=0)
    yield head + lines[0]
    yield from (" " * start + line for line in lines[1:])
