"""The state of AutoWU during a run, and the parameters of its warmup."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from schedules.core.controller import Decision
from schedules.core.saved_state import Count, restore
from schedules.feedback.gaussian_process import Hyperparameters
from schedules.feedback.history import History
from schedules.feedback.plateau import PlateauState

__all__ = ["AutoWUState", "Warmup"]


@dataclasses.dataclass(frozen=True)
class AutoWUState:
    """The state of AutoWU during a run. It is saved in checkpoints."""

    step: Count = 0
    phase: Literal["warmup", "constant", "cooldown"] = "warmup"
    losses: History = dataclasses.field(default_factory=History)
    """Losses of all warmup steps so far, in order."""
    fit: Hyperparameters | None = None
    draws: str | None = None
    """State of the random number generator that samples losses. None before the first sample."""
    votes: tuple[bool, ...] = ()
    alone: Count = 0
    """Number of consecutive robust tests in which `RobustResult.now` exceeded `CONFIDENCE`. Unlike
    `votes`, this count ignores `RobustResult.start`."""
    chance: float = 0.0
    """Probability that the loss has passed its minimum, from the latest statistical test."""
    argmin: float = 1.0
    lowest: float = math.inf
    """Lowest mean loss so far. Each mean is taken over the steps between two statistical tests."""
    is_lowest: bool = False
    peak: float = 0.0
    begin: int = 0
    length: Count = 0
    decay: PlateauState | None = None
    epoch: History = dataclasses.field(default_factory=History)
    """Losses of the current epoch so far, used in the constant phase to detect a plateau."""
    decision: Decision | None = None

    def to_json(self) -> dict[str, Any]:
        """Convert the state to a JSON-serializable dict."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values |= {"losses": list(self.losses), "epoch": list(self.epoch)}
        values["fit"] = self.fit and dataclasses.asdict(self.fit)
        values["decay"] = self.decay and self.decay._asdict()
        values["decision"] = self.decision and list(self.decision)
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> AutoWUState:
        """Restore a state from a dict returned by `to_json`.

        Raises:
            ValueError: a value is missing or has the wrong type, or a key is unknown.
        """
        restored: AutoWUState = restore(cls, state, "state")
        return restored


@dataclasses.dataclass(frozen=True)
class Warmup:
    """Parameters of AutoWU's warmup.

    ``steps`` is the maximum length of the warmup. AutoWU ends the warmup earlier if its statistical
    test succeeds.
    """

    steps: int
    steps_per_epoch: int
    epochs: int
    """Number of whole epochs in the warmup, at least 1."""
    min_lr: float
    max_lr: float
    unit: Literal["step", "epoch"]
    type: Literal["exp", "linear"]

    def lr(self, step: int) -> float:
        """Return the learning rate of the first param group at the given step of the warmup."""
        if self.steps == 0:
            return self.max_lr
        fraction = step / self.steps
        if self.unit == "epoch":
            fraction = step // self.steps_per_epoch / self.epochs
        return self.lr_between(self.max_lr, fraction)

    def lr_between(self, lr: float, fraction: float) -> float:
        """Return the learning rate after ``fraction`` (0 to 1) of a warmup that ends at ``lr``."""
        if self.type == "linear":
            return self.min_lr + (lr - self.min_lr) * fraction
        return float(self.min_lr * (lr / self.min_lr) ** fraction)
