"""Downsample or smooth a long series for display in a chart."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["choose_points", "smooth"]

Numbers = NDArray[np.float64]


def choose_points(
    x: Numbers, y: Numbers, window: tuple[float, float] | None, most: int
) -> NDArray[np.int64]:
    """Return the indices of at most ``most`` points to draw in a chart.

    If there are more points, they are divided into groups of neighbors, and the smallest and the
    largest value of each group are drawn, so that no spike disappears. The first and the last point
    are always drawn.

    Args:
        x: x coordinates in ascending order.
        y: y coordinates; may contain NaN.
        window: smallest and largest x to draw; None for all points. The next point on each side of
            the window is also drawn.
        most: maximum number of points, at least 4.

    >>> choose_points(np.arange(6.0), np.array([0, 9, 0, 0, -9, 0.0]), None, 4).tolist()
    [0, 1, 4, 5]
    """
    first, last = 0, len(x)
    if window is not None:
        # One more point on each side, so that the line reaches the edges of the chart.
        first = max(0, int(np.searchsorted(x, window[0])) - 1)
        last = min(len(x), int(np.searchsorted(x, window[1], side="right")) + 1)
    count = last - first
    if count <= most:
        return np.arange(first, last)
    size = -(-count // (most // 2 - 1))
    groups = -(-count // size)
    padded = np.full(groups * size, np.nan)
    padded[:count] = y[first:last]
    part = padded.reshape(groups, size)
    is_known = np.isfinite(part)
    starts = first + size * np.arange(groups)
    lowest = starts + np.where(is_known, part, np.inf).argmin(axis=1)
    highest = starts + np.where(is_known, part, -np.inf).argmax(axis=1)
    return np.unique(np.concatenate([[first, last - 1], lowest, highest]))


def smooth(y: Numbers, width: int) -> Numbers:
    """Return the trailing moving average over ``width`` values, ignoring non-finite values.

    >>> smooth(np.array([1.0, 3.0, np.nan, 5.0]), 2).tolist()
    [1.0, 2.0, 3.0, 5.0]
    """
    is_known = np.isfinite(y)
    totals = np.concatenate([[0.0], np.where(is_known, y, 0.0).cumsum()])
    counts = np.concatenate([[0], is_known.cumsum()])
    ends = np.arange(1, len(y) + 1)
    starts = np.maximum(0, ends - width)
    number = counts[ends] - counts[starts]
    with np.errstate(invalid="ignore", divide="ignore"):
        means: Numbers = (totals[ends] - totals[starts]) / number
    return means
