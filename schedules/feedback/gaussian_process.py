"""A Gaussian process on [0, 1], approximated by a fixed number of features.

The loss at position x is modeled as y = f(x) + noise, where
f ~ GP(mean, scale * exp(-(x - x')^2 / (2 l^2))). With l = 0.2, about thirty features reproduce the
kernel on [0, 1] to twelve digits. The matrices therefore do not grow with the number of losses, and
computing the posterior given thousands of losses takes less than a millisecond.

Source: Rasmussen and Williams, Gaussian Processes for Machine Learning, chapters 2 and 5.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "LENGTH_SCALE",
    "Hyperparameters",
    "Posterior",
    "Statistics",
    "compute_statistics",
    "features",
    "solve_ratio",
]

Array = NDArray[np.float64]
Slopes = tuple[float, float, float]

LENGTH_SCALE = 0.2
_POINTS = np.linspace(-0.45, 1.45, 30)
_NEGLIGIBLE = 1e-13
_LEAST_NOISE = 1e-4
_RATIOS = np.logspace(-4, 5, 73)[:, None]


def features(x: Array) -> Array:
    """Return the features phi(x), an array of shape (len(x), number of features).

    The product phi(x) phi(x')^T approximates the kernel exp(-(x - x')^2 / (2 l^2)).

    Args:
        x: positions in [0, 1].

    >>> x = np.linspace(0, 1, 5)
    >>> kernel = np.exp(-((x[:, None] - x) ** 2) / (2 * LENGTH_SCALE**2))
    >>> float(np.abs(features(x) @ features(x).T - kernel).max()) < 1e-9
    True
    """
    return _kernel(x, _POINTS) @ _whitening()


def _kernel(x: Array, z: Array) -> Array:
    return np.asarray(np.exp(-((x[:, None] - z) ** 2) / (2 * LENGTH_SCALE**2)))


@functools.cache
def _whitening() -> Array:
    values, vectors = np.linalg.eigh(_kernel(_POINTS, _POINTS))
    kept = values > _NEGLIGIBLE * values[-1]
    return np.asarray(vectors[:, kept] / np.sqrt(values[kept]))


class Statistics(NamedTuple):
    """Sufficient statistics of losses y at positions with features phi."""

    size: float
    """Number of losses."""
    values: Array
    """Eigenvalues of phi^T phi."""
    vectors: Array
    projected: Array
    """phi^T y in the eigenbasis of phi^T phi."""
    ones: Array
    """phi^T 1 in the eigenbasis of phi^T phi, where 1 is a vector of ones."""
    total: float
    squares: float

    @classmethod
    def from_features(cls, phi: Array, y: Array, weights: Array | None = None) -> Statistics:
        """Compute the statistics of losses y at positions with features phi.

        Args:
            phi: features of each position, of shape (positions, features).
            y: loss (or mean of several losses) at each position, of shape (positions,).
            weights: number of losses averaged in each element of y, of shape (positions,). By
                default, all weights are 1.
        """
        root = np.ones(len(y)) if weights is None else np.sqrt(weights)
        scaled, ones, y = phi * root[:, None], root, y * root
        values, vectors = np.linalg.eigh(scaled.T @ scaled)
        return cls(
            float(ones @ ones),
            np.maximum(values, 0.0),
            vectors,
            y @ scaled @ vectors,
            ones @ scaled @ vectors,
            float(y @ ones),
            float(y @ y),
        )


def compute_statistics(x: Array, y: Array) -> Statistics:
    """Compute the statistics of losses y at positions x in [0, 1]."""
    return Statistics.from_features(features(x), y)


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """Hyperparameters of the Gaussian process, and the state of the Adam optimizer that fits them.

    Adam optimizes the unconstrained values ``raw``, with noise = 1e-4 + softplus(raw[0]),
    mean = raw[1] and scale = softplus(raw[2]). ``first`` and ``second`` are Adam's moments.
    """

    raw: tuple[float, float, float]
    first: tuple[float, float, float] = (0.0, 0.0, 0.0)
    second: tuple[float, float, float] = (0.0, 0.0, 0.0)
    steps: int = 0

    @classmethod
    def initial(cls, noise: float = 1e-3, scale: float = math.log(2)) -> Hyperparameters:
        """Return the initial hyperparameters of a Gaussian process with mean 0.

        ``noise`` is the variance of the noise, and ``scale`` is the prior variance.
        """
        return cls((_inverse_softplus(noise - _LEAST_NOISE), 0.0, _inverse_softplus(scale)))

    @property
    def noise(self) -> float:
        """Variance of the noise."""
        return _LEAST_NOISE + _softplus(self.raw[0])

    @property
    def mean(self) -> float:
        """Constant mean of the Gaussian process."""
        return self.raw[1]

    @property
    def scale(self) -> float:
        """Prior variance of the Gaussian process."""
        return _softplus(self.raw[2])

    def with_mean(self, mean: float) -> Hyperparameters:
        """Return a copy of the hyperparameters with the given mean."""
        return dataclasses.replace(self, raw=(self.raw[0], mean, self.raw[2]))

    def loss(self, data: Statistics) -> float:
        """Return the negative log marginal likelihood per data point."""
        noise, mean, scale = self.noise, self.mean, self.scale
        ratio = scale / noise
        rest = data.squares - 2 * mean * data.total + data.size * mean**2
        residual = data.projected - mean * data.ones
        quadratic = (rest - float((ratio * residual**2 / (1 + ratio * data.values)).sum())) / noise
        logarithm = float(np.log1p(ratio * data.values).sum()) + data.size * math.log(noise)
        return 0.5 * (quadratic + logarithm + data.size * math.log(2 * math.pi)) / data.size

    def gradient(self, data: Statistics) -> Slopes:
        """Return the gradient of `loss` with respect to the unconstrained values ``raw``."""
        return _Slopes(data, self.mean)(*self.raw)

    def fit(self, data: Statistics, steps: int = 100, rate: float = 0.01) -> Hyperparameters:
        """Minimize `loss` with ``steps`` steps of Adam, and return the new hyperparameters.

        ``rate`` is Adam's learning rate.
        """
        raw, first, second = list(self.raw), list(self.first), list(self.second)
        slopes = _Slopes(data, self.mean)
        for step in range(self.steps + 1, self.steps + steps + 1):
            corrected, rate_now = 1 / (1 - 0.999**step), rate / (1 - 0.9**step)
            for index, slope in enumerate(slopes(*raw)):
                first[index] += 0.1 * (slope - first[index])
                second[index] += 0.001 * (slope * slope - second[index])
                deviation = math.sqrt(second[index] * corrected) + 1e-8
                raw[index] -= rate_now * first[index] / deviation
        return Hyperparameters(
            (raw[0], raw[1], raw[2]),
            (first[0], first[1], first[2]),
            (second[0], second[1], second[2]),
            self.steps + steps,
        )


class _Slopes:
    """Callable that returns the gradient of `Hyperparameters.loss` for fixed data.

    The constructor precomputes a matrix, so that each gradient takes only one matrix product.

    Args:
        data: statistics of the losses.
        center: approximate mean of the Gaussian process. It is subtracted from the losses to reduce
            rounding errors.
    """

    def __init__(self, data: Statistics, center: float) -> None:
        self._size, self._values, self._center = data.size, data.values, center
        self._total = data.total - data.size * center
        self._squares = data.squares - 2 * center * data.total + data.size * center**2
        ones, y = data.ones, data.projected - center * data.ones
        squares = np.stack([y * y, y * ones, ones * ones])
        self._columns = np.vstack([data.values, squares, data.values * squares]).T.copy()
        self._weights = np.empty((2, data.values.size))

    def __call__(self, raw_noise: float, raw_mean: float, raw_scale: float) -> Slopes:
        noise, noise_slope = _softplus_and_slope(raw_noise)
        scale, scale_slope = _softplus_and_slope(raw_scale)
        noise += _LEAST_NOISE
        mean = raw_mean - self._center
        weight, squared = self._weights
        np.multiply(self._values, scale, weight)
        np.add(weight, noise, weight)
        np.reciprocal(weight, weight)
        np.multiply(weight, weight, squared)
        sums = self._weights.dot(self._columns).tolist()
        (trace, yy, yo, oo, *_), (_, yy2, yo2, oo2, vyy2, vyo2, voo2) = sums
        # y^T K^-1 y and its derivatives, with K^-1 = (1 - scale * phi W phi^T) / noise.
        rest = self._squares - 2 * mean * self._total + self._size * mean * mean
        cross = yy - 2 * mean * yo + mean * mean * oo
        square = yy2 - 2 * mean * yo2 + mean * mean * oo2
        inner = vyy2 - 2 * mean * vyo2 + mean * mean * voo2
        solved = (rest - 2 * scale * cross + scale * scale * inner) / (noise * noise)
        by_noise = (self._size - scale * trace) / noise - solved
        by_mean = -(self._total - self._size * mean - scale * (yo - mean * oo)) / noise
        half = 0.5 / self._size
        return (
            half * by_noise * noise_slope,
            by_mean / self._size,
            half * (trace - square) * scale_slope,
        )


class Posterior(NamedTuple):
    """The posterior of the Gaussian process at given positions."""

    mean: Array
    root: Array
    """Square root of the covariance: root @ root.T is the covariance."""

    @classmethod
    def from_statistics(cls, data: Statistics, by: Hyperparameters, basis: Array) -> Posterior:
        """Compute the posterior at the positions with features ``basis``, given the losses.

        Args:
            data: statistics of the losses.
            by: hyperparameters of the Gaussian process.
            basis: features of the positions, of shape (positions, features).
        """
        ratio = by.scale / by.noise
        shrunk = 1 / (1 + ratio * data.values)
        rotated = basis @ data.vectors
        weights = ratio * shrunk * (data.projected - by.mean * data.ones)
        return cls(by.mean + rotated @ weights, rotated * np.sqrt(by.scale * shrunk))

    @property
    def variance(self) -> Array:
        """Posterior variance at each position."""
        return np.asarray((self.root**2).sum(1))

    def compute_difference_variance(self, index: int) -> Array:
        """Return the posterior variance of f(x) - f(p) for each position x.

        f is the Gaussian process, and p is the position at ``index``.
        """
        return np.asarray(((self.root - self.root[index]) ** 2).sum(1))


def solve_ratio(data: Statistics, within: float = 0.0) -> Hyperparameters:
    """Return the maximum-likelihood hyperparameters of a Gaussian process with mean 0.

    The function tries 73 ratios rho = scale / noise from 1e-4 to 1e5. For each ratio, the noise
    with the highest likelihood has a closed form::

        noise(rho) = (y^T y + within - sum(rho b^2 / (1 + rho lambda))) / n

    Args:
        data: statistics of n losses y, with the eigenvalues lambda (``values``) and the projected
            losses b (``projected``).
        within: sum of (loss - mean of its bin)^2 over all losses if each y is the mean of a bin of
            losses; 0 if the losses are not binned.
    """
    shrunk = _RATIOS / (1 + _RATIOS * data.values)
    noise = (data.squares + within - shrunk @ data.projected**2) / data.size
    noise = np.maximum(noise, 1e-12)
    loss = np.log1p(_RATIOS * data.values).sum(1) + data.size * np.log(noise)
    best = int(np.argmin(loss))
    variance = float(noise[best])
    scale = variance * float(_RATIOS[best, 0])
    return Hyperparameters.initial(max(variance, _LEAST_NOISE * 1.0001), scale)


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _softplus_and_slope(x: float) -> tuple[float, float]:
    small = math.exp(-abs(x))
    return max(x, 0.0) + math.log1p(small), (1.0 if x >= 0 else small) / (1 + small)


def _inverse_softplus(y: float) -> float:
    return y + math.log(-math.expm1(-y))
