"""A feedback schedule at work on an optimizer: it is told of each update, and writes the next."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from schedules.attached import AttachedSchedule
from schedules.core.durations import Horizon
from schedules.core.schedule import Fault, ScheduleError
from schedules.feedback.base import Decision, Evidence, FeedbackSchedule
from schedules.param_groups import slots_of

__all__ = ["FeedbackBinder"]

log = logging.getLogger("onecycle")


class FeedbackBinder(AttachedSchedule):
    """Runs a schedule that listens: ``step(loss)`` belongs after each update that was applied.

    Raises:
        ValueError: the optimizer lacks what the schedule drives, or the run is not known.

    >>> import torch, schedules
    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> optimizer = torch.optim.SGD([weight], lr=0.1)
    >>> scheduler = schedules.attach("AutoWU", optimizer, steps_per_epoch=5, total_epochs=20)
    >>> loss = (weight**2).sum()
    >>> loss.backward(); _ = optimizer.step(); scheduler.step(loss=loss)
    >>> optimizer.param_groups[0]["lr"] == scheduler.get_last_lr()[0] > 1e-5
    True
    """

    def __init__(
        self,
        schedule: FeedbackSchedule[Any],
        optimizer: Optimizer,
        *,
        horizon: Horizon | None = None,
    ) -> None:
        self.schedule: FeedbackSchedule[Any] = schedule
        self.optimizer = optimizer
        self._horizon = horizon
        self._slots = {name: slots_of(name, optimizer) for name in schedule.drives}
        self._base = self.read_base()
        self._rule = schedule.control(self._base, horizon)
        _refuse_unknown_run(schedule.resolve(horizon))
        if warning := self._rule.warning():
            warnings.warn(warning, stacklevel=3)
        self.remember_base()
        self.evidence: Evidence | None = None
        """What the switch of this process's life rests on."""
        self._go_to(self._rule.init(), 0)

    def step(
        self, loss: Tensor | float | None = None, *, metric: Tensor | float | None = None
    ) -> None:
        """Count one applied optimizer update, and write what the next one is to use.

        Args:
            loss: of the update, a number or a scalar tensor; the mean over all ranks, so that all
                of them decide alike. A graph behind it is not kept.
            metric: for schedules that listen to one, where there is one.

        Raises:
            ValueError: the loss is missing, or is not one number.
        """
        told = _number(
            metric if self.schedule.listens_to == "metric" and metric is not None else loss
        )
        before, state = self._state, self._rule.update(self._state, told)
        self._go_to(state, self.last_epoch + 1)
        if self._rule.switched(state):
            decided = self._rule.decision(state)
            assert decided is not None
            assert told is not None
            self.evidence = self._rule.evidence(before, told, state)
            sure = (
                "" if decided.probability is None else f" (probability {decided.probability:.3f})"
            )
            name = self.schedule.type_name
            log.info("%s, update %d: lr %.4g: %s%s", name, *decided[:3], sure)

    @property
    def decision(self) -> Decision | None:
        """The last thing that was decided, with its reason; None before."""
        return self._rule.decision(self._state)

    @property
    def is_lowest(self) -> bool:
        """Whether the update just counted ended a stretch with the lowest loss of the warmup."""
        return self._rule.lowest(self._state)

    @property
    def has_switched(self) -> bool:
        """Whether the update just counted brought the decision."""
        return self._rule.switched(self._state)

    @property
    def state(self) -> Any:
        """All that the rule remembers; it is never changed in place."""
        return self._state

    def write(self) -> None:
        """Write what the next update uses, once more, where something else wrote over it."""
        for name, values in self._rule.values(self._state).items():
            groups = zip(self._slots[name], self.optimizer.param_groups, values, strict=True)
            for slot, group, value in groups:
                slot.write(group, value)

    def _go_to(self, state: Any, count: int) -> None:
        self._state, self.last_epoch = state, count
        self.write()

    def state_dict(self) -> dict[str, Any]:
        """Return the rule's state, the base values, and which schedule they belong to."""
        return {
            **self.identity,
            "step": self.last_epoch,
            "base": {name: list(values) for name, values in self._base.items()},
            "state": self._rule.to_json(self._state),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a state and write its values into the optimizer at once.

        Raises:
            ValueError: the state is one of another schedule, or of other param groups.
        """
        self.refuse_another_run(state_dict)
        self._base = {name: tuple(values) for name, values in state_dict["base"].items()}
        self._rule = self.schedule.control(self._base, self._horizon)
        self.remember_base()
        self._go_to(self._rule.from_json(state_dict["state"]), state_dict["step"])


def _number(loss: Tensor | float | None) -> float | None:
    if loss is None:
        return None
    if isinstance(loss, Tensor) and loss.numel() != 1:
        raise ValueError(
            f"`loss` must be one number, but is a tensor of shape {tuple(loss.shape)} instead; "
            "take its mean."
        )
    return float(loss.detach()) if isinstance(loss, Tensor) else float(loss)


def _refuse_unknown_run(schedule: FeedbackSchedule[Any]) -> None:
    missing = [
        name for name in ("steps_per_epoch", "total_epochs") if getattr(schedule, name, 1) is None
    ]
    if missing:
        message = (
            f"`{missing[0]}` must be known, but neither the parameters nor the run say it. Set it, "
            'or give `initialize` the data and "engine": {"max_duration": "30ep"}.'
        )
        raise ScheduleError(schedule.type_name, [Fault(missing[0], message)])
