"""Schedules that listen: what the next update uses depends on the losses so far."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

from schedules.core.curves import Curve, from_function
from schedules.core.durations import Horizon
from schedules.core.schedule import Base, Controller, Curves, Schedule

__all__ = ["Band", "Decision", "Evidence", "FeedbackController", "FeedbackSchedule"]

S = TypeVar("S")


class Decision(NamedTuple):
    """What a feedback schedule decided, once it did."""

    step: int
    """Updates that were applied before it took effect."""
    lr: float
    """What it decided on."""
    why: str
    probability: float | None = None
    """How sure it was; None where no probability was in it."""


class Band(NamedTuple):
    """What a Gaussian process thinks the loss is: its mean, and two deviations to either side."""

    places: Sequence[float]
    """Shares of the losses that it has seen, 0 to 1."""
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


class Evidence(NamedTuple):
    """What a decision rests on, to be looked at."""

    decision: Decision
    lrs: Sequence[float]
    """Learning rates of the updates before it, of the first group."""
    losses: Sequence[float]
    """Their losses."""
    band: Band | None
    """None if no test has been made."""


class FeedbackController(Controller[S]):
    """A rule that listens, with an explicit state that JSON carries as ``to_json`` has it."""

    @abstractmethod
    def decision(self, state: S) -> Decision | None:
        """Return the last decision; None before the first."""

    @abstractmethod
    def lowest(self, state: S) -> bool:
        """Return whether the update just counted ended a stretch of the lowest loss so far."""

    @abstractmethod
    def switched(self, state: S) -> bool:
        """Return whether the update just counted ended the warmup."""

    def evidence(self, before: S, loss: float, after: S) -> Evidence | None:
        """Return what the switch rests on that took place between two states.

        Args:
            before: the state that was told the loss.
            loss: what it was told.
            after: the state that `update` made of them.
        """
        del before, loss, after
        return None

    @abstractmethod
    def warning(self) -> str | None:
        """Return what is wrong with a run of this length, if anything is."""

    @abstractmethod
    def to_json(self, state: S) -> dict[str, Any]:
        """Return a state as JSON carries it."""

    @abstractmethod
    def from_json(self, state: dict[str, Any]) -> S:
        """Return the state that `to_json` made."""


class FeedbackSchedule(Schedule[S]):
    """A schedule whose values are known only as the run goes on.

    `controller` is the rule. `curves`, by which every schedule can be looked at beforehand, shows
    it on a synthetic loss.
    """

    listens_to: ClassVar[Literal["loss", "metric"]] = "loss"
    """What each update is to tell it: the loss, or a metric from time to time."""

    rolls_back: ClassVar[bool] = False

    @abstractmethod
    def controller(self, base: Base) -> FeedbackController[S]:
        """Return the rule at work from these base values; durations are resolved."""

    @abstractmethod
    def synthetic_loss(self, step: int, lr: float) -> float:
        """Return the loss of an update in the run that `curves` shows."""

    def control(self, base: Base, horizon: Horizon | None = None) -> FeedbackController[S]:
        """Return the rule at work, its durations taken from the run."""
        resolved: FeedbackSchedule[S] = self.resolve(horizon)
        return resolved.controller(base)

    def curves(self, base: Base) -> Curves:
        """Return what it would do on the synthetic loss."""
        shown = functools.cache(self._shown)
        groups = tuple(base["lr"])

        def curve(group: int) -> Curve:
            def value(step: float) -> float:
                rows = shown(groups)
                return rows[min(max(int(step), 0), len(rows) - 1)][group]

            return from_function(value)

        made = {lr: curve(group) for group, lr in reversed(list(enumerate(groups)))}
        return {"lr": tuple(made[lr] for lr in groups)}

    def _shown(self, groups: tuple[float, ...]) -> list[tuple[float, ...]]:
        rule = self.controller({"lr": groups})
        state = rule.init()
        rows = [rule.values(state)["lr"]]
        for step in range(self.span):
            state = rule.update(state, self.synthetic_loss(step, rows[-1][0]))
            rows.append(rule.values(state)["lr"])
        return rows
