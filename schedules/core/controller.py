"""`Controller` computes the values of a schedule for an optimizer's param groups, step by step."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from schedules.core.curves import Curve

__all__ = [
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
"""Values that the optimizer was built with. Maps the name of a hyperparameter ("lr", "momentum" or
"weight_decay") to its value in each param group."""

Values = Mapping[str, tuple[float, ...]]
"""Maps the name of a hyperparameter to its value in each param group."""

Curves = Mapping[str, tuple[Curve, ...]]
"""Maps the name of a hyperparameter to its curve in each param group; groups may share a curve."""


class Decision(NamedTuple):
    """A change of the learning rate that a feedback schedule decided on."""

    step: int
    """Number of optimizer steps that were applied before the change took effect."""
    lr: float
    """New learning rate of the first param group."""
    reason: str
    probability: float | None = None
    """Confidence of the test that led to the decision; None if no test led to it."""


class Band(NamedTuple):
    """Curves of a Gaussian process that was fitted to the losses: its mean and its confidence band.

    ``low`` and ``high`` are two standard deviations below and above the mean.
    """

    positions: Sequence[float]
    """Positions of the points in the sequence of losses so far: 0 is its start, 1 is its end."""
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


class Evidence(NamedTuple):
    """The data that a decision is based on; it is shown in a plot."""

    decision: Decision
    lrs: Sequence[float]
    """Learning rate of the first param group in each step before the decision."""
    losses: Sequence[float]
    """Loss of each step before the decision."""
    band: Band | None
    """Gaussian process that was fitted to the losses; None if no test was run."""


class Controller(Protocol[S]):
    """Computes the values of a schedule for an optimizer with given base values.

    A controller is stateless: the caller keeps the state and passes it to each method. No method
    changes a state in place.
    """

    @abstractmethod
    def init(self) -> S:
        """Return the state before the first step."""

    @abstractmethod
    def update(self, state: S, loss: float | None) -> S:
        """Return the state after one more applied step, whose loss (or metric) was ``loss``."""

    @abstractmethod
    def values(self, state: S) -> Values:
        """Return the values of the hyperparameters for the next step."""

    @abstractmethod
    def decision(self, state: S) -> Decision | None:
        """Return the last decision, or None if no decision was made yet."""

    @abstractmethod
    def evidence(self, before: S, loss: float, after: S) -> Evidence | None:
        """Return the data that the decision of a step is based on.

        Args:
            before: state before the step.
            loss: loss of the step.
            after: state that ``update(before, loss)`` returned.
        """

    @abstractmethod
    def to_json(self, state: S) -> dict[str, Any]:
        """Convert a state to a dict of JSON values."""

    @abstractmethod
    def from_json(self, state: Mapping[str, Any]) -> S:
        """Restore a state from the value that `to_json` returned."""


@dataclasses.dataclass(frozen=True)
class OpenLoop(Controller[int]):
    """Controller of the schedules whose values depend only on the step, not on the loss.

    Its state is the number of applied steps.

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
        """Return 0, because no step was applied yet."""
        return 0

    def update(self, state: int, loss: float | None = None) -> int:
        """Return the number of applied steps plus 1; the loss is ignored."""
        del loss
        return state + 1

    def values(self, state: int) -> Values:
        """Return the value of each curve at the next step."""
        return {name: tuple(curve(state) for curve in group) for name, group in self.curves.items()}

    def decision(self, state: int) -> None:
        """Return None: only feedback schedules make decisions."""
        del state

    def evidence(self, before: int, loss: float, after: int) -> None:
        """Return None: only feedback schedules make decisions."""
        del before, loss, after

    def to_json(self, state: int) -> dict[str, Any]:
        """Return a dict with the number of applied steps under the key "step"."""
        return {"step": state}

    def from_json(self, state: Mapping[str, Any]) -> int:
        """Return the number of applied steps, which `to_json` saved under the key "step"."""
        return int(state["step"])
