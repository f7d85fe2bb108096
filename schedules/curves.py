"""Curves: functions from a step to a value. The only file in which shapes of curves are written.

A `Curve` is evaluated at one step (floats, the standard library alone) or at an array of steps
(numpy, imported only then); both give the same value to the last bit. It is made of pieces, each
one formula on a half-open range of steps, so a loop that walks through a run evaluates one flat
function a step, and a whole run is a few array operations.

Every shape starts its own clock at 0 and says its value at its first step exactly. A ramp holds
its end value from its last step on, so its end is exact too.

    >>> warmup = linear(0.0, 1.0, steps=4)
    >>> one_up_one_down = join([warmup, linear(1.0, 0.0, steps=2)], boundaries=[4])
    >>> [one_up_one_down(step) for step in range(8)]
    [0.0, 0.25, 0.5, 0.75, 1.0, 0.5, 0.0, 0.0]
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, overload

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Curve",
    "Piece",
    "constant",
    "cosine",
    "delay",
    "inverse_time",
    "join",
    "linear",
    "linear_growth",
    "log",
    "stairs",
]

# A formula takes a step and gives a value. One whose operators numpy evaluates bit for bit as
# Python does (+ - * /) takes an array of steps as well: see `Piece.elementwise`.
Formula = Callable[[Any], Any]


class Piece(NamedTuple):
    """One formula of a curve and the steps on which it holds: ``begin <= step < end``."""

    begin: int
    end: float
    at: Formula
    elementwise: bool
    """Whether an array has to be evaluated element by element, because numpy's own version of a
    function (sin, log, a power) may differ from `math`'s in the last bit."""


class Curve(ABC):
    """A function from a step (0, 1, 2, …) to a value; see the module for what it promises."""

    @abstractmethod
    def piece(self, step: int, origin: int = 0) -> Piece:
        """Return the piece that holds at ``step`` when this curve's clock starts at ``origin``."""

    def pieces(self, begin: int, end: float) -> Iterator[Piece]:
        """Yield the pieces that cover the steps from ``begin`` up to, but without, ``end``."""
        while begin < end:
            piece = self.piece(begin)
            yield piece._replace(begin=begin, end=min(piece.end, end))
            if piece.end == math.inf:
                return
            begin = int(piece.end)

    def values(self, count: int) -> Iterator[float]:
        """Yield the values of the steps from 0 up to, but without, ``count``, in pure Python."""
        for piece in self.pieces(0, count):
            yield from map(piece.at, range(piece.begin, int(piece.end)))

    @overload
    def __call__(self, steps: int) -> float: ...
    @overload
    def __call__(self, steps: ArrayLike) -> NDArray[Any] | float: ...
    def __call__(self, steps: int | ArrayLike) -> NDArray[Any] | float:
        """Return the value at a step, or the values (float64, same shape) at an array of steps.

        Raises:
            ValueError: a step is negative.
        """
        if isinstance(steps, int):
            if steps < 0:
                raise ValueError(f"`step` must be 0 or more, but is {steps} instead.")
            value: float = self.piece(steps).at(steps)
            return value
        import numpy as np

        array = np.asarray(steps)
        flat = array.ravel()
        if flat.size and flat.min() < 0:
            raise ValueError(f"`steps` must be 0 or more, but hold {flat.min()}.")
        order = None if (flat[1:] >= flat[:-1]).all() else np.argsort(flat, kind="stable")
        ascending = flat if order is None else flat[order]
        values = self._over(ascending)
        if order is not None:
            unsorted = np.empty_like(values)
            unsorted[order] = values
            values = unsorted
        return values.reshape(array.shape)

    def _over(self, ascending: NDArray[Any]) -> NDArray[Any]:
        import numpy as np

        values = np.empty(ascending.size)
        done = 0
        while done < ascending.size:
            piece = self.piece(int(ascending[done]))
            stop = int(np.searchsorted(ascending, piece.end))
            steps = ascending[done:stop]
            values[done:stop] = (
                [piece.at(step) for step in steps.tolist()]
                if piece.elementwise
                else piece.at(steps)
            )
            done = stop
        return values


