"""Curves: functions from a step to a value. The only file in which shapes are written.

A `Curve` is evaluated at one step (floats, the standard library alone) or at an array of steps
(numpy, imported only then); both give the same value to the last bit. It is made of pieces, each
one formula on a half-open range of steps, so a loop that walks through a run evaluates one flat
function a step, and a whole run is a few array operations.

Every shape starts its own clock at 0 and says its value at its first step exactly. A ramp holds
its end value from its last step on, so its end is exact too.

    >>> warmup = linear(0.0, 1.0, steps=4)
    >>> [warmup(step) for step in range(6)]
    [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, overload

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Curve",
    "Formula",
    "Line",
    "Phase",
    "Piece",
    "constant",
    "cosine",
    "eased",
    "exponential",
    "from_function",
    "geometric",
    "half_life",
    "inverse_sqrt",
    "inverse_time",
    "level",
    "linear",
    "linear_growth",
    "log",
    "one_minus_sqrt",
    "polynomial",
    "until",
]

# A formula takes a step and gives a value. One whose operators numpy evaluates bit for bit as
# Python does (+ - * /) takes an array of steps as well: see `Piece.elementwise`.
Formula = Callable[[Any], Any]

_BLOCK = 8192


class Line(NamedTuple):
    """A straight formula taken apart: ``begin_value + rise * ((step - origin) / steps)``.

    Curves that climb and fall together share the quotient, so it is worked out once for all.
    """

    begin_value: float
    rise: float
    origin: float
    steps: float


class Piece(NamedTuple):
    """One formula of a curve and the steps on which it holds: ``begin <= step < end``.

    The bounds may lie between two steps, as where a duration is given in samples.
    """

    begin: float
    end: float
    at: Formula
    elementwise: bool
    """Whether an array has to be evaluated element by element, because numpy's own version of a
    function (sin, log, a power) may differ from `math`'s in the last bit."""
    line: Line | None = None
    """The same formula taken apart, where it is straight."""


def level(value: float, begin: float, end: float) -> Piece:
    """Return the piece that has one value from ``begin`` to ``end``."""
    line = Line(value, 0.0, begin, 1.0)
    return Piece(begin, end, lambda k: value, elementwise=False, line=line)


def until(piece: Piece, end: float) -> Piece:
    """Return the piece, cut off at ``end``."""
    return piece if piece.end <= end else Piece(piece.begin, end, *piece[2:])


class Phase(NamedTuple):
    """A stretch of a curve that people have a name for, and the step at which it begins."""

    begin: float
    name: str


class Curve(ABC):
    """A function from a step (0, 1, 2, …) to a value; see the module for what it promises."""

    @abstractmethod
    def piece(self, step: float, origin: float = 0) -> Piece:
        """Return the piece that holds at ``step`` when this curve's clock starts at ``origin``."""

    def phases(self, origin: float = 0) -> tuple[Phase, ...]:
        """Return the named stretches when this curve's clock starts at ``origin``."""
        del origin  # only what is made of other curves has any
        return ()

    def pieces(self, begin: int, end: int) -> Iterator[Piece]:
        """Yield the pieces of the steps from ``begin`` up to, but without, ``end``."""
        while begin < end:
            piece = self.piece(begin)
            stop = math.ceil(piece.end) if piece.end < end else end
            yield Piece(begin, stop, *piece[2:])
            begin = stop

    def values(self, count: int) -> Iterator[float]:
        """Yield the values of the steps from 0 up to, but without, ``count``, in pure Python."""
        for piece in self.pieces(0, count):
            yield from map(piece.at, range(int(piece.begin), int(piece.end)))

    def array(self, count: int) -> NDArray[Any]:
        """Return the values of the steps from 0 up to, but without, ``count``, as an array.

        >>> linear(0.0, 1.0, steps=2).array(3)
        array([0. , 0.5, 1. ])
        """
        import numpy as np

        values = np.empty(count)
        self.fill(values, 0)
        return values

    def fill(self, values: NDArray[Any], begin: int, origin: float = 0) -> None:
        """Write the values of the steps from ``begin`` on into an array, as many as it holds.

        Curves of very many pieces do better than one after the other.
        """
        import numpy as np

        counted = np.arange(min(_BLOCK, len(values)), dtype=float)
        end, done = begin + len(values), begin
        while done < end:
            piece = self.piece(done, origin)
            stop = math.ceil(piece.end) if piece.end < end else end
            # In blocks that stay in the processor's cache: four times as fast as all at once.
            for first in range(done, stop, _BLOCK):
                last = min(first + _BLOCK, stop)
                block = values[first - begin : last - begin]
                if piece.line is not None and piece.line.rise == 0:
                    block[:] = piece.line.begin_value
                elif piece.elementwise:
                    block[:] = [piece.at(step) for step in range(first, last)]
                elif piece.line is None:
                    block[:] = piece.at(counted[: last - first] + first)
                else:
                    np.add(counted[: last - first], first - piece.line.origin, out=block)
                    block /= piece.line.steps
                    block *= piece.line.rise
                    block += piece.line.begin_value
            done = stop

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
        values = self.over(ascending)
        if order is not None:
            unsorted = np.empty_like(values)
            unsorted[order] = values
            values = unsorted
        return values.reshape(array.shape)

    def over(self, ascending: NDArray[Any]) -> NDArray[Any]:
        """Return the values at steps in ascending order, which may lie between two updates."""
        import numpy as np

        values = np.empty(ascending.size)
        done = 0
        while done < ascending.size:
            piece = self.piece(ascending[done].item())
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
        formula: Callable[[float], Formula],
        *,
        steps: float = math.inf,
        end_value: float = math.nan,
        elementwise: bool = False,
    ) -> None:
        self._formula = formula
        self._steps = steps
        self._end_value = end_value
        self._elementwise = elementwise

    def piece(self, step: float, origin: float = 0) -> Piece:
        end = origin + self._steps
        if step < end:
            return Piece(origin, end, self._formula(origin), self._elementwise)
        held = self._end_value
        return level(held, end, math.inf)


