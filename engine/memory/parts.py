"""Define types for the sizes of parameters and model states in a memory estimate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

__all__ = ["MOMENTS", "Device", "MemoryEstimate", "ParameterSize", "Part"]

Device = Literal["GPU", "CPU", "NVMe"]

MOMENTS = ("forward", "backward", "step")
"""The points in a training step at which memory use can peak.

They are the end of the forward pass of the final micro-batch, the end of its backward pass, and
the optimizer step.
"""


@dataclass(frozen=True)
class ParameterSize:
    """The size of one parameter of a model, or of several parameters treated as one.

    Args:
        shape: shape of the tensor.
        itemsize: bytes per element in the user's model, before the backend changes the dtype.
        is_trained: whether the optimizer trains the parameter.
        in_block: whether the parameter belongs to a block of the model that FSDP2 gathers
            separately, such as a layer of a transformer.

    >>> ParameterSize((3, 4)).count, ParameterSize((3, 4)).count_shard(2)
    (12, 8)
    """

    shape: tuple[int, ...]
    itemsize: int = 4
    is_trained: bool = True
    in_block: bool = True

    @property
    def count(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def count_shard(self, ranks: int) -> int:
        """Return the number of elements, including padding, in one rank's shard of the parameter.

        FSDP2 shards the parameter across ``ranks`` ranks.
        """
        if not self.shape:
            return 1
        return math.ceil(self.shape[0] / ranks) * math.prod(self.shape[1:])


class Part(NamedTuple):
    """A part of the model states, such as the gradients.

    The fields ``forward``, ``backward`` and ``step`` are the part's sizes in bytes at the
    points in `MOMENTS`.
    """

    name: str
    device: Device
    forward: int
    backward: int
    step: int


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimate of the memory that a run's model states need on one rank."""

    parts: Sequence[Part]

    @property
    def devices(self) -> tuple[Device, ...]:
        """The types of the devices that store model states, such as ``"GPU"``."""
        return tuple(dict.fromkeys(part.device for part in self.parts))

    def total(self, device: Device) -> tuple[int, int, int]:
        """Return the size in bytes of the model states on a device, at each point in `MOMENTS`."""
        parts = [part for part in self.parts if part.device == device]
        return (
            sum(part.forward for part in parts),
            sum(part.backward for part in parts),
            sum(part.step for part in parts),
        )

    def peak(self, device: Device) -> int:
        """Return the peak size in bytes of the model states on a device."""
        return max(self.total(device))
