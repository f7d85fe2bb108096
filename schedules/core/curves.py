"""Curves that map a step to a value, such as linear ramps and cosines.

A `Curve` can be evaluated at a single step (without numpy) or at an array of steps, with bitwise
identical results. It consists of pieces, each with one formula for a range of steps. A ramp is
exactly equal to its start value at step 0, and to its end value once it has ended.

    >>> warmup = linear(0.0, 1.0, steps=4)
    >>> [warmup(step) for step in range(6)]
    [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, overload

from schedules.core.pieces import Formula, Line, Phase, Piece, constant_piece, find_next_step

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Curve",
    "constant",
    "cosine",
    "exponential",
    "from_function",
    "geometric",
    "half_life",
    "inverse_sqrt",
    "inverse_sqrt_ramp",
    "inverse_time",
    "linear",
    "linear_growth",
    "log",
    "one_minus_sqrt",
    "polynomial",
    "power_of",
    "ramp",
]

_BLOCK = 8192


class Curve(ABC):
    """Base class of curves. A curve maps a step (0, 1, 2, …) to a value."""

    @abstractmethod
    def piece(self, step: float, origin: float = 0) -> Piece:
        """Return the piece that contains ``step``, for a curve that starts at step ``origin``."""

    def phases(self, origin: float = 0) -> tuple[Phase, ...]:
        """Return the named phases, such as a warmup, of a curve that starts at step ``origin``."""
        del origin  # Only combined curves have phases.
        return ()

    def pieces(self, start: int, end: int) -> Iterator[Piece]:
        """Yield pieces with integer bounds that cover steps ``start`` to ``end - 1``."""
        while start < end:
            piece = self.piece(start)
            stop = find_next_step(piece, start, end)
            yield Piece(start, stop, *piece[2:])
            start = stop

    def values(self, count: int) -> Iterator[float]:
        """Yield the values at steps 0 to ``count - 1``. This method does not require numpy."""
        for piece in self.pieces(0, count):
            yield from map(piece.formula, range(int(piece.start), int(piece.end)))

    def array(self, count: int) -> NDArray[Any]:
        """Return the values at steps 0 to ``count - 1`` as a numpy array.

        >>> linear(0.0, 1.0, steps=2).array(3)
        array([0. , 0.5, 1. ])
        """
        import numpy as np

        values = np.empty(count)
        self.fill(values, 0)
        return values

    def fill(self, values: NDArray[Any], start: int, origin: float = 0) -> None:
        """Fill the array ``values`` with the curve's values from step ``start`` on.

        The curve starts at step ``origin``. Subclasses whose curves have many pieces override this
        method with a faster implementation.
        """
        import numpy as np

        counted = np.arange(min(_BLOCK, len(values)), dtype=float)
        end, done = start + len(values), start
        while done < end:
            piece = self.piece(done, origin)
            stop = find_next_step(piece, done, end)
            # Blocks that fit into the CPU cache are four times as fast as the whole array at once.
            for first in range(done, stop, _BLOCK):
                last = min(first + _BLOCK, stop)
                block = values[first - start : last - start]
                if piece.line is not None and piece.line.rise == 0:
                    block[:] = piece.line.start_value
                elif piece.elementwise:
                    block[:] = [piece.formula(step) for step in range(first, last)]
                elif piece.line is None:
                    block[:] = piece.formula(counted[: last - first] + first)
                else:
                    np.add(counted[: last - first], first - piece.line.origin, out=block)
                    block /= piece.line.steps
                    block *= piece.line.rise
                    block += piece.line.start_value
            done = stop

    @overload
    def __call__(self, steps: int) -> float: ...
    @overload
    def __call__(self, steps: ArrayLike) -> NDArray[Any] | float: ...
    def __call__(self, steps: int | ArrayLike) -> NDArray[Any] | float:
        """Return the value at a step, or a float64 array of values for an array of steps.

        Raises:
            ValueError: a step is negative.
        """
        if isinstance(steps, int):
            if steps < 0:
                raise ValueError(f"`steps` must be >= 0, got {steps}.")
            value: float = self.piece(steps).formula(steps)
            return value
        import numpy as np

        array = np.asarray(steps)
        flat = array.ravel()
        if flat.size and flat.min() < 0:
            raise ValueError(f"All `steps` must be >= 0, got {flat.min()}.")
        order = None if (flat[1:] >= flat[:-1]).all() else np.argsort(flat, kind="stable")
        ascending = flat if order is None else flat[order]
        values = self.values_at(ascending)
        if order is not None:
            unsorted = np.empty_like(values)
            unsorted[order] = values
            values = unsorted
        return values.reshape(array.shape)

    def values_at(self, ascending: NDArray[Any]) -> NDArray[Any]:
        """Return the values at a sorted array of steps. Steps can be fractional."""
        import numpy as np

        values = np.empty(ascending.size)
        done = 0
        while done < ascending.size:
            piece = self.piece(ascending[done].item())
            stop = max(done + 1, int(np.searchsorted(ascending, piece.end)))
            steps = ascending[done:stop]
            values[done:stop] = (
                [piece.formula(step) for step in steps.tolist()]
                if piece.elementwise
                else piece.formula(steps)
            )
            done = stop
        return values


class _Shape(Curve):
    """A curve that follows a formula until step ``steps`` and then stays at ``end_value``."""

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
        return constant_piece(held, end, math.inf)


class _Linear(Curve):
    def __init__(self, start_value: float, end_value: float, steps: float) -> None:
        self._start_value = start_value
        self._end_value = end_value
        self._steps = steps

    def piece(self, step: float, origin: float = 0) -> Piece:
        # With a*(1-x) + b*x, rounding could give values outside [a, b], even if a == b. The formula
        # below can miss the end value by one bit, but the end value is in a separate piece.
        start_value, end_value, steps = self._start_value, self._end_value, self._steps
        end = origin + steps
        if step >= end:
            return constant_piece(end_value, end, math.inf)
        rise = end_value - start_value
        return Piece(
            origin,
            end,
            lambda k: start_value + rise * ((k - origin) / steps),
            elementwise=False,
            line=Line(start_value, rise, origin, steps),
        )


class _Constant(Curve):
    def __init__(self, value: float) -> None:
        self._value = value

    def piece(self, step: float, origin: float = 0) -> Piece:
        del step  # One piece covers all steps.
        return constant_piece(self._value, origin, math.inf)


def constant(value: float) -> Curve:
    """Return a curve that has the same value at every step.

    >>> constant(0.1)(1_000_000)
    0.1
    """
    return _Constant(value)


def linear(start: float, end: float, steps: float) -> Curve:
    """Return the linear ramp ``f(k) = start + (end - start) * min(1, k / steps)``.

    >>> list(linear(1.0, 2.0, steps=4).values(6))
    [1.0, 1.25, 1.5, 1.75, 2.0, 2.0]
    """
    return _Linear(start, end, steps)


def ramp(start: float, end: float, steps: float, rise: Callable[[float], float]) -> Curve:
    """Return a ramp of any shape: ``f(k) = start + (end - start) * rise(min(1, k / steps))``.

    Args:
        start: value at step 0.
        end: value at and after step ``steps``.
        steps: length of the ramp in steps.
        rise: function on [0, 1] with ``rise(0) == 0`` and ``rise(1) == 1``.

    >>> list(ramp(0.0, 1.0, steps=4, rise=lambda x: x * x).values(6))
    [0.0, 0.0625, 0.25, 0.5625, 1.0, 1.0]
    """
    change = end - start

    def formula(origin: float) -> Formula:
        return lambda k: start + change * rise((k - origin) / steps)

    return _Shape(formula, steps=steps, end_value=end, elementwise=True)


def cosine(start: float, end: float, steps: float) -> Curve:
    """Return the cosine ramp ``f(k) = end + (start - end) * (1 + cos(pi * k / steps)) / 2``.

    After step ``steps``, the value is ``end``.

    >>> [round(value, 6) for value in cosine(1.0, 0.0, steps=4).values(6)]
    [1.0, 0.853553, 0.5, 0.146447, 0.0, 0.0]

    Source: Loshchilov and Hutter, SGDR, https://arxiv.org/abs/1608.03983, equation 5.
    """
    # (1 + cos(pi x)) / 2 == 1 - sin(pi x / 2)**2. The right-hand side is exactly 1 at the start.
    quarter = math.pi / 2
    return ramp(start, end, steps, lambda x: math.sin(quarter * x) ** 2)


def polynomial(start: float, end: float, steps: float, power: float) -> Curve:
    """Return the ramp ``f(k) = end + (start - end) * (1 - min(1, k / steps)) ** power``.

    >>> list(polynomial(1.0, 0.0, steps=4, power=2.0).values(6))
    [1.0, 0.5625, 0.25, 0.0625, 0.0, 0.0]
    """
    return ramp(start, end, steps, lambda x: 1 - (1 - x) ** power)


def one_minus_sqrt(start: float, end: float, steps: float) -> Curve:
    """Return the ramp ``f(k) = start + (end - start) * sqrt(min(1, k / steps))``.

    The ramp is steepest at the start.

    >>> list(one_minus_sqrt(1.0, 0.0, steps=4).values(6))[:2]
    [1.0, 0.5]

    Source: Hägele et al., https://arxiv.org/abs/2405.18392, section 3.
    """
    return ramp(start, end, steps, math.sqrt)


def half_life(start: float, end: float, steps: float) -> Curve:
    """Return the ramp ``f(k) = start + (end - start) * 2 * (1 - 2 ** -min(1, k / steps))``.

    >>> [round(value, 6) for value in half_life(1.0, 0.0, steps=2).values(4)]
    [1.0, 0.414214, 0.0, 0.0]

    Source: the exponential decay of ``OptimizerParamScheduler`` in
    megatron/core/optimizer_param_scheduler.py.
    """
    return ramp(start, end, steps, lambda x: 2 - 2 * 0.5**x)


def geometric(start: float, end: float, steps: float) -> Curve:
    """Return the geometric ramp ``f(k) = start * (end / start) ** min(1, k / steps)``.

    The ramp is a straight line on a logarithmic scale.

    >>> [round(value, 6) for value in geometric(1.0, 0.01, steps=2).values(4)]
    [1.0, 0.1, 0.01, 0.01]
    """
    ratio = end / start

    def formula(origin: float) -> Formula:
        return lambda k: start * ratio ** ((k - origin) / steps)

    return _Shape(formula, steps=steps, end_value=end, elementwise=True)


def log(start: float, end: float, steps: float) -> Curve:
    """Return the ramp ``f(k) = start + (end - start) * min(1, ln(1 + k) / ln(max(2, steps)))``.

    This is DeepSpeed's logarithmic warmup. It reaches its end value at ``k = max(2, steps) - 1``.

    >>> [round(value, 6) for value in log(0.0, 1.0, steps=4).values(6)]
    [0.0, 0.5, 0.792481, 1.0, 1.0, 1.0]

    Source: ``WarmupLR._get_gamma`` in deepspeed/runtime/lr_schedules.py.
    """
    last = max(2, steps) - 1
    return ramp(start, end, last, lambda x: math.log1p(x * last) / math.log1p(last))


def power_of(start: float, factor: float, exponent: float) -> float:
    """Return ``start * factor ** exponent``.

    If ``factor ** exponent`` overflows, return infinity, or 0 if ``start`` is 0.

    >>> power_of(0.5, 2.0, 3), power_of(0.5, 10.0, 1e6), power_of(0.0, 10.0, 1e6)
    (4.0, inf, 0.0)
    """
    try:
        value: float = start * factor**exponent
    except OverflowError:
        return math.inf if start else 0.0
    return value


def exponential(start: float, factor: float, steps: float) -> Curve:
    """Return the exponential curve ``f(k) = start * factor ** (k / steps)``.

    A value that is too large for a float becomes infinity.

    >>> list(exponential(1.0, factor=0.25, steps=2).values(5))
    [1.0, 0.5, 0.25, 0.125, 0.0625]
    """

    def formula(origin: float) -> Formula:
        return lambda k: power_of(start, factor, (k - origin) / steps)

    return _Shape(formula, elementwise=True)


def inverse_sqrt(start: float, steps: float) -> Curve:
    """Return the inverse square root decay ``f(k) = start / sqrt(1 + k / steps)``.

    >>> list(inverse_sqrt(1.0, steps=1).values(4))[::3]
    [1.0, 0.5]
    """

    def formula(origin: float) -> Formula:
        return lambda k: start / math.sqrt(1 + (k - origin) / steps)

    return _Shape(formula, elementwise=True)


def inverse_sqrt_ramp(start: float, end: float, steps: float) -> Curve:
    """Return the inverse square root ramp ``f(k) = start / sqrt(1 + c * min(1, k / steps))``.

    The constant c is ``(start / end) ** 2 - 1``, so that the value at step ``steps`` is ``end``.

    >>> [round(value, 6) for value in inverse_sqrt_ramp(1.0, 0.5, steps=3).values(5)]
    [1.0, 0.707107, 0.57735, 0.5, 0.5]
    """
    ratio = start / end
    change = ratio * ratio - 1  # infinite if it is too large, where ** would raise an error

    def formula(origin: float) -> Formula:
        return lambda k: start / math.sqrt(1 + change * ((k - origin) / steps))

    return _Shape(formula, steps=steps, end_value=end, elementwise=True)


def inverse_time(start: float, rate: float, steps: float) -> Curve:
    """Return the inverse time decay ``f(k) = start / (1 + rate * k / steps)``.

    >>> list(inverse_time(1.0, rate=1.0, steps=2).values(5))
    [1.0, 0.6666666666666666, 0.5, 0.4, 0.3333333333333333]
    """

    def formula(origin: float) -> Formula:
        return lambda k: start / (1 + rate * ((k - origin) / steps))

    return _Shape(formula)


def linear_growth(start: float, rate: float, steps: float) -> Curve:
    """Return the unbounded linear curve ``f(k) = start * (1 + rate * k / steps)``.

    >>> list(linear_growth(0.5, rate=1.0, steps=2).values(4))
    [0.5, 0.75, 1.0, 1.25]
    """

    def formula(origin: float) -> Formula:
        return lambda k: start * (1 + rate * ((k - origin) / steps))

    return _Shape(formula)


def from_function(function: Callable[[float], float]) -> Curve:
    """Return a curve whose value at step k is ``function(k)``.

    >>> list(from_function(lambda k: 0.5**k).values(3))
    [1.0, 0.5, 0.25]
    """

    def formula(origin: float) -> Formula:
        return lambda k: float(function(k - origin))

    return _Shape(formula, elementwise=True)
