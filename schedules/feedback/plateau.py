"""ReduceLROnPlateau, a schedule that reduces the learning rate when a metric stops improving."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from schedules.core.combinators import linear_warmup
from schedules.core.controller import Base, Decision, Values
from schedules.core.fields import LearningRate, Range, WarmupStepsOrZero, as_number
from schedules.core.per_group import broadcast
from schedules.core.saved_state import Count, restore
from schedules.core.schedule import ParameterProblem, schedule_class
from schedules.feedback.base import FeedbackController, FeedbackSchedule

__all__ = ["ReduceLROnPlateau"]

MetricCount = Annotated[int, Range(at_least=0)]


class PlateauState(NamedTuple):
    """State of `Plateau`, updated with each metric value."""

    best: float | None = None
    bad: Count = 0
    """Number of consecutive metric values without an improvement."""
    rests: Count = 0
    """Number of metric values left in the current cooldown."""
    factor: float = 1.0
    """Product of the factors of all reductions so far."""
    reductions: Count = 0
    """Number of reductions so far."""


@dataclasses.dataclass(frozen=True)
class Plateau:
    """Rule that computes the learning rate factor of `ReduceLROnPlateau` from metric values.

    >>> rule = Plateau(factor=0.5, patience=1)
    >>> state = rule.init()
    >>> for metric in (1.0, 0.9, 0.95, 0.92, 0.91):
    ...     state = rule.update(state, metric)
    >>> state.factor
    0.5
    """

    factor: float
    patience: int
    mode: Literal["min", "max"] = "min"
    threshold: float = 1e-4
    threshold_mode: Literal["rel", "abs"] = "rel"
    cooldown: int = 0

    def init(self) -> PlateauState:
        """Return the initial state, before the first metric value."""
        return PlateauState()

    def update(self, state: PlateauState, metric: float) -> PlateauState:
        """Return the state after one more metric value. NaN never counts as an improvement."""
        best, bad, rests = state.best, state.bad + 1, state.rests
        if self._is_better(metric, best):
            best, bad = metric, 0
        if rests > 0:
            rests, bad = rests - 1, 0
        if bad <= self.patience:
            return PlateauState(best, bad, rests, state.factor, state.reductions)
        return PlateauState(
            best, 0, self.cooldown, state.factor * self.factor, state.reductions + 1
        )

    def _is_better(self, metric: float, best: float | None) -> bool:
        sign = -1 if self.mode == "min" else 1
        if best is None:
            best = -sign * math.inf
        if self.threshold_mode == "abs":
            bar = best + sign * self.threshold
        else:
            bar = best * (1 + sign * self.threshold)
        return metric < bar if self.mode == "min" else metric > bar


class _State(NamedTuple):
    step: Count
    plateau: PlateauState
    lrs: tuple[float, ...]
    decision: Decision | None = None


@schedule_class
class ReduceLROnPlateau(FeedbackSchedule[_State], example={"patience": 5, "factor": 0.5}):
    """Reduce the learning rate when a metric has stopped improving.

    A value of the metric is an improvement if it is better than the best value so far by more than
    ``threshold``. By default, ``threshold`` is a fraction of the best value. After more than
    ``patience`` consecutive values without an improvement, the learning rate is reduced::

        lr = max(lr * factor, min_lr)

    Whenever a new value of the metric is available, for example at the end of an epoch, pass it to
    ``trainer.step(metric=…)`` or, in a custom loop, to ``scheduler.step(metric=…)``. Steps without
    a new value do not change the learning rate, except during the warmup. Previews use a synthetic
    metric.

    The warmup counts the calls to ``step``. If a trainer calls ``step`` once per evaluation, as
    Hugging Face's ``Trainer`` does, the length of the warmup is measured in evaluations.

    >>> import torch, schedules
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    >>> scheduler = schedules.attach("ReduceLROnPlateau", optimizer, patience=1)
    >>> for loss in (1.0, 0.9, 0.9, 0.9):
    ...     scheduler.step(metric=loss)
    >>> round(scheduler.get_last_lr()[0], 6)
    0.01

    Source: ``torch.optim.lr_scheduler.ReduceLROnPlateau`` (2.13).
    """

    feedback: ClassVar[Literal["loss", "metric"] | None] = "metric"

    mode: Literal["min", "max"] = "min"
    """Whether smaller ("min") or larger ("max") values of the metric are better."""
    factor: Annotated[float, Range(at_least=0)] = 0.1
    """Factor applied to the learning rate at each reduction."""
    patience: MetricCount = 10
    """Maximum number of consecutive metric values without an improvement. One more such value
    reduces the learning rate."""
    threshold: Annotated[float, Range(at_least=0)] = 1e-4
    """Minimum change in the metric that counts as an improvement."""
    threshold_mode: Literal["rel", "abs"] = "rel"
    """Whether `threshold` is a fraction of the best metric value ("rel") or an absolute difference
    ("abs")."""
    cooldown: MetricCount = 0
    """Number of metric values after each reduction that do not count toward `patience`."""
    min_lr: LearningRate = 0.0
    """Lower bound on the learning rate."""
    eps: Annotated[float, Range(at_least=0)] = 1e-8
    """Minimum reduction of the learning rate; smaller reductions are skipped."""
    warmup_steps: WarmupStepsOrZero = 0
    """Length of a linear warmup of the learning rate. Metric values during the warmup are ignored.
    PyTorch's `ReduceLROnPlateau` does not have this parameter."""
    one_based_warmup: bool = False
    """Whether to count warmup steps from 1. If true, the learning rate at step k is multiplied by
    (k + 1) / warmup_steps instead of k / warmup_steps, so it is not 0 at the first step, and the
    warmup ends one step earlier."""

    def find_problems(self) -> Iterator[ParameterProblem]:
        if self.factor >= 1:
            yield ParameterProblem("factor", f"`factor` must be less than 1, got {self.factor:g}.")

    @property
    def span(self) -> int:
        return int(self.warmup_steps) + 100

    def controller(self, base: Base) -> PlateauController:
        return PlateauController(self, base["lr"])

    def synthetic_loss(self, step: int, lr: float) -> float:
        del lr
        return 1 - min(max(0, step - int(self.warmup_steps)), 20) / 20