class _Linear(Curve):
    def __init__(self, begin_value: float, end_value: float, steps: float) -> None:
        self._begin_value = begin_value
        self._end_value = end_value
        self._steps = steps

    def piece(self, step: float, origin: float = 0) -> Piece:
        # Not written as a*(1-x) + b*x: that leaves [a, b] by a bit, and is not flat when a == b.
        # This would miss the end by a bit, but the end is the held value's own piece.
        begin_value, end_value, steps = self._begin_value, self._end_value, self._steps
        end = origin + steps
        if step >= end:
            return level(end_value, end, math.inf)
        rise = end_value - begin_value
        return Piece(
            origin,
            end,
            lambda k: begin_value + rise * ((k - origin) / steps),
            elementwise=False,
            line=Line(begin_value, rise, origin, steps),
        )


class _Constant(Curve):
    def __init__(self, value: float) -> None:
        self._value = value

    def piece(self, step: float, origin: float = 0) -> Piece:
        del step  # one piece for all
        return level(self._value, origin, math.inf)


def constant(value: float) -> Curve:
    """Return the curve that is ``value`` at every step.

    >>> constant(0.1)(1_000_000)
    0.1
    """
    return _Constant(value)


def linear(begin_value: float, end_value: float, steps: float) -> Curve:
    """Return the straight ramp ``begin + (end - begin) * k / steps``, held from ``steps`` on.

    >>> list(linear(1.0, 2.0, steps=4).values(6))
    [1.0, 1.25, 1.5, 1.75, 2.0, 2.0]
    """
    return _Linear(begin_value, end_value, steps)


def eased(
    begin_value: float, end_value: float, steps: float, rise: Callable[[float], float]
) -> Curve:
    """Return ``begin + (end - begin) * rise(k / steps)``, held from ``steps`` on.

    Args:
        begin_value: the value at step 0.
        end_value: the value at ``steps`` and after.
        steps: length of the ramp.
        rise: from 0 at 0 to 1 at 1.

    >>> list(eased(0.0, 1.0, steps=4, rise=lambda x: x * x).values(6))
    [0.0, 0.0625, 0.25, 0.5625, 1.0, 1.0]
    """
    change = end_value - begin_value

    def formula(origin: float) -> Formula:
        return lambda k: begin_value + change * rise((k - origin) / steps)

    return _Shape(formula, steps=steps, end_value=end_value, elementwise=True)


def cosine(begin_value: float, end_value: float, steps: float) -> Curve:
    """Return half a cosine wave, ``end + (begin - end) * (1 + cos(pi * k / steps)) / 2``, held.

    >>> [round(value, 6) for value in cosine(1.0, 0.0, steps=4).values(6)]
    [1.0, 0.853553, 0.5, 0.146447, 0.0, 0.0]

    Source: Loshchilov and Hutter, SGDR, https://arxiv.org/abs/1608.03983, equation 5.
    """
    # (1 + cos(pi x)) / 2 == 1 - sin(pi x / 2)**2, and the latter is exactly 1 at the start.
    quarter = math.pi / 2
    return eased(begin_value, end_value, steps, lambda x: math.sin(quarter * x) ** 2)


def polynomial(begin_value: float, end_value: float, steps: float, power: float) -> Curve:
    """Return ``end + (begin - end) * (1 - k / steps) ** power``, held.

    >>> list(polynomial(1.0, 0.0, steps=4, power=2.0).values(6))
    [1.0, 0.5625, 0.25, 0.0625, 0.0, 0.0]
    """
    return eased(begin_value, end_value, steps, lambda x: 1 - (1 - x) ** power)


