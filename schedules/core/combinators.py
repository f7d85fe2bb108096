"""Functions that combine or transform curves. The basic curves are in `schedules.core.curves`.

>>> from schedules.core.curves import linear
>>> one_up_one_down = join([linear(0.0, 1.0, steps=4), linear(1.0, 0.0, steps=2)], [4])
>>> list(one_up_one_down.values(8))
[0.0, 0.25, 0.5, 0.75, 1.0, 0.5, 0.0, 0.0]
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from schedules.core.curves import Curve, constant, linear, power_of
from schedules.core.pieces import Phase, Piece, constant_piece, shorten

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "decay_after_warmup",
    "delay",
    "dilate",
    "join",
    "linear_warmup",
    "multiply_at",
    "pointwise",
    "repeat",
    "scale",
    "stairs",
]

_CACHED_CYCLES = 16
_MAX_GROWING_CYCLES = 100_000  # all later cycles have the same length
_NEVER = 2.0**100  # steps; no run is that long


class _Join(Curve):
    def __init__(
        self, parts: Sequence[Curve], boundaries: Sequence[float], names: Sequence[str]
    ) -> None:
        self._parts = tuple(parts)
        self._starts = (0, *boundaries)
        self._names = names

    def phases(self, origin: float = 0) -> tuple[Phase, ...]:
        ends = (*self._starts[1:], math.inf)
        spans = [(origin + a, origin + b) for a, b in zip(self._starts, ends, strict=True)]
        return tuple(
            phase
            for part, name, (start, end) in zip(self._parts, self._names, spans, strict=True)
            for phase in part.phases(start) or (Phase(start, name),)
            if phase.name and start <= phase.start < end
        )

    def piece(self, step: float, origin: float = 0) -> Piece:
        index = bisect_right(self._starts, step - origin) - 1
        start = origin + self._starts[index]
        piece = self._parts[index].piece(step, start)
        if index + 1 == len(self._starts):
            return piece
        return shorten(piece, origin + self._starts[index + 1])

    def fill(self, values: NDArray[Any], start: int, origin: float = 0) -> None:
        end = start + len(values)
        ends = (*self._starts[1:], math.inf)
        for part, part_start, part_end in zip(self._parts, self._starts, ends, strict=True):
            first = max(start, math.ceil(origin + part_start))
            last = min(end, math.ceil(min(origin + part_end, end)))
            if first < last:
                part.fill(values[first - start : last - start], first, origin + part_start)


def join(parts: Iterable[Curve], boundaries: Iterable[float], names: Sequence[str] = ()) -> Curve:
    """Concatenate curves. Each curve counts its steps from the boundary at which it starts.

    Args:
        parts: curves to concatenate, in order.
        boundaries: steps at which the second and later parts start, in ascending order. A part
            between two equal boundaries is skipped.
        names: names of the parts, shown in plots. For a part with named phases, plots show
            the names of these phases instead.

    Raises:
        ValueError: the number of boundaries is wrong, a boundary is negative, or the boundaries
            are not in ascending order.
    """
    parts, boundaries = tuple(parts), tuple(boundaries)
    if len(boundaries) != len(parts) - 1:
        raise ValueError(
            f"`boundaries` must have {len(parts) - 1} entries for {len(parts)} parts, "
            f"got {boundaries}. Pass the start step of each part except the first."
        )
    if list(boundaries) != sorted(boundaries) or (boundaries and boundaries[0] < 0):
        raise ValueError(f"`boundaries` must be >= 0 and in ascending order, got {boundaries}.")
    return _Join(parts, boundaries, names or ("",) * len(parts))


def decay_after_warmup(
    decay: Callable[[float, float, float], Curve], peak: float, end_value: float, steps: float
) -> Curve:
    """Return the curve that follows a warmup: a decay, or the constant ``peak`` if ``steps`` is 0.

    Args:
        decay: function that builds the decay from its start value, end value and length.
        peak: value at the end of the warmup.
        end_value: value at the end of the decay.
        steps: length of the decay in steps; 0 if the warmup leaves no steps for it.

    >>> from schedules.core.curves import linear
    >>> list(decay_after_warmup(linear, 1.0, 0.0, steps=0).values(3))
    [1.0, 1.0, 1.0]
    """
    return decay(peak, end_value, steps) if steps > 0 else constant(peak)


def linear_warmup(peak: float, steps: float, *, one_based: bool = False) -> Curve:
    """Return the warmup ``f(k) = peak * min(1, k / steps)``.

    Args:
        peak: value at the end of the warmup.
        steps: length of the warmup in steps.
        one_based: whether the steps are counted from 1: ``f(k) = peak * min(1, (k + 1) / steps)``.

    >>> list(linear_warmup(1.0, 4).values(5))
    [0.0, 0.25, 0.5, 0.75, 1.0]
    >>> list(linear_warmup(1.0, 4, one_based=True).values(5))
    [0.25, 0.5, 0.75, 1.0, 1.0]
    """
    if not one_based:
        return linear(0.0, peak, steps)
    steps = max(1.0, steps)
    return linear(peak / steps, peak, steps - 1)


def multiply_at(start_value: float, factor: float, boundaries: Iterable[float]) -> Curve:
    """Return a piecewise constant curve whose value is multiplied by a factor at each boundary.

    The boundaries are steps in ascending order.

    >>> list(multiply_at(1.0, 0.5, [1, 3]).values(5))
    [1.0, 0.5, 0.5, 0.25, 0.25]
    """
    ends = tuple(boundaries)
    levels = [power_of(start_value, factor, passed) for passed in range(len(ends) + 1)]
    return join(map(constant, levels), ends)


class _Stairs(Curve):
    def __init__(self, curve: Curve, steps: float, count: int, *, rounds_up: bool) -> None:
        self._curve = curve
        self._steps = steps
        self._count = count
        self._rounds_up = rounds_up

    def piece(self, step: float, origin: float = 0) -> Piece:
        # Multiply before dividing, because k / steps * count can be just below a whole number.
        steps, count = self._steps, self._count
        climbed = (step - origin) * count
        if self._rounds_up:
            stair = -(-climbed // steps)
            start = ((stair - 1) * steps + origin * count) // count + 1 if stair else origin
            end = (stair * steps + origin * count) // count + 1
        else:
            stair = climbed // steps
            start = origin + stair * steps / count
            end = origin + (stair + 1) * steps / count
        at_step = stair * steps / count
        value = self._curve.piece(at_step).formula(at_step)
        return constant_piece(value, start, end)

    def fill(self, values: NDArray[Any], start: int, origin: float = 0) -> None:
        import numpy as np

        steps, count = self._steps, self._count
        if not all(float(number).is_integer() for number in (steps, origin)):
            super().fill(values, start, origin)
            return
        # Compute the number and the end of all stairs at once, with the arithmetic of `piece`.
        first, last = start - int(origin), start - int(origin) + len(values) - 1
        steps = int(steps)
        if self._rounds_up:
            flight = np.arange(-(-first * count // steps), -(-last * count // steps) + 1)
            ends = flight * steps // count + 1
        else:
            flight = np.arange(first * count // steps, last * count // steps + 1)
            ends = -(-(flight + 1) * steps // count)
        edges = np.clip(np.concatenate(([first], ends)), first, last + 1)
        values[:] = np.repeat(self._curve.values_at(flight * steps / count), np.diff(edges))


def stairs(curve: Curve, steps: float, count: int, *, rounds_up: bool = False) -> Curve:
    """Turn a curve into a staircase that changes every ``steps / count`` steps.

    The value at step k is the value of ``curve`` at ``floor(k * count / steps) * steps / count``.
    With ``rounds_up=True``, ``ceil`` replaces ``floor``.

    >>> from schedules.core.curves import linear
    >>> list(stairs(linear(0.0, 1.0, steps=4), steps=4, count=2).values(6))
    [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]
    >>> list(stairs(linear(1.0, 0.0, steps=4), steps=4, count=2, rounds_up=True).values(6))
    [1.0, 0.5, 0.5, 0.0, 0.0, 0.0]
    """
    return _Stairs(curve, steps, count, rounds_up=rounds_up)


class _Repeat(Curve):
    def __init__(self, make: Callable[[int, float], Curve], steps: float, growth: float) -> None:
        self._make = functools.lru_cache(maxsize=_CACHED_CYCLES)(make)
        self._growth = growth
        self._starts = [0.0]
        self._steps = [steps]

    def piece(self, step: float, origin: float = 0) -> Piece:
        local = step - origin
        if self._growth == 1:
            cycle = int(local // self._steps[0])
            start, steps = cycle * self._steps[0], self._steps[0]
        else:
            while local >= self._starts[-1] + self._steps[-1] and not self._is_stuck:
                self._starts.append(self._starts[-1] + self._steps[-1])
                self._steps.append(_grow(self._steps[-1], self._growth))
            cycle = bisect_right(self._starts, local) - 1
            start, steps = self._starts[cycle], self._steps[cycle]
            if local >= start + steps:  # the last cycle has the same length as all later ones
                later = int((local - start) // steps)
                cycle, start = cycle + later, start + later * steps
        piece = self._make(cycle, steps).piece(step, origin + start)
        return shorten(piece, origin + start + steps)

    @property
    def _is_stuck(self) -> bool:
        """Whether all later cycles have the same length.

        Short cycles can stop growing, because lengths are truncated to whole steps.
        """
        last = self._steps[-1]
        return last == _grow(last, self._growth) or len(self._steps) >= _MAX_GROWING_CYCLES


def _grow(steps: float, growth: float) -> float:
    longer = growth * steps
    return max(1, int(longer)) if longer <= _NEVER else math.inf


def repeat(make: Callable[[int, float], Curve], steps: float, growth: float = 1) -> Curve:
    """Return a curve that repeats a cycle indefinitely.

    Args:
        make: function that builds the curve of a cycle from the index of the cycle (0, 1, 2, …)
            and its length in steps. Each of these curves counts its steps from the start of its
            cycle.
        steps: length of the first cycle, in steps.
        growth: length of each cycle divided by the length of the previous cycle, >= 1. If it is
            greater than 1, the lengths of the later cycles are truncated to whole steps.

    >>> from schedules.core.curves import linear
    >>> saw = repeat(lambda cycle, steps: linear(1.0, 0.0, steps), steps=2, growth=2)
    >>> list(saw.values(8))
    [1.0, 0.5, 1.0, 0.75, 0.5, 0.25, 1.0, 0.875]
    """
    return _Repeat(make, steps, growth)


class _Pointwise(Curve):
    def __init__(self, combine: Callable[[float, float], float], left: Curve, right: Curve) -> None:
        self._combine = combine
        self._left = left
        self._right = right

    def piece(self, step: float, origin: float = 0) -> Piece:
        left, right = self._left.piece(step, origin), self._right.piece(step, origin)
        combine, left_at, right_at = self._combine, left.formula, right.formula
        return Piece(
            max(left.start, right.start),
            min(left.end, right.end),
            lambda k: combine(left_at(k), right_at(k)),
            elementwise=True,
        )

    def phases(self, origin: float = 0) -> tuple[Phase, ...]:
        return self._left.phases(origin) or self._right.phases(origin)


def pointwise(combine: Callable[[float, float], float], left: Curve, right: Curve) -> Curve:
    """Return the combination of two curves, ``f(k) = combine(left(k), right(k))``.

    >>> from schedules.core.curves import constant, linear
    >>> list(pointwise(max, linear(1.0, 0.0, steps=4), constant(0.3)).values(5))
    [1.0, 0.75, 0.5, 0.3, 0.3]
    """
    return _Pointwise(combine, left, right)


class _Dilate(Curve):
    def __init__(self, curve: Curve, ratio: float) -> None:
        self._curve = curve
        self._ratio = ratio

    def piece(self, step: float, origin: float = 0) -> Piece:
        ratio = self._ratio
        piece = self._curve.piece((step - origin) / ratio)
        at = piece.formula
        end = origin + piece.end * ratio
        if math.isfinite(end):
            last = math.ceil(end) - 1
            if (last - origin) / ratio >= piece.end:  # the multiplication was rounded up
                end = last
        return Piece(
            origin + piece.start * ratio,
            end,
            lambda k: at((k - origin) / ratio),
            elementwise=True,
        )

    def phases(self, origin: float = 0) -> tuple[Phase, ...]:
        return tuple(
            Phase(origin + phase.start * self._ratio, phase.name) for phase in self._curve.phases()
        )


def dilate(curve: Curve, ratio: float) -> Curve:
    """Return a stretched curve. Its value at step k is the value of ``curve`` at ``k / ratio``.

    >>> from schedules.core.curves import linear
    >>> list(dilate(linear(0.0, 1.0, steps=2), ratio=2).values(5))
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    return curve if ratio == 1 else _Dilate(curve, ratio)


