"""`ScheduleBinder`, which attaches a schedule to an optimizer like a PyTorch scheduler."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from schedules.core.controller import Base, Controller, Decision, Evidence, OpenLoop
from schedules.core.durations import MAX_STEPS, Horizon
from schedules.core.fields import Range
from schedules.core.registry import from_config
from schedules.core.saved_state import OPTIONAL, describe, restore
from schedules.core.schedule import Schedule
from schedules.param_groups import RangeWriter, find_slots, read_momenta

__all__ = ["ScheduleBinder", "attach", "bind"]

log = logging.getLogger("onecycle")


class ScheduleBinder(LRScheduler):
    """Attaches a schedule to an optimizer and writes its values into the param groups.

    The binder has the interface of PyTorch's schedulers. Call ``step()`` after each
    ``optimizer.step()`` that was not skipped, or ``step(loss)`` if the schedule depends on the
    loss. A schedule can set the learning rate, the momentum (``momentum`` or ``betas[0]``) and the
    weight decay. The binder does not change other hyperparameters.

    Args:
        schedule: schedule to run.
        optimizer: optimizer whose hyperparameters the schedule sets.
        horizon: length of the run, used to convert time strings to steps and to scale durations.

    Raises:
        ValueError: a param group does not have a hyperparameter that the schedule sets, the
            schedule is incompatible with the param groups, or the schedule requires the length of
            the run but ``horizon`` does not specify it. The optimizer is left unchanged.

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
    """State of the controller. It is replaced at each step, never modified in place."""
    last_epoch: int
    """Number of optimizer steps so far, without skipped steps."""

    # PyTorch's constructor is not called, because it patches `optimizer.step` and takes a step.
    def __init__(
        self, schedule: Schedule[Any], optimizer: Optimizer, *, horizon: Horizon | None = None
    ) -> None:
        self.schedule = schedule
        self.optimizer = optimizer
        self._horizon = horizon
        self._slots = {name: find_slots(name, optimizer) for name in schedule.hyperparameters}
        self._bind(self._read_base())
        self._first_step = _FirstStep(optimizer)
        self.evidence: Evidence | None = None
        """Losses and learning rates that led to the last decision. None before the first decision,
        and if the decision was restored from a checkpoint."""
        # `_writer` stays None for a feedback schedule, whose values are not known in advance.
        self._writer: RangeWriter | None = None
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
        """Return the initial hyperparameters of the param groups."""
        # Like PyTorch's schedulers, the binder stores initial values in the groups as `initial_…`.
        # A binder for a restored optimizer then reads the initial values, not scheduled values.
        groups = self.optimizer.param_groups
        slots = {"lr": find_slots("lr", self.optimizer)} | self._slots
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
        """Advance the schedule, and set the optimizer's hyperparameters for its next step.

        Args:
            loss: loss of the step, a number or a scalar tensor. Only feedback schedules accept it.
                Pass the mean over all ranks, so that all ranks make the same decision.
            metric: metric of the step, a number or a scalar tensor. Schedules that do not depend on
                a metric ignore it.

        Raises:
            ValueError: the schedule requires the loss but it is not passed; the loss is not a
                single number; ``loss`` (or an epoch, as in PyTorch) is passed to a schedule that
                does not use the loss; or a param group was added after the schedule was attached.
        """
        if self.last_epoch == 0:
            self._first_step.check()
        writer = self._writer
        if writer is None:
            self._step_with_feedback(loss, metric)
            return
        if loss is not None:
            raise ValueError(
                f"step() accepts neither an epoch nor, with this schedule, a loss, got {loss}. "
                "Call step() without arguments. To continue from a different step, call "
                "load_state_dict() with a saved state."
            )
        self.state = self.last_epoch = step = self.last_epoch + 1
        # Look up the groups at each step, because loading an optimizer's state replaces them.
        groups = self.optimizer.param_groups
        if (
            step < writer.end
            and groups[-1] is writer.last_group
            and len(groups) == writer.num_groups
        ):
            writer.write(groups, step)
        else:
            self.write()

    def _step_with_feedback(
        self, loss: Tensor | float | None, metric: Tensor | float | None
    ) -> None:
        uses_metric = self.schedule.feedback == "metric" and metric is not None
        received = _to_float(metric if uses_metric else loss)
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
            text = "%s at step %d: set the learning rate to %.4g, because %s%s"
            log.info(text, name, *decision[:3], confidence)

    def write(self) -> None:
        """Set the optimizer's hyperparameters for its next step."""
        groups = self.optimizer.param_groups
        if len(groups) != len(self.base_lrs):
            raise ValueError(
                f"The optimizer had {len(self.base_lrs)} param groups when the schedule was "
                f"attached, but has {len(groups)} now. Add all param groups before you attach the "
                "schedule."
            )
        if isinstance(self.controller, OpenLoop):
            curves = self.controller.curves
            self._writer = RangeWriter(groups, self._slots, curves, self.last_epoch)
            self._writer.write(groups, self.last_epoch)
            return
        for name, values in self.controller.values(self.state).items():
            for slot, group, value in zip(self._slots[name], groups, values, strict=True):
                slot.write(group, value)

    def _go_to(self, state: Any, step: int) -> None:
        self.state, self.last_epoch = state, step
        self.write()

    # PyTorch's SequentialLR calls `_initial_step` of its first scheduler, and it calls
    # `_update_lr(0)` of every other scheduler at the milestone at which that scheduler starts.
    def _initial_step(self) -> None:
        self._go_to(self.controller.init(), 0)

    def _update_lr(self, epoch: int | None = None) -> None:
        if epoch is None:
            self.step()
            return
        if epoch != 0:
            raise ValueError(f"`epoch` must be 0, got {epoch}. Use load_state_dict() instead.")
        self._initial_step()

    @property
    def decision(self) -> Decision | None:
        """Latest decision of the feedback schedule; None if it has not made one."""
        return self.controller.decision(self.state)

    @property
    def just_decided(self) -> bool:
        """Whether the schedule made a decision in the last step."""
        return self.decision is not None and self.decision.step == self.last_epoch

    def get_last_lr(self) -> list[float | Tensor]:
        """Return the learning rate of each param group for the next step."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def get_lr(self) -> list[float | Tensor]:
        """Return the result of `get_last_lr`, for compatibility with DeepSpeed's schedulers."""
        return self.get_last_lr()

    def get_mom(self) -> list[float] | list[tuple[float, ...]] | None:
        """Return the momentum (with Adam, the betas) of each param group.

        Return None if the schedule does not set the momentum.
        """
        return read_momenta(self.optimizer) if "momentum" in self._slots else None

    @property
    def identity(self) -> dict[str, Any]:
        """Type and parameters of the schedule, with durations in steps.

        A saved state can be loaded only into a schedule with the same type and parameters.
        Durations are in steps because a duration such as "1dur" depends on the length of the run.
        """
        schedule, horizon = self.schedule, self._horizon or Horizon()
        params: dict[str, Any] = {}
        if schedule.has_rate_per_step and horizon.scale_ratio != 1:
            params["scale_schedule_ratio"] = horizon.scale_ratio
            horizon = replace(horizon, scale_ratio=1.0)
        params |= schedule.resolve(horizon).params()
        return {"type": schedule.type_name, "params": params}

    @property
    def length(self) -> int | None:
        """Number of steps after which the schedule has ended; None if it does not end."""
        length = self.schedule.resolve(self._horizon).length
        ratio = self._horizon.scale_ratio if self._horizon is not None else 1.0
        if length is None or not self.schedule.has_rate_per_step:
            return length
        return math.ceil(length * ratio)

    def state_dict(self) -> dict[str, Any]:
        """Return the schedule's type, parameters, step count and other state as a dict."""
        state: dict[str, Any] = {
            **self.identity,
            "step": self.last_epoch,
            "base": {name: list(values) for name, values in self._base.items()},
        }
        if self.schedule.feedback is not None:
            state["state"] = self.controller.to_json(self.state)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state returned by `state_dict`, and set the hyperparameters for the next step.

        Raises:
            ValueError: the state is from a different schedule, or has a different number of param
                groups.
        """
        saved, state = self._restore(state_dict)
        self._bind(saved.base)
        self._go_to(state, saved.step)

    def check_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Check that `load_state_dict` accepts a state. Nothing changes.

        Raises:
            ValueError: the state is damaged, is from a different schedule, or has a different
                number of param groups.
        """
        self._restore(state_dict)

    def _restore(self, state_dict: Mapping[str, Any]) -> tuple[_SavedState, Any]:
        """Check a saved state, and return it with the state of the controller."""
        saved: _SavedState = restore(_SavedState, state_dict, "lr_scheduler")
        self._check_identity(saved)
        try:
            controller = self.schedule.bind(saved.base, self._horizon)
            is_open_loop = self.schedule.feedback is None
            state = controller.from_json(state_dict if is_open_loop else saved.state or {})
            values = controller.values(state)
            is_finite = all(math.isfinite(each) for group in values.values() for each in group)
        except Exception as error:
            raise ValueError(f"The saved state of the schedule is damaged: {error}") from error
        if not is_finite:
            raise ValueError(
                f"The saved state of the schedule is damaged: its values are {dict(values)}."
            )
        return saved, state

    def _check_identity(self, state: _SavedState) -> None:
        now = {"type": self.identity["type"], **self.identity["params"]}
        saved = {"type": state.type, **state.params}
        changed = [
            f"`{name}` is {_show(saved, name)} in the saved state, {_show(now, name)} now"
            for name in dict.fromkeys([*saved, *now])
            if saved.get(name) != now.get(name)
        ]
        if changed:
            raise ValueError(
                f"The schedule does not match the saved state: {'; '.join(changed)}. Restore the "
                "saved values, or start the new schedule without loading the state."
            )
        groups = len(self.optimizer.param_groups)
        if state.base.keys() != self._base.keys():
            raise ValueError(
                f"`base` must have the keys {', '.join(self._base)} in the saved state, got "
                f"{', '.join(state.base)}."
            )
        counts = {len(values) for values in state.base.values()} - {groups}
        if counts:
            raise ValueError(
                f"The saved state has {counts.pop()} param groups, but the optimizer "
                f"has {groups}. Build the optimizer with the same param groups."
            )

    def __getstate__(self) -> dict[str, Any]:
        # Formulas are closures, which cannot be pickled. `__setstate__` rebuilds them.
        rebuilt = {"controller", "_writer", "_slots", "_first_step"}
        return {name: value for name, value in vars(self).items() if name not in rebuilt}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._slots = {
            name: find_slots(name, self.optimizer) for name in self.schedule.hyperparameters
        }
        self.controller = self.schedule.bind(self._base, self._horizon)
        self._first_step = _FirstStep(None)
        self._writer = None
        self.write()


