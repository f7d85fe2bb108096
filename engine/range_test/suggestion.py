"""From the losses of a range test to the learning rate that it suggests, or to why there is none.

Numbers in, numbers out: nothing here trains, and nothing needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["CAREFUL", "EDGE", "MIN_POINTS", "Smoothed", "Suggestion", "smooth", "suggest"]

MIN_POINTS = 20
"""Fewer losses than these carry no curve."""

MIN_STEPS = 8
"""Fewer learning rates than these carry none either, however often each was tried."""

EDGE = ("end of descent", "minimum", "divergence / 10")
"""The rules for where training still gets better: the maximum of a cycle is their median."""

CAREFUL = ("steepest", "valley", "minimum / 10")
"""What other tools suggest, for a learning rate that is to be kept; a cycle can go further."""

Array = NDArray[np.float64]

# A curve of pure noise, smoothed, still has hills: among some 50 places that are independent of one
# another the highest and the lowest are 4.5 standard errors apart, and hardly ever 7.
_CERTAIN = 7.0
_BANDWIDTHS = (0.015, 0.025, 0.04, 0.06, 0.09, 0.13)  # shares of the sweep
_MOST_POINTS = 400
_BASIN = 0.05  # share of the descent
_SPIKE = 5.0  # standard deviations off the median of its neighbours


@dataclass(frozen=True)
class Smoothed:
    """A curve without its noise: at the logarithms of learning rates, the loss and its error."""

    x: Array
    loss: Array
    error: Array
    """Standard error of each loss, by the noise that was taken out."""


@dataclass(frozen=True)
class Suggestion:
    """The largest learning rate to train with, and how sure that is."""

    max_lr: float | None
    """None: the curve carries none, and `reason` says why."""
    reason: str = ""
    rules: Mapping[str, float] = field(default_factory=dict)
    """What each rule of `EDGE` and `CAREFUL` says that applies."""
    smoothed: Smoothed | None = None

    @property
    def band(self) -> tuple[float, float] | None:
        """From the most careful rule of the edge to the boldest: how far they agree."""
        edge = [self.rules[name] for name in EDGE if name in self.rules]
        return (min(edge), max(edge)) if edge else None


def suggest(lrs: ArrayLike, losses: ArrayLike, *, diverged_at: float | None = None) -> Suggestion:
    """Return the largest learning rate that a range test suggests.

    The curve is smoothed without lag over log(lr): losses that are not finite and single spikes are
    left out, what lies above the start is cut off, and a local line is fitted around each point,
    its width chosen by generalized cross-validation. Then

    - end of descent: where nine tenths of the descent are behind;
    - minimum: the middle of the basin in which the loss is lowest, to a twentieth of the descent;
    - divergence / 10: a tenth of where all that was gained is lost again, or the sweep was ended;
    - steepest: where the loss falls most for a given factor of the learning rate;
    - valley: half-way, in log(lr), between the first and the last tenth of the descent;
    - minimum / 10: a tenth of where the loss is lowest.

    The suggestion is the median of the first three, as far as they apply. A cycle is at its maximum
    for a moment only, so it can go to where the loss stops falling; the last three are for a
    learning rate that is kept, and train a cycle too slowly (docs/results/lr_test.md).

    Args:
        lrs: learning rate of each update, positive; any order, any spacing.
        losses: what came of each, the loss of the update after it; they may be NaN or infinite.
        diverged_at: learning rate at which the test was ended because the loss diverged.

    Raises:
        ValueError: the two differ in length, or a learning rate is not positive.

    >>> lrs = [10 ** (-5 + k / 25) for k in range(150)]
    >>> losses = [2.3 - 1.5 / (1 + (1e-3 / lr) ** 2) + (lr / 0.1) ** 2 for lr in lrs]
    >>> suggestion = suggest(lrs, losses)
    >>> 0.005 < suggestion.max_lr < 0.03, 0.0005 < suggestion.rules["steepest"] < 0.002
    (True, True)
    >>> suggest(lrs, [2.3] * 150).reason
    'the loss does not fall: it is 2.3 at every learning rate'

    Source of the rules: Smith, https://arxiv.org/abs/1506.01186, section 3.3; fastai's
    ``callback/schedule.py`` for steepest, valley and minimum / 10.
    """
    x, y = np.asarray(lrs, float), np.asarray(losses, float)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"there must be a loss for each of the {x.size} lrs, but {y.size} are.")
    if not np.all(x > 0):
        raise ValueError(f"learning rates must be positive, but the least is {x.min()}.")
    order = np.argsort(x, kind="stable")
    x, y = np.log10(x[order]), y[order]
    finite = np.isfinite(y)
    steps = np.unique(x).size
    if finite.sum() < MIN_POINTS:
        kind = "finite losses" if x.size >= MIN_POINTS else "losses"
        return Suggestion(None, f"there are {finite.sum()} {kind}, and {MIN_POINTS} must be")
    if steps < MIN_STEPS:
        return Suggestion(None, f"there are {steps} learning rates, and {MIN_STEPS} must be")
    bursts = _first_burst(x, finite)
    x, y = x[finite], y[finite]
    if np.ptp(y) <= 1e-9 * np.abs(y).max():
        return Suggestion(None, f"the loss does not fall: it is {y[0]:.4g} at every learning rate")
    if bursts is None and diverged_at is not None:
        bursts = math.log10(diverged_at)
    return _read(smooth(x, y), bursts)


def _first_burst(x: Array, finite: NDArray[np.bool_]) -> float | None:
    """Return where losses stop being finite for good: most that follow are not."""
    behind = np.cumsum(finite[::-1])[::-1] / np.arange(finite.size, 0, -1)
    gone = np.flatnonzero(~finite & (behind < 0.5))
    return float(x[gone[0]]) if gone.size else None


def smooth(x: Array, y: Array) -> Smoothed:
    """Return a curve without lag: local lines, as wide as cross-validation finds best.

    Args:
        x: logarithms of learning rates, rising.
        y: finite losses.
    """
    x, y = _without_spikes(*_thinned(x, y))
    start = float(np.median(y[: max(5, y.size // 10)]))
    y = np.minimum(y, start + 0.5 * max(start - float(y.min()), 1e-12))
    span = x[-1] - x[0]
    best: tuple[float, Smoothed] | None = None
    for bandwidth in _BANDWIDTHS:
        weights = _local_lines(x, bandwidth * span)
        fitted = weights @ y
        free = y.size - np.trace(weights)
        if free < 2:
            continue
        # Losses of large learning rates are noisier: the error is that of the neighbourhood.
        residuals = (y - fitted) ** 2
        score = y.size * float(residuals.sum()) / free**2
        if best is None or score < best[0]:
            near = _local_lines(x, _BANDWIDTHS[-1] * span)
            variance = np.maximum(near @ residuals, residuals.mean() / 4) * y.size / free
            error = np.sqrt(variance * (weights**2).sum(1))
            best = score, Smoothed(x, fitted, error)
    assert best is not None  # the widest always leaves freedom
    return best[1]


def _thinned(x: Array, y: Array) -> tuple[Array, Array]:
    """Return means of neighbours where there are more points than a curve needs, or at one x."""
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


def _without_spikes(x: Array, y: Array) -> tuple[Array, Array]:
    """Leave out points that stand alone, far above or below the median of their neighbours."""
    around = np.lib.stride_tricks.sliding_window_view(np.pad(y, 3, mode="reflect"), 7)
    away = np.abs(y - np.median(around, axis=1))
    usual = 1.4826 * np.median(away)
    kept = away <= _SPIKE * max(usual, 1e-12 + 1e-3 * float(np.ptp(np.sort(y)[: y.size * 9 // 10])))
    return x[kept], y[kept]


def _local_lines(x: Array, bandwidth: float) -> Array:
    """Return the matrix that takes losses to the values of lines fitted around each of them."""
    off = x[None, :] - x[:, None]
    # Wide enough to hold some points wherever they are sparse, as in a linear sweep's beginning.
    nearest = np.partition(np.abs(off), min(6, x.size - 1), axis=1)[:, min(6, x.size - 1)]
    width = np.maximum(bandwidth, nearest)[:, None]
    kernel = np.exp(-0.5 * (off / width) ** 2)
    zeroth, first, second = ((kernel * off**power).sum(1, keepdims=True) for power in range(3))
    lines = kernel * (second - first * off)
    return np.asarray(lines / (zeroth * second - first**2))


def _read(curve: Smoothed, burst: float | None) -> Suggestion:
    x, loss = curve.x, curve.loss
    low = int(np.argmin(loss))
    # A hill before the descent is no part of it where nothing but noise has made it.
    top = int(np.argmax(loss[: low + 1]))
    fall = float(loss[top] - loss[low])
    error = float(np.hypot(curve.error[top], curve.error[low]))
    if fall <= _CERTAIN * error or fall <= 0:
        if burst is not None and burst <= x[max(low, 1)]:
            return Suggestion(None, f"the loss is not finite from {10**burst:.3g} on", {}, curve)
        reason = f"the loss falls by {max(fall, 0):.3g} at most, and its noise is of {error:.2g}"
        return Suggestion(None, reason, {}, curve)
    slope = np.gradient(loss, x)
    steepest = top + int(np.argmin(slope[top : low + 1]))
    if low >= x.size - 2 and burst is None and slope[-1] < 0.5 * slope[steepest]:
        reason = f"the loss still falls at the largest learning rate, {10 ** x[-1]:.3g}; raise it"
        return Suggestion(None, reason, {}, curve)
    gained = (loss[top] - loss[top : low + 1]) / fall
    begin = top + int(np.flatnonzero(gained >= 0.1)[0])
    end = top + int(np.flatnonzero(gained >= 0.9)[0])
    rules = {"end of descent": x[end]}
    lost = np.flatnonzero(loss[low:] >= loss[low] + 0.9 * fall)
    turns = lost.size > 0 or burst is not None or low < x.size - 2
    if turns:
        rules["minimum"] = _middle_of_basin(x, loss, loss[low] + _BASIN * fall)
    if lost.size:
        rules["divergence / 10"] = x[low + int(lost[0])] - 1
    elif burst is not None:
        rules["divergence / 10"] = burst - 1
    middle = float(np.median(list(rules.values())))
    rules |= {"steepest": x[steepest], "valley": (x[begin] + x[end]) / 2}
    if turns:
        # Where it lies before the descent, nothing is learnt.
        rules["minimum / 10"] = max(x[low] - 1, x[begin])
    return Suggestion(10**middle, "", _powers(rules), curve)


def _middle_of_basin(x: Array, loss: Array, shore: float) -> float:
    """Return the middle of the stretch around the minimum where the loss is below the shore.

    The very lowest point of a flat basin is chosen by the noise, and its middle is not.
    """
    low = int(np.argmin(loss))
    above = np.flatnonzero(loss > shore)
    left = above[above < low].max(initial=-1) + 1
    right = above[above > low].min(initial=x.size) - 1
    return float(x[left] + x[right]) / 2


def _powers(logarithms: Mapping[str, float]) -> dict[str, float]:
    return {name: float(10**value) for name, value in logarithms.items()}