class _Delay(Curve):
    def __init__(self, curve: Curve, steps: float) -> None:
        self._curve = curve
        self._steps = steps

    def piece(self, step: float, origin: float = 0) -> Piece:
        return self._curve.piece(step, origin + self._steps)

    def fill(self, values: NDArray[Any], start: int, origin: float = 0) -> None:
        self._curve.fill(values, start, origin + self._steps)

    def phases(self, origin: float = 0) -> tuple[Phase, ...]:
        return self._curve.phases(origin + self._steps)


def delay(curve: Curve, steps: float) -> Curve:
    """Return a shifted curve. Its value at step k is the value of ``curve`` at ``k - steps``.

    With a negative ``steps``, the curve starts earlier and its first steps are skipped.

    >>> from schedules.core.curves import linear
    >>> list(delay(linear(0.0, 1.0, steps=4), steps=-2).values(4))
    [0.5, 0.75, 1.0, 1.0]
    """
    return _Delay(curve, steps)


class _Scale(Curve):
    def __init__(self, curve: Curve, factor: float) -> None:
        self._curve = curve
        self._factor = factor

    def piece(self, step: float, origin: float = 0) -> Piece:
        factor, piece = self._factor, self._curve.piece(step, origin)
        at = piece.formula
        if piece.line is not None and piece.line.rise == 0:
            return constant_piece(at(step) * factor, piece.start, piece.end)
        return Piece(piece.start, piece.end, lambda k: at(k) * factor, piece.elementwise)

    def phases(self, origin: float = 0) -> tuple[Phase, ...]:
        return self._curve.phases(origin)


def scale(curve: Curve, factor: float) -> Curve:
    """Return the product of a curve and a factor, ``f(k) = curve(k) * factor``.

    >>> from schedules.core.curves import linear
    >>> list(scale(linear(0.0, 1.0, steps=2), factor=0.5).values(4))
    [0.0, 0.25, 0.5, 0.5]
    """
    return curve if factor == 1 else _Scale(curve, factor)
