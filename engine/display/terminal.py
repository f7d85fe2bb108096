"""Detect the width and color support of a terminal, wrap text, and align tables."""

from __future__ import annotations

import os
import shutil
import textwrap
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import IO

__all__ = ["count_columns", "format_rows", "get_width", "supports_color", "truncate", "wrap"]

_GAP = 2
_INDENT = 4
_LEAST = 32
"""Minimum width of a wrapped cell. If less space is left, the cell starts on a new line."""

_FILLER = "\0"  # does not occur in printed text


def count_columns(text: str) -> int:
    """Return the number of terminal columns that a text without control characters needs.

    East Asian characters need two columns, and combining characters need none.

    >>> count_columns("abc"), count_columns("日本"), count_columns("e\\u0301")
    (3, 4, 1)
    """
    return len(text) if text.isascii() else sum(map(_get_columns, text))


def _get_columns(character: str) -> int:
    if unicodedata.category(character) in {"Mn", "Me"}:
        return 0
    return 2 if unicodedata.east_asian_width(character) in {"W", "F"} else 1


def truncate(text: str, width: int) -> str:
    """Return the longest prefix of a text that fits in a number of terminal columns.

    >>> truncate("日本語", 5)
    '日本'
    """
    if text.isascii():
        return text[:width]
    for index, character in enumerate(text):
        width -= _get_columns(character)
        if width < 0:
            return text[:index]
    return text


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
    if width is None or count_columns(text) <= width:
        return [text]
    # `textwrap` counts characters, so a filler stands for the second column of a wide character.
    widened = "".join(each + _FILLER * (_get_columns(each) - 1) for each in text)
    lines = textwrap.wrap(
        widened,
        width,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(_FILLER, "") for line in lines] or [""]


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
    longest = [max(map(count_columns, column)) for column in columns]
    widths = [min(size, widest or size) for size in longest]
    for *cells, last in table:
        padded = [
            cell + " " * (size + _GAP - count_columns(cell))
            for cell, size in zip(cells, widths, strict=True)
        ]
        head = " " * indent + "".join(
            cell if cell.endswith(" ") else f"{cell}  " for cell in padded
        )
        yield from _append_cell(head, last, width, indent)


def _append_cell(head: str, last: str, width: int | None, indent: int) -> Iterator[str]:
    start = count_columns(head)
    if width is None or start + count_columns(last) <= width:
        yield f"{head}{last}".rstrip()
        return
    if width - start < min(_LEAST, count_columns(last)):
        yield head.rstrip()
        start = indent + _INDENT
        head = " " * start
    lines = wrap(last, max(_LEAST, width - start), indent=0)
    yield head + lines[0]
    yield from (" " * start + line for line in lines[1:])
