"""What a range test does to a run: which learning rates it sweeps, what it notes, when it ends."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from engine.distributed.environment import LR_TEST

__all__ = ["RECORD", "Recorder", "Run", "Sweep", "SweepOver", "sweep_of_environment"]

RECORD = "record.jsonl"
"""What a run notes: a line for what it is, a line an update, a line for how it ended."""

Shape = Literal["exponential", "linear", "staircase"]

_STAIRS = 20
_PATIENCE = 3  # losses in a row that are not finite
_SKIPS = 50  # updates in a row that are skipped: no loss scale is so far off
_LAG = 0.9  # of the mean that divergence is judged by: about ten updates
_STOPS = 3  # times a script may catch the stop


class SweepOver(SystemExit):
    """Ends the script of a range test, with status 0: all is noted."""


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


@dataclass
class Run:
    """What one run of a sweep noted."""

    lrs: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    momenta: list[float | None] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    """Backend, ranks, precision and batch, as the engine has them."""
    end: str = ""
    """Why it ended: "divergence", "steps", or nothing if the script ended by itself."""

    @property
    def curve(self) -> tuple[list[float], list[float]]:
        """Each learning rate with the loss that came of it, which is that of the next update.

        >>> Run(lrs=[0.1, 0.2, 0.4], losses=[2.3, 2.0, 1.5]).curve
        ([0.1, 0.2], [2.0, 1.5])
        """
        return self.lrs[:-1], self.losses[1:]

    @classmethod
    def read(cls, path: Path) -> Run:
        """Return what a record holds; a last line that was cut off is left out."""
        run = cls()
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if "lr" in entry:
                run.lrs.append(entry["lr"])
                run.losses.append(math.nan if entry["loss"] is None else entry["loss"])
                run.momenta.append(entry["momentum"])
            elif "end" in entry:
                run.end = entry["end"]
            else:
                run.facts = entry
        return run


class Recorder:
    """Notes the learning rate and the loss of every update, and says when the sweep is over.

    Every rank has one, and all come to the same verdict, since the loss is the mean over the ranks.

    Args:
        steps: updates of the sweep; None: no end but the script's.
        divergence: see `Sweep`.
        path: of the record; None on all ranks but the first, and where nothing is to be written.
        facts: what the record begins with.
    """

    def __init__(
        self,
        steps: int | None,
        divergence: float,
        path: Path | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.run = Run(facts=dict(facts or {}))
        self._steps = steps
        self._divergence = divergence
        self._path = path
        self._mean = self._weight = 0.0
        self._lowest = math.inf
        self._broken = self._skips = self._stops = 0
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            self._write(self.run.facts)

    def note(self, lr: float, momentum: float | None, loss: float, *, applied: bool) -> None:
        """Take an update: what it used, the mean loss over its batch, whether it was applied."""
        if self.run.end:
            return
        run = self.run
        self._skips = 0 if applied else self._skips + 1
        finite = math.isfinite(loss)
        if applied or not finite:  # a loss scale that comes down tells nothing of the sweep
            run.lrs.append(lr)
            run.losses.append(loss)
            run.momenta.append(momentum)
            shown = {"lr": lr, "loss": loss if finite else None, "momentum": momentum}
            self._write(shown)
        if self._diverged(loss):
            run.end = "divergence"
        elif self._steps is not None and len(run.lrs) >= self._steps:
            run.end = "steps"
        if run.end:
            self._write({"end": run.end})

    def _diverged(self, loss: float) -> bool:
        if not math.isfinite(loss):
            self._broken += 1
            return self._broken >= _PATIENCE
        self._broken = 0
        self._mean = _LAG * self._mean + (1 - _LAG) * loss
        self._weight = _LAG * self._weight + (1 - _LAG)
        smoothed = self._mean / self._weight
        if len(self.run.losses) > 5:
            self._lowest = min(self._lowest, smoothed)
        rise = (self._divergence - 1) * abs(self._lowest)
        return smoothed > self._lowest + rise or self._skips >= _SKIPS

    def _write(self, entry: Mapping[str, Any]) -> None:
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def stop_if_over(self) -> None:
        """End the script once the sweep is over; one that goes on all the same is cut off.

        Raises:
            SweepOver: it is.
        """
        if not self.run.end:
            return
        self._stops += 1
        if self._stops > _STOPS:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        raise SweepOver(0)
