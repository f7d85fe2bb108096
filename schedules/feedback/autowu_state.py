"""The state of an AutoWU run, and its warmup as a function of the step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from schedules.core.controller import Decision
from schedules.feedback.gaussian_process import Hyperparameters
from schedules.feedback.history import History
from schedules.feedback.plateau import PlateauState

__all__ = ["AutoWUState", "Warmup"]


@dataclasses.dataclass(frozen=True)
class AutoWUState:
    """Everything that a run of AutoWU remembers."""

    step: int = 0
    phase: Literal["warmup", "constant", "cooldown"] = "warmup"
    losses: History = dataclasses.field(default_factory=History)
    """Losses of the warmup, in order."""
    fit: Hyperparameters | None = None
    draws: str | None = None
    """State of the generator that draws losses, once it has drawn."""
    votes: tuple[bool, ...] = ()
    alone: int = 0
    """Robust tests in a row that were confident about the present only."""
    chance: float = 0.0
    """Probability of the last test."""
    argmin: float = 1.0
    lowest: float = math.inf
    """Lowest mean loss between two tests."""
    is_lowest: bool = False
    peak: float = 0.0
    begin: int = 0
    length: int = 0
    decay: PlateauState | None = None
    epoch: tuple[float, ...] = ()
    """Losses of this epoch, if the constant phase uses their mean."""
    decision: Decision | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["losses"] = list(self.losses)
        values["fit"] = self.fit and dataclasses.asdict(self.fit)
        values["decay"] = self.decay and self.decay._asdict()
        values["decision"] = self.decision and list(self.decision)
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> AutoWUState:
        """Return the state that `to_json` returned."""
        fit, decay, decision = state["fit"], state["decay"], state["decision"]
        if fit:
            raw, first, second = (tuple(fit[name]) for name in ("raw", "first", "second"))
            fit = Hyperparameters(raw, first, second, fit["steps"])
        return cls(
            **{**state}
            | {
                "losses": History.of(state["losses"]),
                "votes": tuple(state["votes"]),
                "epoch": tuple(state["epoch"]),
                "fit": fit,
                "decay": decay and PlateauState(**decay),
                "decision": decision and Decision(*decision),
            }
        )


@dataclasses.dataclass(frozen=True)
class Warmup:
    """The longest warmup that a run allows."""

    steps: int
    steps_per_epoch: int
    epochs: int
    """Whole epochs in it, at least 1."""
    min_lr: float
    max_lr: float
    unit: Literal["step", "epoch"]
    type: Literal["exp", "linear"]

    def lr(self, step: int) -> float:
        """Return the learning rate of a step of the warmup."""
        fraction = step / self.steps
        if self.unit == "epoch":
            fraction = step // self.steps_per_epoch / self.epochs
        return self.lr_between(self.max_lr, fraction)

    def lr_between(self, lr: float, fraction: float) -> float:
        """Return the learning rate at a fraction of the way from ``min_lr`` to another one."""
        if self.type == "linear":
            return self.min_lr + (lr - self.min_lr) * fraction
        return float(self.min_lr * (lr / self.min_lr) ** fraction)
