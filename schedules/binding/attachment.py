"""Record the values that schedules write, to recognize values set by the training script."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler

from schedules.binding.writers import Change
from schedules.core.controller import Values
from schedules.param_groups import Group, Slot

__all__ = ["Attachment", "KnownGroups", "check_not_chained", "describe_change"]


class _Writer(Protocol):
    @property
    def hyperparameters(self) -> Collection[str]: ...
    def note_other_writer(self) -> None: ...


class Attachment:
    """The schedules that are attached to one optimizer, and the latest values that they wrote.

    This object exists as long as the optimizer does, even if a schedule is deleted. When another
    schedule is attached, this object determines whether an earlier schedule or the training script
    set the current learning rate.
    """

    def __init__(self) -> None:
        self._last_written: dict[str, Callable[[], Values]] = {}
        self._written: WeakKeyDictionary[Any, Callable[[], Values]] = WeakKeyDictionary()
        self._last_group: Group | None = None

    @classmethod
    def of(cls, optimizer: Optimizer) -> Attachment:
        """Return the `Attachment` of an optimizer; create one if there is none yet."""
        return _ATTACHMENTS.setdefault(optimizer, cls())

    def record(
        self, writer: _Writer, groups: Sequence[Group], values: Callable[[], Values]
    ) -> None:
        """Record that a schedule has written its hyperparameters to the param groups.

        Args:
            writer: the schedule.
            groups: param groups of the optimizer.
            values: function that returns the latest values that the schedule wrote. To let the
                schedule be garbage-collected, the function must not hold a reference to it.
        """
        self._last_group = groups[-1]
        self._last_written |= dict.fromkeys(writer.hyperparameters, values)
        self._written[writer] = values
        for other in self._written:
            if other is not writer and set(other.hyperparameters) & set(writer.hyperparameters):
                other.note_other_writer()

    def has_last_group(self, groups: Sequence[Group]) -> bool:
        """Return whether ``groups`` still has the last param group of the latest `record` call.

        The result is false if the param groups have been replaced, for example by the optimizer's
        `load_state_dict`.
        """
        return any(group is self._last_group for group in groups)

    def read_initial(
        self, name: str, groups: Sequence[Group], slots: Sequence[Slot]
    ) -> tuple[tuple[float, ...], str | None]:
        """Return the initial value of a hyperparameter in each param group.

        If the training script set the current value, the current value is the initial value.
        Otherwise, the initial value is read from the param group's key ``f"initial_{name}"``, which
        PyTorch's schedulers also use.

        Returns:
            The initial values, and the reason why they are uncertain (None if they are certain).
            They are uncertain if it is unknown whether a schedule or the training script set the
            current value, for example after loading the optimizer's state, or if a scheduler from
            another library has changed the value.
        """
        values, doubt = [], None
        is_known = name in self._last_written and self.has_last_group(groups)
        for index, (group, slot) in enumerate(zip(groups, slots, strict=True)):
            now = slot.read(group)
            initial = float(group.get(f"initial_{name}", now))
            if any(slot.holds(group, value) for value in (initial, *self._find(name, index))):
                pass  # a schedule wrote the value
            elif is_known:
                initial = now
            elif doubt is None:
                doubt = f"param group {index} has `{name}` {now:g} and `initial_{name}` {initial:g}"
            values.append(initial)
        return tuple(values), doubt

    def _find(self, name: str, index: int) -> Iterator[float]:
        """Yield the last value that each schedule wrote for hyperparameter ``name`` of a group."""
        last = [self._last_written[name]] if name in self._last_written else []
        for values in (*last, *self._written.values()):
            yield from values().get(name, ())[index : index + 1]


class KnownGroups:
    """The param groups that a schedule is bound to, in order.

    Args:
        optimizer: optimizer of the param groups.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._note(optimizer)

    def _note(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._dicts = list(optimizer.param_groups)
        self._lists = [
            group["params"] for group in self._dicts
        ]  # keeps their ids from being reused
        self._groups = [_identify(group) for group in self._dicts]

    def check(self, optimizer: Optimizer) -> bool:
        """Check that no param group was removed or moved. Groups may have been added at the end.

        Loading an optimizer's state replaces the dicts of all groups, but keeps their parameters.

        Returns:
            Whether ``optimizer`` is still the same object. A script can assign another optimizer to
            a scheduler.

        Raises:
            ValueError: a param group was removed or moved.
        """
        groups, known = optimizer.param_groups, self._groups
        is_same = optimizer is self._optimizer
        if is_same and len(groups) == len(known) and all(map(operator.is_, groups, self._dicts)):
            return True
        if len(groups) < len(known):
            raise ValueError(
                f"The optimizer had {len(known)} param groups when the schedule was attached, but "
                f"has {len(groups)} now. Attach the schedule again after removing param groups."
            )
        pairs = zip(known, map(_identify, groups), strict=False)
        moved = next((at for at, (old, new) in enumerate(pairs) if not old & new), None)
        if moved is not None and set().union(*known) & set().union(*map(_identify, groups)):
            raise ValueError(
                f"Param group {moved} of the optimizer is not the group that the schedule was "
                "attached to, so param groups were removed or reordered. Attach the schedule again "
                "after removing or reordering param groups."
            )
        self._note(optimizer)
        return is_same


def _identify(group: Group) -> set[int]:
    """Return the ids of a param group's dict, of its parameter list and of its first parameter.

    Two groups with one of these in common are the same group.
    """
    params = group["params"]
    return {id(group), id(params), *map(id, params[:1])}


def check_not_chained() -> None:
    """Raise an error if called from PyTorch's ``ChainedScheduler`` with more than one scheduler.

    PyTorch's schedulers multiply the current learning rate by a factor, so several of them can be
    applied one after another. Schedules of this package replace the current learning rate, so the
    factors of the other schedulers would be lost. A schedule has no reference to the
    ``ChainedScheduler`` that contains it, so this function searches the call stack.

    Raises:
        ValueError: a ``ChainedScheduler`` with several schedulers is in the call stack.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is ChainedScheduler.step.__code__:
            chain = frame.f_locals["self"]
            if len(chain._schedulers) > 1:  # noqa: SLF001  # it has no public name
                raise ValueError(
                    "PyTorch's ChainedScheduler cannot combine this schedule with others, because "
                    "the schedule replaces the current learning rate instead of multiplying it. "
                    "Use `schedules.ChainedScheduler`, as in "
                    "`attach(schedules.ChainedScheduler(schedulers=[…]), optimizer)`."
                )
        frame = frame.f_back


def describe_change(
    change: Change, new: float, hyperparameters: Collection[str], *, is_schedule: bool
) -> str:
    """Return a warning that a schedule has overwritten a value set by other code.

    Args:
        change: value that the schedule has overwritten.
        new: value that the schedule has written.
        hyperparameters: names of the hyperparameters that the schedule sets.
        is_schedule: whether the other code is a schedule of this package.
    """
    fix = (
        "To multiply schedules, use `schedules.ChainedScheduler`. To run one after the other, use "
        "`schedules.SequentialLR`."
    )
    if is_schedule:
        names = " and ".join(hyperparameters)
        return (
            f"Two schedules set {names} of the same optimizer, and each overwrites the values of "
            f"the other. {fix} To set a different schedule for each param group, pass a dict to "
            "`attach`."
        )
    return (
        f"Other code set `{change.slot.label}` of param group {change.group_index} to "
        f"{change.value:g}, but the schedule replaced it with {new:g}. A schedule computes its "
        "values from the initial values, not from the current ones. To start from a new value, "
        f"attach a schedule after setting it. {fix} To reduce the learning rate when a metric "
        "stops improving, use only `schedules.ReduceLROnPlateau`, which has `warmup_steps`."
    )


_ATTACHMENTS: WeakKeyDictionary[Optimizer, Attachment] = WeakKeyDictionary()
