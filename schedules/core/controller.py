"""`Controller`: a schedule bound to an optimizer's base values, and the decisions it makes."""

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
"""Values that the optimizer was built with: name ("lr", "momentum", "weight_decay") to the value of
each param group."""

Values = Mapping[str, tuple[float, ...]]
"""Name of a hyperparameter to its value in each param group."""

Curves = Mapping[str, tuple[Curve, ...]]
"""Name of a hyperparameter to its curve in each param group; groups may share one curve."""


class Decision(NamedTuple):
    """A change of the learning rate that a feedback schedule decided on."""

    step: int
    """Number of steps applied before the change took effect."""
    lr: float
    """New learning rate of the first param group."""
    why: str
    probability: float | None = None
    """Confidence of the test that led to the decision; None if there was no test."""


class Band(NamedTuple):
    """Gaussian process fitted to the losses: its mean, and two standard deviations on each side."""

    places: Sequence[float]
    """Positions in the sequence of losses so far, as fractions from 0 to 1."""
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


class Evidence(NamedTuple):
    """The data that a decision is based on, for a plot."""

    decision: Decision
    lrs: Sequence[float]
    """Learning rates of the first group in the steps before the decision."""
    losses: Sequence[float]
    """Losses of these steps."""
    band: Band | None
    """Fit to the losses; None if no test was run."""


class Controller(Protocol[S]):
    """A schedule bound to base values, as functions of an explicit state.

    The state holds plain numbers. No method changes a state in place.
    """

    @abstractmethod
    def init(self) -> S:
        """Return the state before the first step."""

    @abstractmethod
    def update(self, state: S, loss: float | None) -> S:
        """Return the state after an applied step with this loss (or metric)."""

    @abstractmethod
    def values(self, state: S) -> Values:
        """Return the values that the next step uses."""

    @abstractmethod
    def decision(self, state: S) -> Decision | None:
        """Return the last decision; None before the first."""

    @abstractmethod
    def evidence(self, before: S, loss: float, after: S) -> Evidence | None:
        """Return the data that the decision made in ``after = update(before, loss)`` is based on.

        Args:
            before: state before the step.
            loss: loss of the step.
            after: state that `update` returned.
        """

    @abstractmethod
    def to_json(self, state: S) -> dict[str, Any]:
        """Return a state as JSON values."""

    @abstractmethod
    def from_json(self, state: Mapping[str, Any]) -> S:
        """Restore a state from the value that `to_json` returned."""


@dataclasses.dataclass(frozen=True)
class OpenLoop(Controller[int]):
    """The controller of every schedule without feedback. Its state is the number of applied steps.

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
        """Return 0, the number of applied steps."""
        return 0

    def update(self, state: int, loss: float | None = None) -> int:
        """Return the number of steps plus 1. The loss is ignored."""
        del loss
        return state + 1

    def values(self, state: int) -> Values:
        """Return the value of each curve at this step."""
        return {name: tuple(curve(state) for curve in group) for name, group in self.curves.items()}

    def decision(self, state: int) -> None:
        """Return None: only feedback schedules make decisions."""
        del state

    def evidence(self, before: int, loss: float, after: int) -> None:
        """Return None: only feedback schedules make decisions."""
        del before, loss, after

    def to_json(self, state: int) -> dict[str, Any]:
        """Return the number of applied steps under the key "step"."""
        return {"step": state}

    def from_json(self, state: Mapping[str, Any]) -> int:
        """Return the number of applied steps."""
        return int(state["step"])