@dataclass(frozen=True)
class _SavedState:
    """The result of `ScheduleBinder.state_dict`."""

    type: str
    params: dict[str, Any]
    step: Annotated[int, Range(at_least=0, at_most=MAX_STEPS)]
    base: dict[str, tuple[Annotated[float, Range()], ...]]
    state: dict[str, Any] | None = field(default=None, metadata=OPTIONAL)


class _FirstStep:
    """Checks, as torch's schedulers do, that the optimizer steps before the schedule does.

    Args:
        optimizer: optimizer to observe; None to check nothing.
    """

    def __init__(self, optimizer: Optimizer | None) -> None:
        self._is_taken = True
        self._handle: Any = None
        # Wrappers of an optimizer, such as Accelerate's, may not have hooks.
        if optimizer is not None and hasattr(optimizer, "_optimizer_step_post_hooks"):
            self._is_taken = False
            self._handle = optimizer.register_step_post_hook(self._note)

    def _note(self, *_: object) -> None:
        self._is_taken = True

    def check(self) -> None:
        """Warn if the optimizer has not taken a step. Only the first call checks."""
        is_taken, self._is_taken = self._is_taken, True
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if not is_taken:
            warnings.warn(
                "`scheduler.step()` was called before the first `optimizer.step()`, so the first "
                "value of the schedule is not used. Call `optimizer.step()` first.",
                stacklevel=3,
            )


