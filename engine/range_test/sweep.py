"""The learning rates that an LR range test sweeps."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from engine.distributed.environment import LR_TEST

__all__ = ["Sweep", "sweep_of_environment"]

Shape = Literal["exponential", "linear", "staircase"]

_STAIRS = 20


@dataclass(frozen=True)
class Sweep:
    """Learning rates from small to too large, and where to note what they do.

    Args:
        min_lr: of the first update.
        max_lr: of the last.
        steps: updates.
        shape: "exponential" (a factor an update), "linear", or "staircase" (in 20 equal stairs).
        momentum: from what it falls to what, while the learning rate grows; None: it stays.
        block: a scheduler block to sweep by in place of all that.
        divergence: the smoothed loss ends the sweep when it is this many times the lowest.
        folder: for the record.
        config: a config in place of the script's own.
        seed_offset: added to the seed of the config.

    Raises:
        ValueError: the learning rates do not rise from above 0, or there are too few updates.
    """

    min_lr: float = 1e-6
    max_lr: float = 10.0
    steps: int = 250
    shape: Shape = "exponential"
    momentum: tuple[float, float] | None = None
    block: Mapping[str, Any] | None = None
    divergence: float = 4.0
    folder: str | None = None
    config: str | None = None
    seed_offset: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.min_lr < self.max_lr < math.inf:
            raise ValueError(
                "a range test must go from a learning rate above 0 to a larger one, but goes from "
                f"{self.min_lr:g} to {self.max_lr:g}."
            )
        if self.steps < 2:
            raise ValueError(f"a range test must have at least 2 updates, but has {self.steps}.")
        if self.momentum and self.shape == "staircase":
            raise ValueError(
                "a range test with momentum must be exponential or linear, but is a staircase."
            )

    @property
    def scheduler(self) -> dict[str, Any]:
        """The scheduler block that sweeps."""
        if self.block is not None:
            return dict(self.block)
        duration = self.steps - 1
        if self.shape == "exponential" or self.momentum:
            shape = "exponential" if self.shape == "exponential" else "linear"
            ramp = {"from": self.min_lr, "to": self.max_lr, "duration": duration, "shape": shape}
            params: dict[str, Any] = {"lr": [ramp]}
            if self.momentum:
                begin, end = self.momentum
                params["momentum"] = [{"from": begin, "to": end, "duration": duration}]
            return {"type": "Phases", "params": params}
        stairs = self.shape == "staircase"
        size = -(-self.steps // _STAIRS) if stairs else duration
        params = {
            "lr_range_test_min_lr": self.min_lr,
            "lr_range_test_step_size": size,
            "lr_range_test_step_rate": (self.max_lr / self.min_lr - 1) / (duration // size),
            "lr_range_test_staircase": stairs,
        }
        return {"type": "LRRangeTest", "params": params}

    def environment(self) -> dict[str, str]:
        """Return what tells `initialize` of this test."""
        return {LR_TEST: json.dumps(asdict(self))}


def sweep_of_environment() -> Sweep | None:
    """Return the test that is on, if this process is a script under one."""
    text = os.environ.get(LR_TEST)
    return Sweep(**json.loads(text)) if text else None
