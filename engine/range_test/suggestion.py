"""Suggest a maximum learning rate from the losses of an LR range test.

This module does not train a model or import torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["EDGE", "MIN_POINTS", "Suggestion", "smooth", "suggest"]

MIN_POINTS = 20
"""Minimum number of finite losses that a suggestion requires."""

MIN_STEPS = 8
"""Minimum number of distinct learning rates that a suggestion requires."""

EDGE = ("end of descent", "minimum", "divergence / 10")
"""Rules that estimate the largest learning rate that still reduces the loss.

The suggested ``max_lr`` is the median of the estimates.
"""

CAREFUL = ("steepest", "valley", "minimum / 10")
"""Rules that other tools use to select a constant learning rate.

A learning rate selected by one of these rules is too low for the peak of a cycle.
"""

Array = NDArray[np.float64]

# A curve of pure noise is not flat after smoothing. The highest and the lowest of about 50
# independent points typically differ by 4.5 standard errors, and hardly ever by 7.
_CERTAIN = 7.0
_BANDWIDTHS = (0.015, 0.025, 0.04, 0.06, 0.09, 0.13)  # fractions of the sweep
_MOST_POINTS = 400
_BASIN = 0.05  # fraction of the descent
_ROUNDING = 1e-9  # relative differences up to this are rounding errors
_SPIKE = 5.0  # standard deviations from the median of its neighbors


@dataclass(frozen=True)
class SmoothedCurve:
    """A smoothed curve of the loss against the learning rate."""

    x: Array
    """Log10 of the learning rates."""
    loss: Array
    """Smoothed losses."""
    error: Array
    """Standard error of each smoothed loss, estimated from the residuals."""


@dataclass(frozen=True)
class Suggestion:
    """The suggested maximum learning rate, and the learning rate that each rule selects."""

    max_lr: float | None
    """Suggested maximum; None if the curve does not allow a suggestion (see `reason`)."""
    reason: str = ""
    rules: Mapping[str, float] = field(default_factory=dict)
    """Learning rate selected by each applicable rule of `EDGE` and `CAREFUL`."""
    smoothed: SmoothedCurve | None = None

    @property
    def band(self) -> tuple[float, float] | None:
        """The smallest and the largest learning rate selected by the rules in `EDGE`.

        A narrow band means that the rules agree. The value is None if no rule in `EDGE` applies.
        """
        edge = [self.rules[name] for name in self.edge_rules]
        return (min(edge), max(edge)) if edge else None

    @property
    def edge_rules(self) -> tuple[str, ...]:
        """The rules in `EDGE` that apply. ``max_lr`` is the median of their learning rates."""
        return tuple(name for name in EDGE if name in self.rules)


def suggest(lrs: ArrayLike, losses: ArrayLike, *, diverged_at: float | None = None) -> Suggestion:
    """Suggest a maximum learning rate from the losses of a range test.

    First, non-finite losses and isolated spikes are removed, and losses far above the initial loss
    are clipped. The losses are then smoothed over log(lr) by local linear regression, with a
    bandwidth selected by generalized cross-validation. The descent is the difference between the
    minimum of the smoothed loss and its maximum at smaller learning rates. Each rule selects a
    learning rate:

    - end of descent: the learning rate at which the loss has completed 90% of its descent;
    - minimum: the middle, in log(lr), of the range in which the loss exceeds its minimum by less
      than 5% of the descent;
    - divergence / 10: a tenth of the learning rate at which the loss has risen by 90% of the
      descent, is not finite, or has diverged so far that the test ends;
    - steepest: the learning rate at which the loss falls fastest over log(lr);
    - valley: the middle, in log(lr), of the range from 10% to 90% of the descent;
    - minimum / 10: a tenth of the learning rate with the lowest loss, but at least the learning
      rate at 10% of the descent.

    The suggestion is the median of the learning rates that the first three rules select. Rules that
    do not apply are ignored. A 1Cycle schedule reaches its maximum only briefly, so the maximum can
    be as large as the learning rate at which the loss stops decreasing. The last three rules are
    intended for a constant learning rate. The learning rates that they select are too small for the
    maximum of a cycle; see docs/results/lr_test.md.

    Args:
        lrs: learning rate of each step, positive, in any order and spacing.
        losses: loss after each of these steps; may be NaN or infinite.
        diverged_at: learning rate at which the test ended because the loss diverged.

    Raises:
        ValueError: if `lrs` and `losses` differ in length, or a learning rate is not positive.

    >>> lrs = [10 ** (-5 + k / 25) for k in range(150)]
    >>> losses = [2.3 - 1.5 / (1 + (1e-3 / lr) ** 2) + (lr / 0.1) ** 2 for lr in lrs]
    >>> suggestion = suggest(lrs, losses)
    >>> 0.005 < suggestion.max_lr < 0.03, 0.0005 < suggestion.rules["steepest"] < 0.002
    (True, True)
    >>> suggest(lrs, [2.3] * 150).reason
    'the loss does not fall: it is 2.3 at every learning rate'

    The rules steepest, valley and minimum / 10 are adapted from fastai's ``callback/schedule.py``.
    The other rules are based on Smith, https://arxiv.org/abs/1506.01186, section 3.3.
    """
    x, y = np.asarray(lrs, float), np.asarray(losses, float)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(
            f"`lrs` and `losses` must be 1-D with the same length, got shapes {x.shape} and "
            f"{y.shape}. Pass one loss for each learning rate."
        )
    if not np.all(x > 0):
        raise ValueError(
            f"`lrs` must be positive, got {x.min()}. Remove learning rates <= 0 and their losses."
        )
    order = np.argsort(x, kind="stable")
    x, y = np.log10(x[order]), y[order]
    finite = np.isfinite(y)
    steps = np.unique(x).size
    if finite.sum() < MIN_POINTS:
        kind = "finite losses" if x.size >= MIN_POINTS else "losses"
        return Suggestion(None, f"at least {MIN_POINTS} {kind} are required, got {finite.sum()}")
    if steps < MIN_STEPS:
        reason = f"at least {MIN_STEPS} different learning rates are required, got {steps}"
        return Suggestion(None, reason)
    divergence = _find_divergence(x, finite)
    x, y = x[finite], y[finite]
    if np.ptp(y) <= _ROUNDING * np.abs(y).max():
        return Suggestion(None, f"the loss does not fall: it is {y[0]:.4g} at every learning rate")
    if divergence is None and diverged_at is not None:
        divergence = math.log10(diverged_at)
    return _apply_rules(smooth(x, y), divergence)


def _find_divergence(x: Array, finite: NDArray[np.bool_]) -> float | None:
    """Return log10 of the learning rate above which most losses are not finite.

    Return None if most losses are finite up to the highest learning rate.
    """
    finite_after = np.cumsum(finite[::-1])[::-1] / np.arange(finite.size, 0, -1)
    gone = np.flatnonzero(~finite & (finite_after < 0.5))
    return float(x[gone[0]]) if gone.size else None


def smooth(x: Array, y: Array) -> SmoothedCurve:
    """Smooth a loss curve by local linear regression.

    The bandwidth is selected by generalized cross-validation.

    Args:
        x: log10 of the learning rates, ascending.
        y: finite losses.
    """
    x, y = _remove_spikes(*_reduce_points(x, y))
    start = float(np.median(y[: max(5, y.size // 10)]))
    y = np.minimum(y, start + 0.5 * max(start - float(y.min()), 1e-12))
    span = x[-1] - x[0]
    best: tuple[float, SmoothedCurve] | None = None
    for bandwidth in _BANDWIDTHS:
        weights = _build_smoother(x, bandwidth * span)
        fitted = weights @ y
        free = y.size - np.trace(weights)
        if free < 2:
            continue
        # Losses at large learning rates are noisier, so estimate the error locally.
        residuals = (y - fitted) ** 2
        score = y.size * float(residuals.sum()) / free**2
        if best is None or score < best[0]:
            near = _build_smoother(x, _BANDWIDTHS[-1] * span)
            variance = np.maximum(near @ residuals, residuals.mean() / 4) * y.size / free
            error = np.sqrt(variance * (weights**2).sum(1))
            best = score, SmoothedCurve(x, fitted, error)
    assert best is not None  # the largest bandwidth always leaves degrees of freedom
    return best[1]


def _reduce_points(x: Array, y: Array) -> tuple[Array, Array]:
    """Average the losses recorded at the same learning rate.

    If more than 400 points remain, also average neighboring points.
    """
    x, places = np.unique(x, return_inverse=True)
    y = np.bincount(places, y) / np.bincount(places)
    if x.size <= _MOST_POINTS:
        return x, y
    edges = np.linspace(x[0], x[-1], _MOST_POINTS + 1)[1:-1]
    bins = np.searchsorted(edges, x)
    counts = np.bincount(bins, minlength=_MOST_POINTS)
    filled = counts > 0
    mean = [np.bincount(bins, v, _MOST_POINTS)[filled] / counts[filled] for v in (x, y)]
    return mean[0], mean[1]


def _remove_spikes(x: Array, y: Array) -> tuple[Array, Array]:
    """Remove isolated points that are far above or below the median of their neighbors."""
    around = np.lib.stride_tricks.sliding_window_view(np.pad(y, 3, mode="reflect"), 7)
    away = np.abs(y - np.median(around, axis=1))
    usual = 1.4826 * np.median(away)
    kept = away <= _SPIKE * max(usual, 1e-12 + 1e-3 * float(np.ptp(np.sort(y)[: y.size * 9 // 10])))
    return x[kept], y[kept]


def _build_smoother(x: Array, bandwidth: float) -> Array:
    """Return the matrix that maps losses to the fitted values of a local linear regression."""
    off = x[None, :] - x[:, None]
    # Widen the kernel where points are sparse, such as at the start of a linear sweep.
    nearest = np.partition(np.abs(off), min(6, x.size - 1), axis=1)[:, min(6, x.size - 1)]
    width = np.maximum(bandwidth, nearest)[:, None]
    kernel = np.exp(-0.5 * (off / width) ** 2)
    zeroth, first, second = ((kernel * off**power).sum(1, keepdims=True) for power in range(3))
    lines = kernel * (second - first * off)
    return np.asarray(lines / (zeroth * second - first**2))


def _apply_rules(curve: SmoothedCurve, divergence: float | None) -> Suggestion:
    x, loss = curve.x, curve.loss
    low = int(np.argmin(loss))
    # The descent starts at the highest loss before the minimum.
    top = int(np.argmax(loss[: low + 1]))
    fall = float(loss[top] - loss[low])
    error = float(np.hypot(curve.error[top], curve.error[low]))
    if fall <= _CERTAIN * error or fall <= 0:
        if divergence is not None and divergence <= x[max(low, 1)]:
            return Suggestion(
                None, f"the loss diverges at learning rates >= {10**divergence:.3g}", {}, curve
            )
        reason = (
            f"the loss falls by {fall:.3g}, which is not significant with a standard error of "
            f"{error:.2g}"
        )
        if fall <= _ROUNDING * abs(loss[top]):
            reason = "the loss does not fall"
        return Suggestion(None, reason, {}, curve)
    slope = np.gradient(loss, x)
    steepest = top + int(np.argmin(slope[top : low + 1]))
    if low >= x.size - 2 and divergence is None and slope[-1] < 0.5 * slope[steepest]:
        largest = f"{10 ** x[-1]:.3g}"
        reason = f"the loss still falls at the largest learning rate, {largest}; extend the range"
        return Suggestion(None, reason, {}, curve)
    gained = (loss[top] - loss[top : low + 1]) / fall
    first = top + int(np.flatnonzero(gained >= 0.1)[0])
    end = top + int(np.flatnonzero(gained >= 0.9)[0])
    rules = {"end of descent": x[end]}
    lost = np.flatnonzero(loss[low:] >= loss[low] + 0.9 * fall)
    turns = lost.size > 0 or divergence is not None or low < x.size - 2
    if turns:
        rules["minimum"] = _find_middle_of_basin(x, loss, loss[low] + _BASIN * fall)
    if lost.size:
        rules["divergence / 10"] = x[low + int(lost[0])] - 1
    elif divergence is not None:
        rules["divergence / 10"] = divergence - 1
    middle = float(np.median(list(rules.values())))
    rules |= {"steepest": x[steepest], "valley": (x[first] + x[end]) / 2}
    if turns:
        # Before the descent starts, the model does not learn.
        rules["minimum / 10"] = max(x[low] - 1, x[first])
    return Suggestion(10**middle, "", _exponentiate(rules), curve)


def _find_middle_of_basin(x: Array, loss: Array, limit: float) -> float:
    """Return the middle of the basin around the lowest loss.

    The basin ends where the loss exceeds ``limit``. At a flat minimum, noise shifts the lowest
    point, but barely affects the middle of the basin.
    """
    low = int(np.argmin(loss))
    above = np.flatnonzero(loss > limit)
    left = above[above < low].max(initial=-1) + 1
    right = above[above > low].min(initial=x.size) - 1
    return float(x[left] + x[right]) / 2


def _exponentiate(logarithms: Mapping[str, float]) -> dict[str, float]:
    return {name: float(10**value) for name, value in logarithms.items()}
