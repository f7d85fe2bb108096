"""Compute a schedule's hyperparameters for each param group at each step."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar

from schedules.core.curves import Curve

__all__ = [
    "DEFAULT_BASE",
    "Band",
    "Base",
    "Controller",
    "Curves",
    "Decision",
    "Evidence",
    "OpenLoop",
    "Values",
]

S = TypeVar("S")

Base = Mapping[str, tuple[float, ...]]
"""Initial hyperparameters of an optimizer. Maps the name of a hyperparameter ("lr", "momentum" or
"weight_decay") to its value in each param group."""

DEFAULT_BASE: Base = {"lr": (0.1,), "momentum": (0.9,), "weight_decay": (0.0,)}
"""Initial hyperparameters of a single param group, used if there is no optimizer."""

Values = Mapping[str, tuple[float, ...]]
"""Maps the name of a hyperparameter to its value in each param group."""

Curves = Mapping[str, tuple[Curve, ...]]
"""Maps the name of a hyperparameter to its curve in each param group; groups may share a curve."""


class Decision(NamedTuple):
    """A learning-rate change made by a feedback schedule, with the reason for it."""

    step: int
    """Number of optimizer steps before the change."""
    lr: float
    """New learning rate of the first param group."""
    reason: str
    probability: float | None = None
    """Probability that the loss has passed its minimum; None if it was not estimated."""


class Band(NamedTuple):
    """Mean and confidence band of a Gaussian process fitted to the losses.

    ``low`` and ``high`` are two standard deviations below and above the mean. If AutoWU's ``test``
    is "robust", the process is fitted to losses compressed with asinh. The mean and the band are
    then converted back to losses, so the band is not symmetric around the mean.
    """

    positions: Sequence[float]
    """Positions at which the Gaussian process is evaluated, from 0 (the first loss) to 1 (just
    after the final loss)."""
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


class Evidence(NamedTuple):
    """The losses and learning rates that led to a `Decision`, for plotting."""

    decision: Decision
    lrs: Sequence[float]
    """Learning rate of the first param group at each step before the decision."""
    losses: Sequence[float]
    """Loss of each step before the decision."""
    band: Band | None
    """Band of the Gaussian process fitted to the losses; None if no process was fitted."""


class Controller(Protocol[S]):
    """Interface for objects that compute a schedule's values at each step.

    A controller is built for the initial hyperparameters of one optimizer. It is stateless: the
    caller stores the state that `init` and `update` return, and passes it to the methods. No method
    modifies a state in place.
    """

    @abstractmethod
    def init(self) -> S:
        """Return the initial state, before the first step."""

    @abstractmethod
    def update(self, state: S, loss: float | None) -> S:
        """Return the state after one more optimizer step.

        Args:
            state: state before the step.
            loss: loss of the step, or the metric for a schedule that depends on a metric; None if
                the value is not available.
        """

    @abstractmethod
    def values(self, state: S) -> Values:
        """Return the scheduled hyperparameters of each param group for the next step."""

    @abstractmethod
    def decision(self, state: S) -> Decision | None:
        """Return the latest decision; None before the first decision."""

    @abstractmethod
    def evidence(self, before: S, loss: float, after: S) -> Evidence | None:
        """Return the losses and learning rates that led to a decision; None if they are unknown.

        Args:
            before: state before the step in which the decision was made.
            loss: loss of that step.
            after: state after that step.
        """


@dataclasses.dataclass(frozen=True)
class OpenLoop(Controller[int]):
    """Controller for schedules that depend only on the step.

    The state is the number of optimizer steps so far.

    >>> import schedules
    >>> warmup = schedules.WarmupLR(warmup_num_steps=2, warmup_type="linear")
    >>> controller = warmup.bind({"lr": (0.1,)})
    >>> state = controller.init()
    >>> for _ in range(3):
    ...     print(controller.values(state)["lr"])
    ...     state = controller.update(state, None)
    (0.0,)
    (0.05,)
    (0.1,)
    """

    curves: Curves

    def init(self) -> int:
        """Return the initial step count, 0."""
        return 0

    def update(self, state: int, loss: float | None = None) -> int:
        """Return the step count plus 1. The loss is ignored."""
        del loss
        return state + 1

    def values(self, state: int) -> Values:
        """Return the scheduled hyperparameters of each param group for the next step."""
        return {name: tuple(curve(state) for curve in group) for name, group in self.curves.items()}

    def decision(self, state: int) -> None:
        """Return None. A schedule without feedback makes no decisions."""
        del state

    def evidence(self, before: int, loss: float, after: int) -> None:
        """Return None. A schedule without feedback makes no decisions, so there is no evidence."""
        del before, loss, after
