"""Synthetic loss curves of range tests with a known best learning rate."""

from typing import NamedTuple

import numpy as np

FAMILIES = ("explodes", "jumps back", "not finite", "rises slowly", "spikes")


class Curve(NamedTuple):
    """A synthetic sweep and its true values."""

    lrs: np.ndarray
    losses: np.ndarray
    lowest: float
    """Middle, in log(lr), of the range with losses within 5 % of the minimum, without noise."""
    steepest: float
    """Learning rate at which the loss falls fastest over log(lr)."""


def plant(family, noise, random, updates=200):
    """Return a curve whose loss falls as a sigmoid over log(lr) and then rises again.

    Args:
        family: how the loss rises; one of `FAMILIES`.
        noise: standard deviation of the noise as a fraction of the descent.
        random: NumPy random generator.
        updates: number of steps.
    """
    x = np.linspace(-7, 1, updates)
    steepest, width = random.uniform(-4.5, -1.5), random.uniform(0.08, 0.2)
    start = random.uniform(1, 8)
    fall = start * random.uniform(0.2, 0.8)
    loss = start - fall / (1 + np.exp(-(x - steepest) / width))
    end = steepest + random.uniform(0.6, 1.2)
    over = 10 ** (x - end)
    if family == "jumps back":
        loss = np.maximum(loss, np.where(x > end, start - fall * np.exp(-(x - end) / 0.1), loss))
    elif family == "rises slowly":
        loss = loss + fall * np.minimum(0.5 * over, 5)
    else:
        loss = loss + fall * np.minimum(over**2, 1e6)
    lowest = 10 ** x[loss < loss.min() + 0.05 * fall].mean()
    loss = loss + random.normal(0, noise * fall, updates)
    if family == "not finite":
        loss[x > end + 0.2] = np.nan
    if family == "spikes":
        loss[random.integers(0, updates, 4)] += random.uniform(1, 10, 4) * start
        loss[random.integers(0, 10)] = np.inf
    return Curve(10**x, loss, lowest, 10**steepest)


def flat(kind, random, updates=200):
    """Return a sweep in which the loss never falls."""
    x = np.linspace(-7, 1, updates)
    loss = 2.3 + random.normal(0, 0.2, updates)
    if kind == "rises":
        loss = loss + np.maximum(0, x + 1) ** 2
    if kind == "not finite":
        loss[x > -3] = np.nan
    return Curve(10**x, loss, float("nan"), float("nan"))
