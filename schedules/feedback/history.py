"""Losses so far, as a value: adding one leaves the older history as it was, without a copy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["History"]


class History:
    """An immutable sequence of numbers; histories that grow out of one another share a list.

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
    def of(cls, losses: Iterable[float]) -> History:
        """Return the history of some losses."""
        made = cls()
        made._shared = list(losses)
        made._count = len(made._shared)
        return made

    def with_loss(self, loss: float) -> History:
        """Return the history with one more."""
        if self._count != len(self._shared):
            return History.of([*self, loss])  # another one has grown out of this already
        self._shared.append(loss)
        grown = History()
        grown._shared, grown._count = self._shared, self._count + 1
        return grown

    def array(self, dtype: Any) -> NDArray[Any]:
        """Return all of it as an array."""
        with np.errstate(over="ignore"):  # too large for it is infinite in it
            return np.fromiter(self, dtype, self._count)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[float]:
        return iter(self._shared[: self._count])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, History) and list(self) == list(other)

    def __hash__(self) -> int:
        return hash(tuple(self))
