"""Base classes of schedules that depend on the loss or on a metric."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar

from schedules.core.controller import Base, Controller, Curves, Evidence, Values
from schedules.core.curves import Curve, from_function
from schedules.core.durations import Horizon
from schedules.core.schedule import Schedule

__all__ = ["FeedbackController", "FeedbackSchedule"]

S = TypeVar("S")


class FeedbackController(Controller[S]):
    """Base class of the controllers of feedback schedules; see `Controller` for the interface."""

    @abstractmethod
    def to_json(self, state: S) -> dict[str, Any]:
        """Convert a state to a JSON-serializable dict."""

    @abstractmethod
    def from_json(self, state: Mapping[str, Any]) -> S:
        """Restore a state from a dict returned by `to_json`.

        Raises:
            ValueError: a value is missing or invalid.
        """

    def continue_from(self, state: S, values: Values) -> S:
        """Return a state that continues from ``values``, the optimizer's current hyperparameters.

        The ``values`` differ from those of ``state`` if other code has changed them. By default,
        return ``state`` unchanged. Override this method in a controller that computes new values
        from the current values.
        """
        del values
        return state

    def evidence(self, before: S, loss: float, after: S) -> Evidence | None:
        """Return None, because a controller does not record losses by default.

        Override this method in a controller that records losses; see `Controller.evidence`.
        """
        del before, loss, after
        return None


class FeedbackSchedule(Schedule[S]):
    """Base class of schedules that depend on the loss or on a metric.

    The values that such a schedule sets are not known before the run. For previews, `curves` runs
    the controller on a synthetic loss.
    """

    feedback: ClassVar[Literal["loss", "metric"] | None] = "loss"

    @abstractmethod
    def controller(self, base: Base) -> FeedbackController[S]:
        """Return the controller for an optimizer with the initial hyperparameters ``base``.

        Call this method only on a schedule returned by `resolve`.
        """

    @abstractmethod
    def synthetic_loss(self, step: int, lr: float) -> float:
        """Return the synthetic loss at ``step`` with the learning rate ``lr``, for previews."""

    def bind(self, base: Base, horizon: Horizon | None = None) -> FeedbackController[S]:
        """Resolve the schedule for ``horizon``, and return the resolved schedule's controller."""
        resolved: FeedbackSchedule[S] = self.resolve(horizon)
        return resolved.controller(base)

    def curves(self, base: Base) -> Curves:
        """Return the learning rate curve of each param group, simulated with `synthetic_loss`."""
        run_once = functools.cache(self._run_on_synthetic_loss)
        groups = tuple(base["lr"])

        def curve(group: int) -> Curve:
            def value(step: float) -> float:
                rows = run_once(groups)
                return rows[min(max(int(step), 0), len(rows) - 1)][group]

            return from_function(value)

        curve_by_lr = {lr: curve(group) for group, lr in reversed(list(enumerate(groups)))}
        return {"lr": tuple(curve_by_lr[lr] for lr in groups)}

    def _run_on_synthetic_loss(self, groups: tuple[float, ...]) -> list[tuple[float, ...]]:
        controller = self.controller({"lr": groups})
        state = controller.init()
        rows = [controller.values(state)["lr"]]
        for step in range(self.span):
            state = controller.update(state, self.synthetic_loss(step, rows[-1][0]))
            rows.append(controller.values(state)["lr"])
        return rows