def _show(params: Mapping[str, Any], name: str) -> str:
    return describe(params[name]) if name in params else "absent"


def _to_float(loss: Tensor | float | None) -> float | None:
    if loss is None:
        return None
    if isinstance(loss, Tensor) and loss.numel() != 1:
        raise ValueError(
            f"`loss` must be a single number, got a tensor of shape {tuple(loss.shape)}. "
            "Pass its mean."
        )
    return float(loss.detach()) if isinstance(loss, Tensor) else float(loss)


def attach(
    schedule: str | Mapping[str, Any] | Schedule[Any],
    optimizer: Optimizer,
    *,
    horizon: Horizon | None = None,
    **params: Any,
) -> ScheduleBinder:
    """Attach a schedule to an optimizer, for use in a custom training loop.

    Args:
        schedule: name of a schedule, a ``{"type": …, "params": {…}}`` block, or a `Schedule`.
        optimizer: optimizer whose hyperparameters the schedule sets.
        horizon: length of the run, used to convert time strings to steps and to scale durations.
        **params: parameters of the schedule, if ``schedule`` is a name.

    Raises:
        ScheduleError: a parameter of the schedule is invalid.
        ValueError: the name is unknown, or the schedule is incompatible with the optimizer.

    >>> import torch
    >>> optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=0.5)
    >>> attach("WarmupLR", optimizer, warmup_num_steps=10).get_last_lr()
    [0.0]
    """
    if isinstance(schedule, str):
        schedule = {"type": schedule, "params": params}
    elif params:
        raise ValueError(
            f"Schedule parameters can be passed as keywords only if `schedule` is a name, got "
            f"{', '.join(params)} with {schedule!r}. Set them in the schedule itself."
        )
    if not isinstance(schedule, Schedule):
        schedule = from_config(schedule)
    return bind(schedule, optimizer, horizon=horizon)


def bind(
    schedule: Schedule[Any], optimizer: Optimizer, *, horizon: Horizon | None = None
) -> ScheduleBinder:
    """Attach a `Schedule` to an optimizer.

    Raises:
        ValueError: the schedule is incompatible with the optimizer, or requires the length of the
            run but ``horizon`` does not specify it.
    """
    return ScheduleBinder(schedule, optimizer, horizon=horizon)
