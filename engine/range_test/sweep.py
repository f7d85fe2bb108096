"""The settings for an LR range test."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from engine.distributed.environment import LR_TEST

__all__ = ["Sweep", "read_initial_lrs", "read_sweep", "spread_over_groups"]

Shape = Literal["exponential", "linear", "staircase"]

_STAIRS = 20
_BOUNDS = {"cycle_min_lr", "cycle_max_lr", "lr_range_test_min_lr"}


@dataclass(frozen=True)
class Sweep:
    """The settings for an LR range test.

    Args:
        min_lr: learning rate of the first step.
        max_lr: learning rate of the last step.
        steps: number of steps.
        shape: shape of the increase: "exponential", "linear", or "staircase" (at most 20 stairs of
            equal height).
        momentum: momentum of the first step and of the last step; it changes linearly in between.
            If None, the momentum stays constant.
        block: scheduler block to use; if None, a block is built from the other arguments.
        divergence_factor: maximum ratio of the smoothed loss to its previous minimum; a larger
            ratio ends the sweep.
        directory: directory to write the file ``record.jsonl`` to; None to write no file.
        config: path of the config to use instead of the script's config.
        seed_offset: number to add to the config's seed and to torch's initial seed, so that
            repeated sweeps differ.
        engine: number of the engine to test, counted from 1 in the order in which the script
            creates its engines. If None, the script must create only one engine.

    Raises:
        ValueError: if `min_lr` is not positive, `max_lr` is not finite or not above `min_lr`,
            `steps` is below 2, or `momentum` is set for a staircase.
    """

    min_lr: float = 1e-6
    max_lr: float = 10.0
    steps: int = 250
    shape: Shape = "exponential"
    momentum: tuple[float, float] | None = None
    block: Mapping[str, Any] | None = None
    divergence_factor: float = 4.0
    directory: str | None = None
    config: str | None = None
    seed_offset: int = 0
    engine: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.min_lr < self.max_lr < math.inf:
            raise ValueError(
                "`min_lr` and `max_lr` must be finite with 0 < `min_lr` < `max_lr`, got "
                f"{self.min_lr:g} and {self.max_lr:g}. Use values such as 1e-6 and 10."
            )
        if self.steps < 2:
            raise ValueError(
                f"`steps` must be >= 2, got {self.steps}. Use more steps, for example 250."
            )
        if self.momentum and self.shape == "staircase":
            raise ValueError(
                "`shape` must be `exponential` or `linear` if `momentum` is set, got `staircase`. "
                "Change `shape`, or omit `momentum`."
            )

    @property
    def scheduler(self) -> dict[str, Any]:
        """The scheduler block that performs the sweep."""
        if self.block is not None:
            return dict(self.block)
        duration = self.steps - 1
        if self.shape == "exponential" or self.momentum:
            shape = "exponential" if self.shape == "exponential" else "linear"
            ramp = {"from": self.min_lr, "to": self.max_lr, "duration": duration, "shape": shape}
            params: dict[str, Any] = {"lr": [ramp]}
            if self.momentum:
                first, last = self.momentum
                params["momentum"] = [{"from": first, "to": last, "duration": duration}]
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

    def to_environment(self) -> dict[str, str]:
        """Return a dict with the environment variable that passes this sweep to `initialize`."""
        return {LR_TEST: json.dumps(asdict(self))}


def read_initial_lrs(groups: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the initial learning rate of each param group.

    Raises:
        ValueError: if the first group has an initial learning rate of 0, and another does not.

    >>> read_initial_lrs([{"lr": 0.1}, {"lr": 0.0, "initial_lr": 0.05}])
    [0.1, 0.05]
    """
    lrs = [float(group.get("initial_lr", group["lr"])) for group in groups]
    if lrs[0] == 0 and any(lrs):
        raise ValueError(
            "The learning rate of the first param group must be > 0, got 0. Put a group with a "
            "learning rate > 0 first, because the LR range test scales the learning rates of all "
            "groups in proportion to that of the first group."
        )
    return lrs


def spread_over_groups(block: Mapping[str, Any], lrs: Sequence[float]) -> dict[str, Any]:
    """Extend a scheduler block to all param groups, with learning rates proportional to ``lrs``.

    Args:
        block: the scheduler block of a `Sweep`, or a OneCycle block. Its learning rates apply to
            the first param group.
        lrs: initial learning rate of each param group.

    >>> block = {"type": "LRRangeTest", "params": {"lr_range_test_min_lr": 0.5}}
    >>> spread_over_groups(block, [0.1, 0.2])["params"]
    {'lr_range_test_min_lr': [0.5, 1.0]}
    """
    params = dict(block["params"])
    if len(set(lrs)) == 1:
        return dict(block)
    if block["type"] != "Phases":
        for name in _BOUNDS & params.keys():
            params[name] = [params[name] * (lr / lrs[0]) for lr in lrs]
        return {**block, "params": params}
    ramps = [
        {name: value / lrs[0] if name in ("from", "to") else value for name, value in ramp.items()}
        for ramp in params.pop("lr")
    ]
    sweep = {"type": "Phases", "params": {"lr": ramps, "relative": True}}
    others = [{"type": "Phases", "params": params}] if params else []
    return {"type": "Combined", "params": {"schedulers": [sweep, *others]}} if others else sweep


def read_sweep() -> Sweep | None:
    """Return the sweep that `onecycle lr-test` passed to this process; None if there is none."""
    text = os.environ.get(LR_TEST)
    return Sweep(**json.loads(text)) if text else None
