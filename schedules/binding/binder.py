"""Apply a schedule to an optimizer through the interface of PyTorch's schedulers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from schedules.binding.attachment import (
    Attachment,
    KnownGroups,
    check_not_chained,
    describe_change,
)
from schedules.binding.first_step import FirstStep
from schedules.binding.group_keys import bind_to_groups
from schedules.binding.saved_state import (
    BaseValues,
    check_origin,
    check_state,
    complete_base,
    read_base,
    read_state,
)
from schedules.binding.torch_interface import BaseLRs, TorchInterface
from schedules.binding.writers import Change, RangeWriter, ValueWriter, Writer
from schedules.core.controller import Base, Controller, Decision, Evidence, OpenLoop
from schedules.core.durations import Horizon
from schedules.core.schedule import Schedule
from schedules.feedback.base import FeedbackController
from schedules.param_groups import Group, Slot, find_slots

if TYPE_CHECKING:
    from typing import Self

__all__ = ["ScheduleBinder"]

log = logging.getLogger("onecycle")
_SUBCLASSES: dict[str | None, type[Any]] = {}
"""Maps a kind of feedback, such as "metric", to the `ScheduleBinder` subclass that handles it."""


class ScheduleBinder(TorchInterface):
    """Scheduler that writes a schedule's values into the param groups of an optimizer.

    The binder has the interface of PyTorch's schedulers. Call ``step()`` after each
    ``optimizer.step()`` that was not skipped, or ``step(loss)`` if the schedule depends on the
    loss. A schedule can set the learning rate, the momentum (``momentum`` or ``betas[0]``) and the
    weight decay. The binder does not change other hyperparameters.

    Args:
        schedule: schedule to run.
        optimizer: optimizer whose hyperparameters the schedule sets.
        horizon: length of the run and of its epochs, to convert time strings and scale durations.
        base: initial learning rate, as a number for all param groups or a list with one number per
            group. To specify other initial hyperparameters too, pass a dict with a number or list
            for each of "lr", "momentum" and "weight_decay". Defaults to the current values or, if
            another schedule set them, to the initial values of that schedule.
        at: step of the schedule to start from (default: 0, the beginning of the schedule).

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

    def __new__(cls, schedule: Schedule[Any] | None = None, *_: Any, **__: Any) -> Self:
        """Create an instance of this class, or of `MetricBinder` if the schedule needs a metric."""
        feedback = getattr(schedule, "feedback", None) if cls is ScheduleBinder else None
        chosen: type[Self] = _SUBCLASSES.get(feedback, cls)
        return super().__new__(chosen)

    def __init_subclass__(cls, feedback: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if feedback is not None:
            _SUBCLASSES[feedback] = cls

    # PyTorch's constructor is not called, because it patches `optimizer.step` and takes a step.
    def __init__(
        self,
        schedule: Schedule[Any],
        optimizer: Optimizer,
        *,
        horizon: Horizon | None = None,
        base: BaseValues | None = None,
        at: int = 0,
    ) -> None:
        if at and schedule.feedback is not None:
            raise ValueError(
                f"`at` must be 0, got {at}. {schedule.type_name} depends on past values of the "
                f"{schedule.feedback}. To start at a later step, call load_state_dict() with a "
                "saved state."
            )
        self.schedule = schedule
        self.optimizer = optimizer
        self._horizon = horizon
        self._position = at  # number of steps; scripts can set only `last_epoch`
        self._prepare()
        self._bind(self._read_base(complete_base(base, len(optimizer.param_groups))))
        self._first_step = FirstStep(optimizer)
        self.evidence: Evidence | None = None
        """Losses and learning rates that led to the latest decision.

        None before the first decision, or if the latest decision was loaded from a checkpoint.
        """
        for warning in schedule.resolve(horizon).warnings():
            warnings.warn(warning, stacklevel=3)
        self._state, self.last_epoch = self.controller.init(), at
        if self._doubt is not None and self._holds_own_values():
            self._doubt = None  # a run of this schedule has reached this step
        self._go_to(self._state, at)

    def _prepare(self) -> None:
        """Initialize the attributes that a new or unpickled binder starts with."""
        self._slots = self._find_slots()
        self._attachment = Attachment.of(self.optimizer)
        self._writer = self._doubt = None
        self._written: Writer | None = None
        self._is_overtaken = self._has_stepped = self._has_warned = False

    def _find_slots(self) -> dict[str, tuple[Slot, ...]]:
        return {name: find_slots(name, self.optimizer) for name in self.schedule.hyperparameters}

    def _read_base(self, given: Base) -> Base:
        """Return ``given``, with missing initial hyperparameters read from the param groups."""
        groups, base = self.optimizer.param_groups, dict(given)
        slots = {"lr": find_slots("lr", self.optimizer), **self._slots}
        for name in slots.keys() - given.keys():
            base[name], doubt = self._attachment.read_initial(name, groups, slots[name])
            if name in self._slots:
                self._doubt = self._doubt or doubt
        return base

    def _build_controller(self, base: Base) -> Controller[Any]:
        return bind_to_groups(self.schedule, base, self._horizon, self.optimizer.param_groups)

    def _bind(self, base: Base) -> None:
        self.controller = self._build_controller(base)
        self._base = base
        self._base_lrs = BaseLRs(base["lr"])
        self._known_groups = KnownGroups(self.optimizer)
        for name, values in base.items():
            for group, value in zip(self.optimizer.param_groups, values, strict=True):
                group[f"initial_{name}"] = value

    def step(
        self, loss: Tensor | float | None = None, *, metric: Tensor | float | None = None
    ) -> None:
        """Advance the schedule, and set the optimizer's hyperparameters for its next step.

        Args:
            loss: loss of the optimizer step just taken, as a number or a scalar tensor. Only
                feedback schedules accept it. Pass the mean over all ranks, so that all ranks make
                the same decision.
            metric: new value of the metric, if any, as a number or a scalar tensor. Schedules that
                do not depend on a metric ignore the value.

        Raises:
            ValueError: the schedule needs a loss but none is passed, the loss is not a single
                number, or a loss is passed to a schedule that does not use it. The error is also
                raised if a param group was removed or moved, if the schedule has no values for an
                added group, or if the optimizer's state was loaded without the schedule's state.
        """
        writer = self._writer
        step = self.last_epoch + 1
        # Look up the groups at each step, because loading an optimizer's state replaces them.
        groups = self.optimizer.param_groups
        if (
            writer is not None
            and loss is None
            and writer.start <= step < writer.end
            and groups[-1] is writer.last_group
            and len(groups) == writer.num_groups
            and writer.write(groups, step)
        ):
            self.last_epoch = step
        else:
            self._step_slowly(loss, metric)

    def _step_slowly(self, loss: Tensor | float | None, metric: Tensor | float | None) -> None:
        """Advance the schedule without the fast path of `step`, for example on the first call."""
        self._prepare_use()
        if not self._has_stepped:
            check_not_chained()
        self._check_base()
        self._first_step.check(self._stack_level)
        self._include_added_groups()
        change, is_schedule = self._find_change(), self._is_overtaken
        if self.schedule.feedback is not None:
            self._step_with_feedback(loss, metric)
        elif loss is None:
            self.last_epoch += 1
            self.write()
        else:
            raise ValueError(
                f"For {self.schedule.type_name}, step() must be called without a loss or an epoch, "
                f"got {loss}. Omit the argument. To change the step, call load_state_dict() with a "
                "saved state."
            )
        self._has_stepped = True
        if change is not None:
            self._warn_of(change, is_schedule=is_schedule)

    def _check_base(self) -> None:
        if self._doubt is not None:
            raise ValueError(
                f"Cannot determine the schedule's initial values: {self._doubt}, and the current "
                "value may come from a schedule or from the script. Load the saved state of the "
                "schedule, or pass the initial values to `attach` as `base`. To multiply "
                "schedules, as PyTorch's ChainedScheduler does, use `schedules.ChainedScheduler`."
            )

    def _holds_own_values(self) -> bool:
        """Return whether the param groups still have the values that this schedule wrote."""
        groups = self.optimizer.param_groups
        return self.last_epoch >= 0 and all(
            slot.holds(group, value)
            for name, values in self._read_values().items()
            for slot, group, value in zip(self._slots[name], groups, values, strict=False)
        )

    def _find_change(self) -> Change | None:
        """Return a value that other code has changed and that this schedule will overwrite."""
        # Schedules that run one after the other are attached before the first of them steps.
        is_waiting = self._is_overtaken and not self._has_stepped
        if self._written is None or is_waiting or self._has_warned:
            return None
        change = self._written.find_change(self.optimizer.param_groups)
        # A script that sets `last_epoch` can also write the values of that step.
        is_open = isinstance(self.controller, OpenLoop)
        return None if change and is_open and self._holds_own_values() else change

    def _warn_of(self, change: Change, *, is_schedule: bool) -> None:
        group = self.optimizer.param_groups[change.group_index]
        if not change.slot.holds(group, change.value):
            self._has_warned = True
            new = change.slot.read(group)
            text = describe_change(change, new, self._slots, is_schedule=is_schedule)
            warnings.warn(text, stacklevel=self._stack_level)

    def note_other_writer(self) -> None:
        """Record that another schedule has set a hyperparameter that this schedule also sets."""
        self._is_overtaken, self._writer = True, None

    def _step_with_feedback(
        self, loss: Tensor | float | None, metric: Tensor | float | None
    ) -> None:
        self._check_position()
        uses_metric = self.schedule.feedback == "metric" and metric is not None
        received = self._take_loss(metric if uses_metric else loss)
        before = self.state
        self._state = self.controller.update(before, received)
        self._position = self.last_epoch = self.last_epoch + 1
        if not self._is_unchanged_since(before):
            self.write()
        decision = self.decision
        if decision is not None and self.just_decided:
            assert received is not None
            self.evidence = self.controller.evidence(before, received, self._state)
            probability = decision.probability
            confidence = "" if probability is None else f" (probability {probability:.3f})"
            name = self.schedule.type_name
            text = "%s at step %d: set the learning rate to %.4g, because %s%s"
            log.info(text, name, *decision[:3], confidence)

    def _is_unchanged_since(self, before: Any) -> bool:
        """Return whether all hyperparameters equal those of state ``before``; False if unknown."""
        del before
        return False

    def write(self) -> None:
        """Set the optimizer's hyperparameters for its next step."""
        groups = self._include_added_groups()
        self._is_overtaken = False
        if isinstance(self.controller, OpenLoop):
            if self.last_epoch < 0:
                raise ValueError(
                    "`last_epoch` must be at least -1 when step() is called, got "
                    f"{self.last_epoch - 1}. To restart the schedule, set `last_epoch` to -1."
                )
            curves = self.controller.curves
            written: Writer = RangeWriter(groups, self._slots, curves, self.last_epoch)
        else:
            written = ValueWriter(groups, self._slots, self.controller.values(self._state))
        self._writer = written if isinstance(written, RangeWriter) else None
        self._written = written
        self._attachment.record(self, groups, written.values)

    def _include_added_groups(self) -> Sequence[Group]:
        """Bind the schedule to newly added param groups, and return all param groups."""
        groups, known = self.optimizer.param_groups, len(self._base["lr"])
        if not self._known_groups.check(self.optimizer):
            self._written = None  # the values of a newly assigned optimizer are not a change
        if len(groups) > known:
            slots = self._find_slots()
            added = {
                name: tuple(slot.read(group) for slot, group in zip(each, groups, strict=True))
                for name, each in {"lr": find_slots("lr", self.optimizer), **slots}.items()
            }
            base = {name: values + added[name][known:] for name, values in self._base.items()}
            # A script can append the initial learning rate of an added group to `base_lrs`.
            appended = tuple(float(lr) for lr in self._base_lrs[known : len(groups)])
            base["lr"] = self._base["lr"] + appended + base["lr"][known + len(appended) :]
            try:
                self._bind(base)
            except ValueError as error:
                text = f"Param group {known} was added after the schedule was attached."
                raise ValueError(f"{text} {error}") from None
            self._slots = slots
        return groups

    def _go_to(self, state: Any, step: int, write: bool = True) -> None:
        self._state, self._position = state, step
        self.last_epoch, self._losses = step, ()
        # PyTorch's SequentialLR saves -1 as the step of a schedule that has not started.
        self._written = None
        if step >= 0 and write:
            self.write()
        self._writer = None  # so that the first step is checked

    @property
    def state(self) -> Any:
        """Current state of the schedule. It is replaced at each step, never modified in place."""
        return self.last_epoch if isinstance(self.controller, OpenLoop) else self._state

    @property
    def hyperparameters(self) -> Collection[str]:
        """Names of the hyperparameters that the schedule sets."""
        return self._slots.keys()

    @property
    def decision(self) -> Decision | None:
        """Latest decision of the feedback schedule; None before the first decision."""
        return self.controller.decision(self.state)

    @property
    def just_decided(self) -> bool:
        """Whether the feedback schedule made a decision in the latest call to `step`."""
        return self.decision is not None and self.decision.step == self.last_epoch

    def state_dict(self) -> dict[str, Any]:
        """Return a dict with the schedule's type, parameters, initial values, step and state.

        Raises:
            ValueError: a param group was removed, or the schedule has no values for an added group.
        """
        self._prepare_use()
        self._include_added_groups()
        state: dict[str, Any] = {
            **self.identity,
            "step": self.last_epoch,
            "base": {name: list(values) for name, values in self._base.items()},
            "is_written": self._holds_own_values(),
        }
        if isinstance(self.controller, FeedbackController):
            state["state"] = self.controller.to_json(self.state)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], *, override: bool = False) -> None:
        """Load a state returned by `state_dict`, and set the hyperparameters for the next step.

        Args:
            state_dict: saved state.
            override: whether to accept the state of a schedule with different parameters or initial
                hyperparameters. If true, this schedule keeps its own parameters and initial
                hyperparameters, and continues from the saved step.

        Raises:
            ValueError: the state is damaged, or does not match this schedule or the optimizer's
                param groups.
        """
        self._include_added_groups()
        has_feedback = self.schedule.feedback is not None
        if override:
            check_origin(state_dict, self.schedule.type_name if has_feedback else None)
        else:
            self.check_state_dict(state_dict)
        base = self._base if override else read_base(state_dict)
        state = read_state(state_dict, self.schedule, base, self._horizon)
        if not override:
            self._bind(base)
        self._doubt = None
        if state_dict["step"] > 0:
            self._first_step.cancel()
        # If another scheduler had set the values, loading the optimizer's state restores them.
        is_written = override or state_dict.get("is_written", True)
        self._go_to(state, state_dict["step"], write=is_written)

    def check_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Check that `load_state_dict` would accept a state, without loading it.

        Raises:
            ValueError: the state is damaged, or does not match this schedule or the optimizer's
                param groups.
        """
        self._include_added_groups()
        check_state(state_dict, self.identity, self._base, self._compared)
        read_state(state_dict, self.schedule, read_base(state_dict), self._horizon)

    @property
    def _compared(self) -> Collection[str]:
        """Names of the hyperparameters whose initial values must match those in a saved state."""
        return self._slots.keys()

    def __getstate__(self) -> dict[str, Any]:
        # Formulas are closures, which cannot be pickled. `__setstate__` rebuilds them.
        rebuilt = {"controller", "_writer", "_slots", "_first_step", "_attachment", "before_use"}
        rebuilt |= {"_written", "_known_groups"}
        return {name: value for name, value in vars(self).items() if name not in rebuilt}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._prepare()
        self._doubt = state["_doubt"]
        self._known_groups = KnownGroups(self.optimizer)
        self.controller = self._build_controller(self._base)
        self._first_step = FirstStep(None)
        values = self._read_values()
        self._attachment.record(self, self.optimizer.param_groups, lambda: values)