def one_minus_sqrt(begin_value: float, end_value: float, steps: float) -> Curve:
    """Return ``begin + (end - begin) * sqrt(k / steps)``, held: fast at first, then ever slower.

    >>> list(one_minus_sqrt(1.0, 0.0, steps=4).values(6))[:2]
    [1.0, 0.5]

    Source: Hägele et al., https://arxiv.org/abs/2405.18392, section 3.
    """
    return eased(begin_value, end_value, steps, math.sqrt)


def half_life(begin_value: float, end_value: float, steps: float) -> Curve:
    """Return ``begin + (end - begin) * 2 * (1 - 2 ** (-k / steps))``, held.

    >>> [round(value, 6) for value in half_life(1.0, 0.0, steps=2).values(4)]
    [1.0, 0.414214, 0.0, 0.0]

    Source: the exponential decay of ``OptimizerParamScheduler``,
    megatron/core/optimizer_param_scheduler.py.
    """
    return eased(begin_value, end_value, steps, lambda x: 2 - 2 * 0.5**x)


def geometric(begin_value: float, end_value: float, steps: float) -> Curve:
    """Return ``begin * (end / begin) ** (k / steps)``, held: a straight line on a log scale.

    >>> [round(value, 6) for value in geometric(1.0, 0.01, steps=2).values(4)]
    [1.0, 0.1, 0.01, 0.01]
    """
    ratio = end_value / begin_value

    def formula(origin: float) -> Formula:
        return lambda k: begin_value * ratio ** ((k - origin) / steps)

    return _Shape(formula, steps=steps, end_value=end_value, elementwise=True)


def log(begin_value: float, end_value: float, steps: float) -> Curve:
    """Return the logarithmic ramp ``begin + (end - begin) * ln(1 + k) / ln(steps)``, held.

    It is DeepSpeed's: it comes to its end at ``k = steps - 1`` (one step up where ``steps`` is 1).

    >>> [round(value, 6) for value in log(0.0, 1.0, steps=4).values(6)]
    [0.0, 0.5, 0.792481, 1.0, 1.0, 1.0]

    Source: ``WarmupLR._get_gamma`` of deepspeed/runtime/lr_schedules.py.
    """
    last = max(2, steps) - 1
    return eased(begin_value, end_value, last, lambda x: math.log1p(x * last) / math.log1p(last))


def exponential(begin_value: float, factor: float, steps: float) -> Curve:
    """Return ``begin * factor ** (k / steps)``, which goes on for ever.

    >>> list(exponential(1.0, factor=0.25, steps=2).values(5))
    [1.0, 0.5, 0.25, 0.125, 0.0625]
    """

    def formula(origin: float) -> Formula:
        return lambda k: begin_value * factor ** ((k - origin) / steps)

    return _Shape(formula, elementwise=True)


def inverse_sqrt(begin_value: float, steps: float) -> Curve:
    """Return ``begin / sqrt(1 + k / steps)``, which goes on for ever.

    >>> list(inverse_sqrt(1.0, steps=1).values(4))[::3]
    [1.0, 0.5]
    """

    def formula(origin: float) -> Formula:
        return lambda k: begin_value / math.sqrt(1 + (k - origin) / steps)

    return _Shape(formula, elementwise=True)


def inverse_time(begin_value: float, rate: float, steps: float) -> Curve:
    """Return the hyperbolic decay ``begin / (1 + rate * k / steps)``, which goes on for ever.

    >>> list(inverse_time(1.0, rate=1.0, steps=2).values(5))
    [1.0, 0.6666666666666666, 0.5, 0.4, 0.3333333333333333]
    """

    def formula(origin: float) -> Formula:
        return lambda k: begin_value / (1 + rate * ((k - origin) / steps))

    return _Shape(formula)


def linear_growth(begin_value: float, rate: float, steps: float) -> Curve:
    """Return the line ``begin * (1 + rate * k / steps)``, which goes on for ever.

    >>> list(linear_growth(0.5, rate=1.0, steps=2).values(4))
    [0.5, 0.75, 1.0, 1.25]
    """

    def formula(origin: float) -> Formula:
        return lambda k: begin_value * (1 + rate * ((k - origin) / steps))

    return _Shape(formula)


def from_function(function: Callable[[float], float]) -> Curve:
    """Return the curve of any function of the step.

    >>> list(from_function(lambda k: 0.5**k).values(3))
    [1.0, 0.5, 0.25]
    """

    def formula(origin: float) -> Formula:
        return lambda k: float(function(k - origin))

    return _Shape(formula, elementwise=True)
