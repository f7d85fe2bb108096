"""`History`, an immutable sequence of losses that can share memory with a longer history."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schedules.core.saved_state import restore

__all__ = ["History"]


class History:
    """Immutable sequence of losses.

    `with_loss` returns a longer history. If possible, both histories share one list to avoid a
    copy.

    >>> first = History().with_loss(1.0)
    >>> second, third = first.with_loss(2.0), first.with_loss(3.0)
    >>> list(first), list(second), list(third)
    ([1.0], [1.0, 2.0], [1.0, 3.0])
    """

    __slots__ = ("_count", "_shared")

    def __init__(self) -> None:
        self._shared: list[float] = []
        self._count = 0

    @classmethod
    def from_losses(cls, losses: Iterable[float]) -> History:
        """Return a history that contains a copy of ``losses``."""
        history = cls()
        history._shared = list(losses)
        history._count = len(history._shared)
        return history

    @classmethod
    def restore(cls, value: Any, name: str) -> History:
        """Build a history from saved losses.

        Args:
            value: saved list of losses.
            name: name of the list in error messages.

        Raises:
            ValueError: ``value`` is not a list of numbers.
        """
        return cls.from_losses(restore(tuple[float, ...], value, name))

    def with_loss(self, loss: float) -> History:
        """Return a new history with ``loss`` added at the end."""
        if self._count != len(self._shared):
            # A longer history already uses the shared list.
            return History.from_losses([*self, loss])
        self._shared.append(loss)
        longer = History()
        longer._shared, longer._count = self._shared, self._count + 1
        return longer

    def array(self, dtype: Any) -> NDArray[Any]:
        """Return the losses as a NumPy array of data type ``dtype``."""
        with np.errstate(over="ignore"):  # Losses too large for the dtype become infinite.
            return np.fromiter(self, dtype, self._count)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[float]:
        return iter(self._shared[: self._count])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, History) and list(self) == list(other)

    def __hash__(self) -> int:
        return hash(tuple(self))
