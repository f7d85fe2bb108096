"""`Controller`: a schedule bound to an optimizer's base values, and what it can decide."""

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
"""Hyperparameter ("lr", "momentum", "weight_decay") to the value each group was built with."""

Values = Mapping[str, tuple[float, ...]]
"""Hyperparameter to the value of each group."""

Curves = Mapping[str, tuple[Curve, ...]]
"""Hyperparameter to the curve of each group; groups may share one curve."""


class Decision(NamedTuple):
    """A change of the learning rate that a feedback schedule decided on."""

    step: int
    """Applied steps before it took effect."""
    lr: float
    """Learning rate of the first group that it decided on."""
    why: str
    probability: float | None = None
    """Confidence of the test behind it; None if there was no test."""


class Band(NamedTuple):
    """Mean of a Gaussian process fitted to the losses, with two standard deviations around it."""

    places: Sequence[float]
    """Fractions of the losses seen so far, 0 to 1."""
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


class Evidence(NamedTuple):
    """The data behind a decision, for a plot."""

    decision: Decision
    lrs: Sequence[float]
    """Learning rates of the first group in the steps before it."""
    losses: Sequence[float]
    """Losses of these steps."""
    band: Band | None
    """None if no test has been made."""


class Controller(Protocol[S]):
    """A schedule bound to base values: a rule over an explicit state.

    The state holds plain numbers, and no method changes it in place.
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
        """Return the data behind the decision that ``update(before, loss) -> after`` brought.

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
        """Return the state that `to_json` was given."""


@dataclasses.dataclass(frozen=True)
class OpenLoop(Controller[int]):
    """The controller of every schedule without feedback; its state is the count of applied steps.

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
        """Return 0: no step was applied yet."""
        return 0

    def update(self, state: int, loss: float | None = None) -> int:
        """Return the count plus 1; the loss has no effect."""
        del loss
        return state + 1

    def values(self, state: int) -> Values:
        """Return each curve's value at this step."""
        return {name: tuple(curve(state) for curve in group) for name, group in self.curves.items()}

    def decision(self, state: int) -> None:
        """Return None: nothing is ever decided."""
        del state

    def evidence(self, before: int, loss: float, after: int) -> None:
        """Return None: nothing is ever decided."""
        del before, loss, after

    def to_json(self, state: int) -> dict[str, Any]:
        """Return the count under the key "step"."""
        return {"step": state}

    def from_json(self, state: Mapping[str, Any]) -> int:
        """Return the count."""
        return int(state["step"])
