"""What the schedules of an optimizer wrote last, to tell their values from the script's own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakSet

from torch.optim import Optimizer

from schedules.core.controller import Values
from schedules.param_groups import Group, Slot

__all__ = ["Attachment"]


class _Writer(Protocol):
    @property
    def hyperparameters(self) -> Collection[str]: ...
    def note_other_writer(self) -> None: ...


class Attachment:
    """The schedules that are attached to one optimizer, and the values that they wrote last.

    It outlives the schedules. When a second schedule is attached, it shows whether a learning rate
    comes from the first schedule or from the script.
    """

    def __init__(self) -> None:
        self._written: dict[str, Callable[[], Values]] = {}
        self._writers: WeakSet[Any] = WeakSet()
        self._last_group: Group | None = None

    @classmethod
    def of(cls, optimizer: Optimizer) -> Attachment:
        """Return the attachment of an optimizer; create it if there is none yet."""
        return _ATTACHMENTS.setdefault(optimizer, cls())

    def record(
        self, writer: _Writer, groups: Sequence[Group], values: Callable[[], Values]
    ) -> None:
        """Note that a schedule has set its hyperparameters.

        Args:
            writer: the schedule.
            groups: param groups of the optimizer.
            values: function that returns the values that the schedule wrote last.
        """
        self._last_group = groups[-1]
        self._written |= dict.fromkeys(writer.hyperparameters, values)
        self._writers.add(writer)
        for other in self._writers:
            if other is not writer and set(other.hyperparameters) & set(writer.hyperparameters):
                other.note_other_writer()

    def read_initial(
        self, name: str, groups: Sequence[Group], slots: Sequence[Slot]
    ) -> tuple[tuple[float, ...], str | None]:
        """Return the initial value of a hyperparameter in each param group.

        It is the current value, unless a schedule wrote that. Like PyTorch's schedulers, a schedule
        stores the initial value in the group, under the key ``initial_…``.

        Returns:
            The values, and a text about the first group for which it is not known whether a
            schedule wrote the current value: the group was loaded from a state, or another
            library's scheduler is attached.
        """
        values, doubt = [], None
        # Loading the state of an optimizer replaces its groups by those of another run.
        is_known = name in self._written and groups[-1] is self._last_group
        written = self._written[name]()[name] if is_known else ()
        for index, (group, slot) in enumerate(zip(groups, slots, strict=True)):
            now = slot.read(group)
            initial = float(group.get(f"initial_{name}", now))
            if index < len(written):
                initial = initial if slot.holds(group, written[index]) else now
            elif doubt is None and not slot.holds(group, initial):
                doubt = f"param group {index} has `{name}` {now:g} and `initial_{name}` {initial:g}"
            values.append(initial)
        return tuple(values), doubt


_ATTACHMENTS: WeakKeyDictionary[Optimizer, Attachment] = WeakKeyDictionary()
