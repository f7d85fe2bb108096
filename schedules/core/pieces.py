"""Pieces of curves: ranges of steps in which a curve has a single formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = [
    "Formula",
    "Line",
    "Phase",
    "Piece",
    "constant_piece",
    "find_next_step",
    "shorten",
]

# Maps a step to a value. A formula that uses only + - * / also accepts an array of steps.
Formula = Callable[[Any], Any]


class Line(NamedTuple):
    """Coefficients of the linear formula ``start_value + rise * ((step - origin) / steps)``.

    Lines with the same ``origin`` and ``steps`` share the quotient ``(step - origin) / steps``, so
    the quotient can be computed once for all of them.
    """

    start_value: float
    rise: float
    origin: float
    steps: float


class Piece(NamedTuple):
    """A range of steps, ``start <= step < end``, in which a curve has a single formula.

    The bounds can be fractional, for example if a duration is specified in samples.
    """

    start: float
    end: float
    formula: Formula
    elementwise: bool
    """Whether to evaluate arrays one element at a time. This is necessary for functions such as cos
    and log, which numpy and ``math`` round differently."""
    line: Line | None = None
    """Coefficients of the formula, if it is linear."""


def constant_piece(value: float, start: float, end: float) -> Piece:
    """Return a piece that has the same value at every step in ``start <= step < end``."""
    line = Line(value, 0.0, start, 1.0)
    return Piece(start, end, lambda k: value, elementwise=False, line=line)


def shorten(piece: Piece, end: float) -> Piece:
    """Return the piece, truncated at step ``end``."""
    return piece if piece.end <= end else Piece(piece.start, end, *piece[2:])


def find_next_step(piece: Piece, step: int, end: int) -> int:
    """Return the first integer step after ``piece``, but at most ``end``.

    ``step`` is a step in ``piece``. The result is always greater than ``step``, so that a loop over
    pieces advances even if rounding makes ``piece`` end at ``step``.
    """
    return max(step + 1, math.ceil(piece.end)) if piece.end < end else end


class Phase(NamedTuple):
    """A named part of a curve, such as the warmup, and the step at which it starts."""

    start: float
    name: str
