"""Record the values that schedules write, to recognize values set by the training script."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler

from schedules.core.controller import Values
from schedules.param_groups import Group, Slot

__all__ = ["Attachment", "check_not_chained", "describe_other_writer"]


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


def describe_other_writer(hyperparameters: Collection[str], *, is_schedule: bool) -> str:
    """Return a warning that a schedule overwrites values set by other code or another schedule."""
    names = " and ".join(hyperparameters)
    text = f"Other code has changed {names}, but the schedule overwrites the new values."
    if is_schedule:
        text = f"Two schedules set {names} of the same optimizer, and each overwrites the values "
        text += "of the other."
    return (
        f"{text} To multiply schedules, use `schedules.ChainedScheduler`. To run one after the "
        "other, use `schedules.SequentialLR`. To set a different schedule for each param group, "
        "pass a dict to `attach`."
    )


_ATTACHMENTS: WeakKeyDictionary[Optimizer, Attachment] = WeakKeyDictionary()
