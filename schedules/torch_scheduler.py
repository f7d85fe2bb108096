"""The one place that writes a schedule's values into an optimizer's param groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from schedules.attached import AttachedSchedule
from schedules.core.durations import Horizon
from schedules.core.registry import from_config
from schedules.core.schedule import Schedule
from schedules.feedback.base import FeedbackSchedule
from schedules.feedback_binder import FeedbackBinder
from schedules.param_groups import slots_of
from schedules.writers import FlatStep, flat_step, writer

__all__ = ["ScheduleBinder", "attach", "bind"]


class ScheduleBinder(AttachedSchedule):
    """Runs a schedule on an optimizer: writes what each update is to use into every param group.

    ``binder.step()`` belongs after each ``optimizer.step()`` that was applied, as with the
    schedulers of torch, whose methods this class has. Only what the schedule drives is written:
    the learning rate, ``momentum`` or else ``betas[0]``, the weight decay.

    Raises:
        ValueError: a group lacks what the schedule drives, the groups do not fit it, or it listens
            to the loss. Nothing is written then.

    >>> import torch, schedules
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
    >>> binder = schedules.attach(
    ...     "OneCycle", optimizer, cycle_min_lr=0.1, cycle_max_lr=0.5, cycle_first_step_size=2
    ... )
    >>> for _ in range(3):
    ...     group = optimizer.param_groups[0]
    ...     print(round(group["lr"], 6), round(group["momentum"], 6))
    ...     _ = optimizer.step()
    ...     binder.step()
    0.1 0.9
    0.3 0.85
    0.5 0.8
    """

    _flat: FlatStep | None = None

    # torch's own constructor patches optimizer.step and steps once; a closed form needs neither.
    def __init__(
        self, schedule: Schedule[Any], optimizer: Optimizer, *, horizon: Horizon | None = None
    ) -> None:
        if isinstance(schedule, FeedbackSchedule):
            raise ValueError(  # noqa: TRY004  # as what `attach` raises of a schedule
                f"{schedule.type_name} listens to the {schedule.listens_to}, which this binder "
                "does not tell it; attach it with `schedules.attach`."
            )
        self.schedule = schedule
        self.optimizer = optimizer
        self._horizon = horizon
        self._slots = {name: slots_of(name, optimizer) for name in schedule.drives}
        self._base = self.read_base()
        self._curves = schedule.bind(self._base, horizon).curves
        self.remember_base()
        self._go_to(0)

    def step(self, epoch: int | None = None) -> None:
        """Count one applied optimizer update, and write what the next one is to use.

        Raises:
            ValueError: ``epoch`` is given, by which torch's schedulers jump, or a param group was
                added since the binder was built.
        """
        self.long_step(epoch)

    def long_step(self, epoch: int | None = None) -> None:
        """Do what `step` does, without its short cut for the commonest case."""
        if epoch is not None:
            raise ValueError(
                f"`epoch` must be absent, but is {epoch} instead: a schedule counts the updates "
                "that were applied. To begin elsewhere, give `load_state_dict` a saved state."
            )
        self.last_epoch = count = self.last_epoch + 1
        if count >= self._until or len(self.optimizer.param_groups) != self._groups:
            self.enter(count)
        self._write(count)

    def _initial_step(self) -> None:
        # torch's SequentialLR begins its first scheduler by this, and by the next all that follow.
        self._go_to(0)

    def _update_lr(self, epoch: int | None = None) -> None:
        if epoch is None:
            self.step()
        else:
            self._go_to(epoch)

    def __getstate__(self) -> dict[str, Any]:
        # A copy must not keep functions that write into the original's optimizer.
        kept = ("schedule", "optimizer", "_horizon", "_slots", "_base", "base_lrs", "_groups")
        return {name: vars(self)[name] for name in (*kept, "last_epoch")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._curves = self.schedule.bind(self._base, self._horizon).curves
        self.enter(self.last_epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the count of updates, the base values, and which schedule they belong to.

        The values follow from these; the schedule is there so that no other one is resumed.
        """
        return {
            **self.identity,
            "step": self.last_epoch,
            "base": {name: list(values) for name, values in self._base.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a state and write its values into the optimizer at once.

        Raises:
            ValueError: the state is one of another schedule, or of other param groups.
        """
        self.refuse_another_run(state_dict)
        self._base = {name: tuple(values) for name, values in state_dict["base"].items()}
        self._curves = self.schedule.bind(self._base, self._horizon).curves
        self.remember_base()
        self._go_to(state_dict["step"])

    def _go_to(self, count: int) -> None:
        self.last_epoch = count
        self.enter(count)
        self._write(count)

    def enter(self, count: int) -> None:
        """Choose the formulas that hold from this count on, and note how long they do."""
        pieces = {curve: curve.piece(count) for curves in self._curves.values() for curve in curves}
        self._until = min(piece.end for piece in pieces.values())
        of_groups = {
            name: [pieces[curve] for curve in curves] for name, curves in self._curves.items()
        }
        groups = len(self.optimizer.param_groups)
        if groups != len(self._base["lr"]):
            raise ValueError(
                f"the optimizer must keep the {len(self._base['lr'])} param groups that it had "
                f"when the schedule was attached, but has {groups} instead. Add the groups first."
            )
        self._write = writer(self.optimizer, self._slots, of_groups)
        if self._flat is not None:
            self._flat.expire()
        self._flat = flat_step(self, self._until, self.optimizer, self._slots, of_groups)
        # For the commonest stretch, an instance's own `step`; the method is what it falls back on.
        self.step = self._flat.step if self._flat else self.long_step  # type: ignore[method-assign, assignment]


def attach(
    schedule: str | Mapping[str, Any] | Schedule[Any],
    optimizer: Optimizer,
    *,
    horizon: Horizon | None = None,
    **params: Any,
) -> ScheduleBinder | FeedbackBinder:
    """Return a schedule at work on an optimizer, for use in any training loop.

    Args:
        schedule: the name of one, with its parameters as keywords; or a ``{"type": …, "params":
            {…}}`` block; or a `Schedule`.
        optimizer: what to drive.
        horizon: the run, where durations are time strings or are scaled.
        **params: the schedule's parameters, where it is given by its name.

    Raises:
        ValueError: the schedule is wrong (`ScheduleError`) or does not fit the optimizer.

    >>> import torch
    >>> optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=0.5)
    >>> attach("WarmupLR", optimizer, warmup_num_steps=10).get_last_lr()
    [0.0]
    """
    if isinstance(schedule, str):
        schedule = {"type": schedule, "params": params}
    elif params:
        raise ValueError(
            f"keyword parameters must come with the name of a schedule, but {', '.join(params)} "
            f"came with {schedule!r}; put them into it."
        )
    if not isinstance(schedule, Schedule):
        schedule = from_config(schedule)
    return bind(schedule, optimizer, horizon=horizon)


def bind(
    schedule: Schedule[Any], optimizer: Optimizer, *, horizon: Horizon | None = None
) -> ScheduleBinder | FeedbackBinder:
    """Return a schedule at work on an optimizer, by the binder of its kind.

    Raises:
        ValueError: it does not fit the optimizer, or the run.
    """
    if isinstance(schedule, FeedbackSchedule):
        return FeedbackBinder(schedule, optimizer, horizon=horizon)
    return ScheduleBinder(schedule, optimizer, horizon=horizon)