class _Shape(Curve):
    """One formula from step 0, and from ``steps`` on (if that is finite) its end value."""

    def __init__(
        self,
        formula: Callable[[int], Formula],
        *,
        steps: float = math.inf,
        end_value: float = math.nan,
        elementwise: bool = False,
    ) -> None:
        self._formula = formula
        self._steps = steps
        self._end_value = end_value
        self._elementwise = elementwise

    def piece(self, step: int, origin: int = 0) -> Piece:
        end = origin + self._steps
        if step < end:
            return Piece(origin, end, self._formula(origin), self._elementwise)
        held = self._end_value
        return Piece(int(end), math.inf, lambda k: held, elementwise=False)


def constant(value: float) -> Curve:
    """Return the curve that is ``value`` at every step.

    >>> constant(0.1)(1_000_000)
    0.1
    """
    return _Shape(lambda origin: lambda k: value)


def linear(begin_value: float, end_value: float, steps: int) -> Curve:
    """Return the straight ramp ``begin + (end - begin) * k / steps``, held from ``steps`` on.

    >>> list(linear(1.0, 2.0, steps=4).values(6))
    [1.0, 1.25, 1.5, 1.75, 2.0, 2.0]
    """
    rise = end_value - begin_value

    # Not written as a*(1-x) + b*x: that form leaves [a, b] by a bit, and is not flat when a == b.
    # This one would miss the end by a bit, but the end is the held value's own piece.
    def formula(origin: int) -> Formula:
        return lambda k: begin_value + rise * ((k - origin) / steps)

    return _Shape(formula, steps=steps, end_value=end_value)


def cosine(begin_value: float, end_value: float, steps: int) -> Curve:
    """Return half a cosine wave, ``end + (begin - end) * (1 + cos(pi * k / steps)) / 2``, held.

    >>> [round(value, 6) for value in cosine(1.0, 0.0, steps=4).values(6)]
    [1.0, 0.853553, 0.5, 0.146447, 0.0, 0.0]

    Source: Loshchilov and Hutter, SGDR, https://arxiv.org/abs/1608.03983, equation 5.
    """
    fall = begin_value - end_value
    sin, quarter = math.sin, math.pi / 2

    # (1 + cos(pi x)) / 2 == 1 - sin(pi x / 2)**2, and the latter is exactly 1 at the start.
    def formula(origin: int) -> Formula:
        return lambda k: begin_value - fall * sin(quarter * ((k - origin) / steps)) ** 2

    return _Shape(formula, steps=steps, end_value=end_value, elementwise=True)


def log(begin_value: float, end_value: float, steps: int) -> Curve:
    """Return the logarithmic ramp ``begin + (end - begin) * ln(1 + k) / ln(steps)``, held.

    It is DeepSpeed's: it comes to its end at ``k = steps - 1`` (one step up where ``steps`` is 1).

    >>> [round(value, 6) for value in log(0.0, 1.0, steps=4).values(6)]
    [0.0, 0.5, 0.792481, 1.0, 1.0, 1.0]

    Source: ``WarmupLR._get_gamma`` of deepspeed/runtime/lr_schedules.py.
    """
    rise = end_value - begin_value
    steps = max(2, steps)
    ln, per_ln = math.log, 1 / math.log(steps)

    def formula(origin: int) -> Formula:
        return lambda k: begin_value + rise * (ln(1 + k - origin) * per_ln)

    return _Shape(formula, steps=steps - 1, end_value=end_value, elementwise=True)


def inverse_time(begin_value: float, rate: float, steps: int) -> Curve:
    """Return the hyperbolic decay ``begin / (1 + rate * k / steps)``, which goes on for ever.

    >>> list(inverse_time(1.0, rate=1.0, steps=2).values(5))
    [1.0, 0.6666666666666666, 0.5, 0.4, 0.3333333333333333]
    """

    def formula(origin: int) -> Formula:
        return lambda k: begin_value / (1 + rate * ((k - origin) / steps))

    return _Shape(formula)