class PlateauController(FeedbackController[_State]):
    """Controller for `ReduceLROnPlateau`; ``lrs`` are the param groups' initial learning rates."""

    def __init__(self, params: ReduceLROnPlateau, lrs: tuple[float, ...]) -> None:
        self._lrs = lrs
        self._least = broadcast("min_lr", params.min_lr, lrs)
        self._eps = params.eps
        self._warmup_steps = as_number(params.warmup_steps)
        self._factors = linear_warmup(1.0, self._warmup_steps, one_based=params.one_based_warmup)
        self._rule = Plateau(
            params.factor,
            params.patience,
            params.mode,
            params.threshold,
            params.threshold_mode,
            params.cooldown,
        )

    def init(self) -> _State:
        return _State(0, self._rule.init(), self._warm_up(0))

    def _warm_up(self, step: int) -> tuple[float, ...]:
        """Return the initial learning rates, scaled down if ``step`` is part of the warmup."""
        factor = self._factors(step) if step < self._warmup_steps else 1.0
        return tuple(factor * lr for lr in self._lrs)

    def continue_from(self, state: _State, values: Values) -> _State:
        return state._replace(lrs=values["lr"])

    def update(self, state: _State, loss: float | None) -> _State:
        step = state.step + 1
        if state.step < self._warmup_steps:
            return state._replace(step=step, lrs=self._warm_up(step))
        if loss is None:
            return state._replace(step=step)
        plateau = self._rule.update(state.plateau, loss)
        if plateau.reductions == state.plateau.reductions:
            return state._replace(step=step, plateau=plateau)
        lrs = tuple(map(self._reduce, state.lrs, self._least))
        reason = f"the metric has not improved in {self._rule.patience + 1} evaluations"
        return _State(step, plateau, lrs, Decision(step, lrs[0], reason))

    def _reduce(self, lr: float, least: float) -> float:
        new = max(lr * self._rule.factor, least)
        return new if lr - new > self._eps else lr

    def values(self, state: _State) -> Values:
        return {"lr": state.lrs}

    def decision(self, state: _State) -> Decision | None:
        return state.decision

    def to_json(self, state: _State) -> dict[str, Any]:
        return {
            "step": state.step,
            "plateau": state.plateau._asdict(),
            "lrs": list(state.lrs),
            "decision": state.decision and list(state.decision),
        }

    def from_json(self, state: Mapping[str, Any]) -> _State:
        restored: _State = restore(_State, state, "state")
        if len(restored.lrs) != len(self._lrs):
            raise ValueError(
                f"`state.lrs` must have {len(self._lrs)} items, one per param group, got "
                f"{len(restored.lrs)}. Use a checkpoint from a run with the same param groups."
            )
        return restored
