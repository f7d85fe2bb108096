"""The events that a run passes to its monitors."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Event"]


class Event(NamedTuple):
    """A metric's name in DeepSpeed, its value, and the number of training samples so far."""

    name: str
    value: float
    samples: int
