"""Statistical tests that check whether the loss has passed its minimum.

There are two tests: one from AutoWU's published code, and a robust test that does not depend on the
scale of the loss. Both tests scale time to [0, 1], fit a Gaussian process to the losses of the
warmup, and estimate the probability that an earlier loss was lower than the current loss.

Source: Kim et al., Automated learning rate scheduler for large-batch training,
https://arxiv.org/abs/2107.05855, and its code, github.com/kakaobrain/autowu.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from schedules.core.controller import Band
from schedules.feedback.gaussian_process import (
    Hyperparameters,
    Posterior,
    Statistics,
    compute_statistics,
    features,
    solve_ratio,
)

__all__ = [
    "PublishedResult",
    "RobustResult",
    "Sampler",
    "compute_published_band",
    "compute_robust_band",
    "run_published_test",
    "run_robust_test",
]

Array = NDArray[np.float64]

Sampler = Callable[[int, int], NDArray[np.int64]]
"""Function that selects losses at random. Its arguments are the total number of losses and the
number to select. It returns the indices of the selected losses."""

CONFIDENCE = 0.95
REDRAWS = 5
_FIT_POINTS, _POINTS = 100, 500
_FLOOR = 1e-4  # This is a variance, in squared units of the loss.
_GRID, _ROBUST_GRID = 500, 257
_BINS = 256
_ROBUST_FLOOR = 0.005**2
_CONSTANT = 2.0


class PublishedResult(NamedTuple):
    """The result of `run_published_test`."""

    probabilities: tuple[float, ...]
    """Probability that the loss has passed its minimum, for each of five samples of the losses."""
    argmins: tuple[float, ...]
    """Estimated position of the loss minimum, from 0 (start of the losses) to 1 (end), for each of
    the five samples."""
    fit: Hyperparameters

    @property
    def is_positive(self) -> bool:
        """Whether most samples indicate that the loss has passed its minimum.

        A sample indicates this if its value in `probabilities` exceeds `CONFIDENCE`.
        """
        votes = sum(probability > CONFIDENCE for probability in self.probabilities)
        return votes > REDRAWS / 2

    @property
    def probability(self) -> float:
        """Median, over the samples, of the probability that the loss has passed its minimum."""
        return sorted(self.probabilities)[REDRAWS // 2]


def run_published_test(losses: Array, fit: Hyperparameters, sample: Sampler) -> PublishedResult:
    """Use AutoWU's published test to decide whether the loss has passed its minimum.

    The test sets the mean of the Gaussian process to the mean of the losses. It then fits the
    hyperparameters to at most 100 losses with 100 steps of Adam, starting from the previous fit.
    Finally, it computes five posteriors, each from at most 500 losses. Losses that are not finite
    are ignored, but the positions of the other losses do not change.

    Args:
        losses: loss of each step of the warmup so far, in order.
        fit: hyperparameters returned by the previous call. For the first call, pass
            `Hyperparameters.initial()`.
        sample: function that selects losses at random; see `Sampler`. It is called only if there
            are more than 100 finite losses.
    """
    positions = np.arange(len(losses), dtype=np.float32) / np.float32(len(losses))
    finite = np.isfinite(losses)
    x, y = positions[finite].astype(np.float64), losses[finite].astype(np.float64)
    if y.size < 2:
        return PublishedResult((0.0,) * REDRAWS, (1.0,) * REDRAWS, fit)
    chosen = sample(y.size, _FIT_POINTS) if y.size > _FIT_POINTS else slice(None)
    fit = fit.with_mean(float(y.mean())).fit(compute_statistics(x[chosen], y[chosen]))
    found = []
    for _ in range(REDRAWS if y.size > _POINTS else 1):
        chosen = sample(y.size, _POINTS) if y.size > _POINTS else slice(None)
        posterior = Posterior.from_statistics(
            compute_statistics(x[chosen], y[chosen]), fit, _basis(_GRID)
        )
        found.append((_certainty(posterior, -1, _FLOOR), _argmin(posterior)))
    probabilities, argmins = zip(*found * (REDRAWS // len(found)), strict=True)
    return PublishedResult(probabilities, argmins, fit)


def compute_published_band(losses: Array, fit: Hyperparameters) -> Band:
    """Return the mean and confidence band of the Gaussian process fitted by `run_published_test`.

    The posterior is computed from all finite losses.

    Args:
        losses: loss of each step of the warmup so far, in order. At least one must be finite.
        fit: hyperparameters returned by `run_published_test`.
    """
    finite = np.isfinite(losses)
    x = np.arange(losses.size)[finite] / losses.size
    return _band(
        Posterior.from_statistics(compute_statistics(x, losses[finite]), fit, _basis(_GRID))
    )


class RobustResult(NamedTuple):
    """The result of `run_robust_test`."""

    now: float
    """Probability that the current loss is above the minimum."""
    start: float
    """Probability that the initial loss is above the minimum."""
    argmin: float
    """Estimated position of the loss minimum, from 0 (start of the losses) to 1 (end)."""

    @property
    def is_positive(self) -> bool:
        """Whether the test indicates that the loss has passed its minimum.

        The probabilities `now` and `start` must both exceed `CONFIDENCE`.
        """
        return min(self.now, self.start) > CONFIDENCE


def run_robust_test(losses: Array) -> RobustResult:
    """Use this library's robust test to decide whether the loss has passed its minimum.

    The test tolerates noise and loss spikes, and does not depend on the scale of the loss. It clips
    losses that differ from the lowest loss by more than twice the decrease in the loss so far.
    Losses that are not finite are replaced with the upper clipping limit. The losses are then
    compressed with asinh and averaged in at most 256 bins. Unlike `run_published_test`, this
    function draws no random samples, and it fits the Gaussian process without Adam.

    Args:
        losses: loss of each step of the warmup so far, in order. There must be at least 8.
    """
    posterior = _robust_posterior(_Compression.from_losses(losses)(losses))
    return RobustResult(
        _certainty(posterior, -1, _ROBUST_FLOOR),
        _certainty(posterior, 0, _ROBUST_FLOOR),
        _argmin(posterior),
    )


def compute_robust_band(losses: Array) -> Band:
    """Return the mean and confidence band of the Gaussian process fitted by `run_robust_test`."""
    compression = _Compression.from_losses(losses)
    return _band(_robust_posterior(compression(losses)), compression.invert)


def _robust_posterior(y: Array) -> Posterior:
    count = y.size
    starts = -(-np.arange(min(count, _BINS) + 1) * count // min(count, _BINS))
    weights = np.diff(starts).astype(float)
    x = (starts[:-1] + starts[1:]) / (2 * count)
    center = float(y.mean())
    y = y - center
    means = np.add.reduceat(y, starts[:-1]) / weights
    within = float(y @ y - weights @ means**2)
    constant = np.full((x.size, 1), _CONSTANT)
    data = Statistics.from_features(np.hstack([features(x), constant]), means, weights)
    grid = np.hstack([_basis(_ROBUST_GRID), np.full((_ROBUST_GRID, 1), _CONSTANT)])
    posterior = Posterior.from_statistics(data, solve_ratio(data, within), grid)
    return posterior._replace(mean=posterior.mean + center)


class _Compression(NamedTuple):
    """Transform that clips losses to a range around the lowest loss, and then applies asinh."""

    low: float
    high: float
    origin: float
    unit: float

    @classmethod
    def from_losses(cls, losses: Array) -> _Compression:
        y = np.asarray(losses, float)
        finite = np.isfinite(y)
        if not finite.any():
            return cls(0.0, 0.0, 0.0, 1.0)
        first = y[: max(4, y.size // 20)]
        start = (
            float(np.median(first[np.isfinite(first)])) if np.isfinite(first).any() else math.inf
        )
        high = np.where(finite, y, np.inf)
        blocks = min(20, max(1, y.size // 3))
        length = y.size // blocks
        low = float(np.median(high[-blocks * length :].reshape(blocks, length), axis=1).min())
        if not math.isfinite(low):
            low = float(y[finite].min())
        spread = start - low
        if not 0 < spread < math.inf:
            below, above = np.quantile(y[finite], (0.1, 0.9))
            spread = float(above - below) or 1.0
        clips = cls(low - 2 * spread, low + 2 * spread, 0.0, 0.1 * spread)
        return clips._replace(origin=float(np.quantile(clips._clip(y), 0.05)))

    def __call__(self, losses: Array) -> Array:
        scaled = (self._clip(losses) - self.origin) / self.unit
        return np.asarray(np.arcsinh(scaled) / math.asinh(10))

    def _clip(self, losses: Array) -> Array:
        y = np.asarray(losses, float)
        return np.clip(np.where(np.isfinite(y), y, np.inf), self.low, self.high)

    def invert(self, compressed: Array) -> Array:
        scaled = np.sinh(compressed * math.asinh(10))
        return np.asarray(scaled * self.unit + self.origin)


@functools.cache
def _basis(points: int) -> Array:
    return features(np.linspace(0, 1, points))


def _certainty(posterior: Posterior, index: int, floor: float) -> float:
    """Return the maximum of P(f(p) > f(x)) over all positions x other than p.

    f is the Gaussian process, and p is the position at ``index``. ``floor`` is added to the
    variance of f(p) - f(x), so that a tiny difference does not give a high probability.
    """
    rise = posterior.mean[index] - posterior.mean
    ratio = rise / np.sqrt(posterior.compute_difference_variance(index) + floor)
    others = np.delete(ratio, index)
    return 0.5 * math.erfc(-float(others.max()) / math.sqrt(2))


def _argmin(posterior: Posterior) -> float:
    return int(np.argmin(posterior.mean)) / (posterior.mean.size - 1)


def _band(posterior: Posterior, unit: Callable[[Array], Array] = np.asarray) -> Band:
    margin = 2 * np.sqrt(posterior.variance)
    mean, low, high = (unit(posterior.mean + sign * margin).tolist() for sign in (0, -1, 1))
    return Band(np.linspace(0, 1, posterior.mean.size).tolist(), mean, low, high)
