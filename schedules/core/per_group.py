"""Convert a field's number or list to one value per param group."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

from schedules.core.curves import Curve
from schedules.core.fields import PerGroup, as_tuple

__all__ = [
    "PRECISION",
    "are_equal",
    "broadcast",
    "broadcast_lr",
    "broadcast_strict",
    "build_curve_per_group",
    "exceeds",
]

PRECISION = 1e-6
"""Largest relative difference at which two values count as equal. Schedulers differ in how they
round, and a learning rate in a tensor may have single precision."""


def are_equal(base: tuple[float, ...]) -> bool:
    """Return whether all param groups have the same initial value, up to rounding errors.

    >>> are_equal((0.1, 0.10000000149011612))  # the second is 0.1 in 32 bits
    True
    """
    return all(math.isclose(value, base[0], rel_tol=PRECISION) for value in base)


def build_curve_per_group(
    make: Callable[..., Curve], *columns: tuple[Any, ...]
) -> tuple[Curve, ...]:
    """Build the curve of each param group.

    Args:
        make: function that builds the curve of a group.
        *columns: arguments of ``make``, each a tuple with one value per group. Groups with equal
            arguments share one curve.
    """
    make_once = functools.cache(make)
    return tuple(make_once(*row) for row in zip(*columns, strict=True))


def exceeds(low: PerGroup, high: PerGroup) -> bool:
    """Return whether ``low`` is greater than ``high`` in any param group."""
    if isinstance(low, tuple) and isinstance(high, tuple):
        return any(map(operator.gt, low, high))
    return bool(max(as_tuple(low)) > min(as_tuple(high)))


def broadcast(name: str, value: PerGroup, base: tuple[float, ...]) -> tuple[float, ...]:
    """Convert the value of a field to one number per param group.

    Args:
        name: name of the field, for the error message.
        value: list with one number per group, or a single number for all groups.
        base: initial value of each group; only the number of groups matters.

    Raises:
        ValueError: ``value`` is a list that does not have one number per group.
    """
    if isinstance(value, int | float):
        return (value,) * len(base)
    if len(value) != len(base):
        raise ValueError(
            f"`{name}` must be a number or a list with one number per param group ({len(base)}), "
            f"got a list of length {len(value)}."
        )
    return tuple(value)


def broadcast_lr(schedule: Any, name: str, lrs: tuple[float, ...]) -> tuple[float, ...]:
    """Convert a schedule's learning-rate field to one learning rate per param group.

    If the field is None, return the initial learning rates. If ``relative`` is true, multiply the
    initial learning rates by the field's value.

    Args:
        schedule: schedule with a field ``relative``.
        name: name of the field.
        lrs: initial learning rate of each group.

    Raises:
        ValueError: the field is a list that does not have one number per group; or the field is a
            single number, ``relative`` is false, and the groups have different initial learning
            rates.

    >>> import schedules
    >>> warmup = schedules.WarmupLR(warmup_max_lr=10.0, relative=True)
    >>> broadcast_lr(warmup, "warmup_max_lr", (0.1, 0.01))
    (1.0, 0.1)
    """
    value = getattr(schedule, name)
    if value is None:
        return lrs
    if schedule.relative:
        factors = broadcast(name, value, lrs)
        return tuple(factor * lr for factor, lr in zip(factors, lrs, strict=True))
    fix = ' Alternatively, set `"relative": true` and use multiples of the initial values.'
    return broadcast_strict(name, value, lrs, fix)


def broadcast_strict(
    name: str, value: PerGroup, base: tuple[float, ...], fix: str = ""
) -> tuple[float, ...]:
    """Like `broadcast`, but reject a single number if the values in ``base`` differ.

    Raises:
        ValueError: ``value`` is a single number but the groups have different initial values, or
            ``value`` is a list that does not have one number per group.
    """
    if isinstance(value, int | float) and not are_equal(base):
        groups = ", ".join(f"group {index}: {each:g}" for index, each in enumerate(base))
        raise ValueError(
            f"`{name}` must be a list with one number per param group, because the groups have "
            f"different initial values ({groups}), got {value:g}.{fix}"
        )
    return broadcast(name, value, base)