def linear_growth(begin_value: float, rate: float, steps: int) -> Curve:
    """Return the line ``begin * (1 + rate * k / steps)``, which goes on for ever.

    >>> list(linear_growth(0.5, rate=1.0, steps=2).values(4))
    [0.5, 0.75, 1.0, 1.25]
    """

    def formula(origin: int) -> Formula:
        return lambda k: begin_value * (1 + rate * ((k - origin) / steps))

    return _Shape(formula)


class _Join(Curve):
    def __init__(self, parts: Sequence[Curve], boundaries: Sequence[int]) -> None:
        self._parts = tuple(parts)
        self._begins = (0, *boundaries)

    def piece(self, step: int, origin: int = 0) -> Piece:
        index = bisect_right(self._begins, step - origin) - 1
        begin = origin + self._begins[index]
        piece = self._parts[index].piece(step, begin)
        if index + 1 == len(self._begins):
            return piece
        return piece._replace(end=min(piece.end, origin + self._begins[index + 1]))


def join(parts: Iterable[Curve], boundaries: Iterable[int]) -> Curve:
    """Return the curve that follows each part in turn, every part on a clock of its own.

    Args:
        parts: the curves, in order.
        boundaries: the step at which each part but the first begins, in ascending order. A part
            between two equal boundaries has no steps.

    Raises:
        ValueError: the boundaries do not fit the parts, or do not ascend from 0.
    """
    parts, boundaries = tuple(parts), tuple(boundaries)
    if len(boundaries) != len(parts) - 1:
        raise ValueError(
            f"`boundaries` must be one fewer than the {len(parts)} parts, but are {boundaries}."
        )
    if list(boundaries) != sorted(boundaries) or (boundaries and boundaries[0] < 0):
        raise ValueError(f"`boundaries` must ascend from 0, but are {boundaries} instead.")
    return _Join(parts, boundaries)


class _Stairs(Curve):
    def __init__(self, curve: Curve, steps: int, count: int, *, rounds_up: bool) -> None:
        self._curve = curve
        self._steps = steps
        self._count = count
        self._rounds_up = rounds_up

    def piece(self, step: int, origin: int = 0) -> Piece:
        # On integers: the float k / steps * count can fall just short of a whole stair.
        steps, count = self._steps, self._count
        climbed = (step - origin) * count
        if self._rounds_up:
            stair = -(-climbed // steps)
            begin = (stair - 1) * steps // count + 1 if stair else 0
            end = stair * steps // count + 1
        else:
            stair = climbed // steps
            begin = -(-stair * steps // count)
            end = -(-(stair + 1) * steps // count)
        at_step = stair * steps / count
        value = self._curve.piece(math.floor(at_step)).at(at_step)
        return Piece(origin + begin, origin + end, lambda k: value, elementwise=False)


def stairs(curve: Curve, steps: int, count: int, *, rounds_up: bool = False) -> Curve:
    """Return ``curve`` quantised into ``count`` equal stairs every ``steps`` steps.

    The value at k is the curve's at ``floor(k * count / steps) * steps / count``; with
    ``rounds_up`` at the next stair's edge, so that a descent is the mirror image of an ascent.

    >>> list(stairs(linear(0.0, 1.0, steps=4), steps=4, count=2).values(6))
    [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]
    >>> list(stairs(linear(1.0, 0.0, steps=4), steps=4, count=2, rounds_up=True).values(6))
    [1.0, 0.5, 0.5, 0.0, 0.0, 0.0]
    """
    return _Stairs(curve, steps, count, rounds_up=rounds_up)


class _Delay(Curve):
    def __init__(self, curve: Curve, steps: int) -> None:
        self._curve = curve
        self._steps = steps

    def piece(self, step: int, origin: int = 0) -> Piece:
        return self._curve.piece(step, origin + self._steps)


def delay(curve: Curve, steps: int) -> Curve:
    """Return ``curve`` with its clock moved: its value at k is the curve's at ``k - steps``.

    A negative ``steps`` begins in the midst of the curve.

    >>> list(delay(linear(0.0, 1.0, steps=4), steps=-2).values(4))
    [0.5, 0.75, 1.0, 1.0]
    """
    return _Delay(curve, steps)
