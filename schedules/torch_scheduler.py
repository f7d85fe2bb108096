"""The one place that writes a schedule's values into an optimizer's param groups."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from schedules.core.controller import Base, Controller, Decision, Evidence, OpenLoop
from schedules.core.durations import Horizon
from schedules.core.registry import from_config
from schedules.core.schedule import Schedule
from schedules.param_groups import Stretch, momenta_of, slots_of

__all__ = ["ScheduleBinder", "attach", "bind"]

log = logging.getLogger("onecycle")


class ScheduleBinder(LRScheduler):
    """Runs a schedule on an optimizer: writes the values of each step into every param group.

    Call ``step()`` after each ``optimizer.step()`` that was applied, as with the schedulers of
    torch, whose methods this class has; a feedback schedule receives the loss, ``step(loss)``. Only
    the hyperparameters that the schedule drives are written: the learning rate, ``momentum`` or
    else ``betas[0]``, the weight decay.

    Args:
        schedule: schedule to run.
        optimizer: optimizer to drive.
        horizon: length of the run, for time strings and scaling.

    Raises:
        ValueError: a group lacks a driven hyperparameter, the groups do not fit the schedule, or
            the length of the run is not known. Nothing is written then.

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
    >>> binder = schedules.attach("AutoWU", optimizer, steps_per_epoch=5, total_epochs=20)
    >>> binder.step(loss=2.5)
    >>> optimizer.param_groups[0]["lr"] == binder.get_last_lr()[0] > 1e-5
    True
    """

    state: Any
    """State of the controller; never changed in place."""
    last_epoch: int
    """Count of applied steps."""

    # torch's own constructor patches optimizer.step and steps once; a binder needs neither.
    def __init__(
        self, schedule: Schedule[Any], optimizer: Optimizer, *, horizon: Horizon | None = None
    ) -> None:
        self.schedule = schedule
        self.optimizer = optimizer
        self._horizon = horizon
        self._slots = {name: slots_of(name, optimizer) for name in schedule.drives}
        self._bind(self._read_base())
        self.evidence: Evidence | None = None
        """Data behind the last decision, if this process made it."""
        self._stretch: Stretch | None = None  # as long as there is feedback
        for warning in schedule.resolve(horizon).warnings():
            warnings.warn(warning, stacklevel=3)
        self._go_to(self.controller.init(), 0)

    def _bind(self, base: Base) -> None:
        self.controller: Controller[Any] = self.schedule.bind(base, self._horizon)
        self._base = base
        self.base_lrs = list(base["lr"])
        for name, values in base.items():
            for group, value in zip(self.optimizer.param_groups, values, strict=True):
                group[f"initial_{name}"] = value

    def _read_base(self) -> Base:
        """Return the values that the groups were built with."""
        # A group remembers its base values as torch's schedulers do, in `initial_…`: a binder that
        # is built after the optimizer was restored finds the original ones, not the last ones.
        groups = self.optimizer.param_groups
        slots = {"lr": slots_of("lr", self.optimizer)} | self._slots
        return {
            name: tuple(
                float(group.get(f"initial_{name}", slot.read(group)))
                for slot, group in zip(of_groups, groups, strict=True)
            )
            for name, of_groups in slots.items()
        }

    def step(
        self, loss: Tensor | float | None = None, *, metric: Tensor | float | None = None
    ) -> None:
        """Count one applied optimizer step, and write the values of the next one.

        Args:
            loss: loss of the step, a number or a scalar tensor, for a feedback schedule; the mean
                over all ranks, so that all of them decide alike.
            metric: metric of the step, for a schedule that uses one; has no effect on the others.

        Raises:
            ValueError: the loss is missing, is not one number, or is given to a schedule without
                feedback (torch's schedulers jump by that argument); or a param group was added
                since the binder was built.
        """
        stretch = self._stretch
        if stretch is None:
            self._step_with_feedback(loss, metric)
            return
        if loss is not None:
            raise ValueError(
                f"`epoch` must be absent, but is {loss} instead: a schedule counts the updates "
                "that were applied. To begin elsewhere, give `load_state_dict` a saved state."
            )
        self.state = self.last_epoch = step = self.last_epoch + 1
        # The groups are looked up each time, because loading an optimizer's state replaces them.
        groups = self.optimizer.param_groups
        if step < stretch.end and groups[-1] is stretch.last_group:
            stretch.write(groups, step)
        else:
            self.write()

    def _step_with_feedback(
        self, loss: Tensor | float | None, metric: Tensor | float | None
    ) -> None:
        uses_metric = self.schedule.feedback == "metric" and metric is not None
        received = _number(metric if uses_metric else loss)
        before, self.state = self.state, self.controller.update(self.state, received)
        self.last_epoch += 1
        self.write()
        decision = self.decision
        if decision is not None and self.just_decided:
            assert received is not None
            self.evidence = self.controller.evidence(before, received, self.state)
            probability = decision.probability
            confidence = "" if probability is None else f" (probability {probability:.3f})"
            name = self.schedule.type_name
            log.info("%s, update %d: lr %.4g: %s%s", name, *decision[:3], confidence)

    def write(self) -> None:
        """Write the values of the next step into the param groups, again if they are there."""
        groups = self.optimizer.param_groups
        if len(groups) != len(self.base_lrs):
            raise ValueError(
                f"the optimizer must keep the {len(self.base_lrs)} param groups that it had when "
                f"the schedule was attached, but has {len(groups)} instead. Add the groups first."
            )
        if isinstance(self.controller, OpenLoop):
            curves = self.controller.curves
            self._stretch = Stretch(groups, self._slots, curves, self.last_epoch)
            self._stretch.write(groups, self.last_epoch)
            return
        for name, values in self.controller.values(self.state).items():
            for slot, group, value in zip(self._slots[name], groups, values, strict=True):
                slot.write(group, value)

    def _go_to(self, state: Any, step: int) -> None:
        self.state, self.last_epoch = state, step
        self.write()

    # torch's SequentialLR starts its first scheduler by `_initial_step`, and the others by
    # `_update_lr(0)` at their milestones.
    def _initial_step(self) -> None:
        self._go_to(self.controller.init(), 0)

    def _update_lr(self, epoch: int | None = None) -> None:
        if epoch is None:
            self.step()
            return
        if epoch != 0:
            raise ValueError(f"`epoch` must be 0, got {epoch}: load a saved state instead.")
        self._initial_step()

    @property
    def decision(self) -> Decision | None:
        """The last decision of a feedback schedule, with its reason; None before the first."""
        return self.controller.decision(self.state)

    @property
    def just_decided(self) -> bool:
        """Whether the last step brought the decision."""
        return self.decision is not None and self.decision.step == self.last_epoch

    def get_last_lr(self) -> list[float | Tensor]:
        """Return the learning rate of each group: the one that the next step uses."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def get_lr(self) -> list[float | Tensor]:
        """Return the same as `get_last_lr`, by the name that DeepSpeed's scripts use."""
        return self.get_last_lr()

    def get_mom(self) -> list[float] | list[tuple[float, ...]] | None:
        """Return each group's momentum (Adam: all betas); None if the schedule drives none."""
        return momenta_of(self.optimizer) if "momentum" in self._slots else None

    @property
    def identity(self) -> dict[str, Any]:
        """The type and parameters of the schedule in this run, durations in steps.

        A state belongs to them: "1dur" of a run of another length is a different schedule.
        """
        schedule, horizon = self.schedule, self._horizon or Horizon()
        params: dict[str, Any] = {}
        if schedule.clock_is_step and horizon.scale_ratio != 1:
            params["scale_schedule_ratio"] = horizon.scale_ratio
            horizon = replace(horizon, scale_ratio=1.0)
        params |= schedule.resolve(horizon).params()
        return {"type": schedule.type_name, "params": params}

    def state_dict(self) -> dict[str, Any]:
        """Return the step, the base values, the schedule they belong to, and its feedback state."""
        state: dict[str, Any] = {
            **self.identity,
            "step": self.last_epoch,
            "base": {name: list(values) for name, values in self._base.items()},
        }
        if self.schedule.feedback is not None:
            state["state"] = self.controller.to_json(self.state)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a state and write its values into the optimizer.

        Raises:
            ValueError: the state is that of a different schedule, or of other param groups.
        """
        self._check_identity(state_dict)
        self._bind({name: tuple(values) for name, values in state_dict["base"].items()})
        state = state_dict if self.schedule.feedback is None else state_dict["state"]
        self._go_to(self.controller.from_json(state), state_dict["step"])

    def _check_identity(self, state: Mapping[str, Any]) -> None:
        own, saved = ({"type": each["type"], **each["params"]} for each in (self.identity, state))
        changed = [
            f"`{name}` was {saved.get(name, 'absent')} and is {own.get(name, 'absent')}"
            for name in dict.fromkeys([*saved, *own])
            if saved.get(name) != own.get(name)
        ]
        if changed:
            raise ValueError(
                f"the schedule must be the one that was saved, but {', '.join(changed)}. Put back "
                "what was saved, or begin the new schedule without loading the old one's state."
            )
        groups = len(self.optimizer.param_groups)
        if len(state["base"]["lr"]) != groups:
            raise ValueError(
                f"the optimizer must have the {len(state['base']['lr'])} param groups that were "
                f"saved, but has {groups} instead."
            )

    def __getstate__(self) -> dict[str, Any]:
        # Formulas are closures, which pickle cannot carry: a copy builds them again.
        rebuilt = {"controller", "_stretch", "_slots"}
        return {name: value for name, value in vars(self).items() if name not in rebuilt}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._slots = {name: slots_of(name, self.optimizer) for name in self.schedule.drives}
        self.controller = self.schedule.bind(self._base, self._horizon)
        self._stretch = None
        self.write()


def _number(loss: Tensor | float | None) -> float | None:
    if loss is None:
        return None
    if isinstance(loss, Tensor) and loss.numel() != 1:
        raise ValueError(
            f"`loss` must be one number, but is a tensor of shape {tuple(loss.shape)} instead; "
            "take its mean."
        )
    return float(loss.detach()) if isinstance(loss, Tensor) else float(loss)


def attach(
    schedule: str | Mapping[str, Any] | Schedule[Any],
    optimizer: Optimizer,
    *,
    horizon: Horizon | None = None,
    **params: Any,
) -> ScheduleBinder:
    """Bind a schedule to an optimizer, for use in any training loop.

    Args:
        schedule: name of a schedule, with its parameters as keywords; or a ``{"type": …,
            "params": {…}}`` block; or a `Schedule`.
        optimizer: optimizer to drive.
        horizon: length of the run, for time strings and scaling.
        **params: parameters of a schedule that is given by name.

    Raises:
        ValueError: the schedule is invalid (`ScheduleError`) or does not fit the optimizer.

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
) -> ScheduleBinder:
    """Bind a schedule to an optimizer.

    Raises:
        ValueError: it does not fit the optimizer, or the run.
    """
    return ScheduleBinder(schedule, optimizer, horizon=horizon)
