"""Track the best value of a metric, to save the best checkpoint and to stop early."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["BestMetric"]


@dataclass
class BestMetric:
    """Tracker of the best value of a metric.

    NaN is never the best value.

    >>> best = BestMetric("accuracy", mode="max", patience=2)
    >>> [best.update(value, step) for step, value in enumerate([0.5, 0.7, 0.6, 0.7])]
    [True, True, False, False]
    >>> best.value, best.step, best.is_exhausted
    (0.7, 1, True)
    """

    name: str
    mode: Literal["min", "max"] = "min"
    patience: int | None = None
    """Number of consecutive reported values without an improvement after which the run ends.

    None sets no limit.
    """
    value: float | None = None
    """Best value so far; None until a value other than NaN is reported."""
    step: int = 0
    """Number of completed steps when the best value was reported."""
    misses: int = 0
    """Number of consecutive reported values without an improvement."""
    last_step: int = -1
    """Number of completed steps at the most recent report; -1 before the first report."""
    is_unsaved: bool = False
    """Whether the best value is newer than the best checkpoint."""

    def update(self, value: float, step: int) -> bool:
        """Record a value, and return whether it is better than all earlier values.

        Values from the same step, for example from `Engine.step` and `Engine.report`, count as one
        reported value.
        """
        is_new_report = step != self.last_step
        self.last_step = step
        if math.isnan(value) or (self.value is not None and not self._is_better(value, self.value)):
            self.misses += is_new_report
            return False
        self.value, self.step, self.misses, self.is_unsaved = value, step, 0, True
        return True

    def _is_better(self, value: float, other: float) -> bool:
        return value < other if self.mode == "min" else value > other

    @property
    def is_exhausted(self) -> bool:
        """Whether the metric has not improved in the last `patience` reported values."""
        return self.patience is not None and self.misses >= self.patience

    def describe(self) -> dict[str, Any] | None:
        """Return the metric's name, its best value and the step of this value.

        Return None before the first value other than NaN is reported.
        """
        if self.value is None:
            return None
        return {"metric": self.name, "value": float(self.value), "step": self.step}

    def state_dict(self) -> dict[str, Any]:
        """Return the state to save in a checkpoint."""
        return {
            "name": self.name,
            "mode": self.mode,
            "value": self.value,
            "step": self.step,
            "misses": self.misses,
            "last_step": self.last_step,
        }

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Load a saved state. A state that was saved for a different metric or mode is ignored."""
        if state is not None and (state["name"], state["mode"]) == (self.name, self.mode):
            for key in ("value", "step", "misses", "last_step"):
                setattr(self, key, state[key])
            self.is_unsaved = False
