"""Record the learning rate and loss of each step of an LR range test, and decide when to stop."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["RECORD", "Recorder", "Run", "SweepOver"]

RECORD = "record.jsonl"
"""Name of the record file.

The first line contains settings of the engine and the sweep. One line per step follows. If the
recorder stops the run, the last line contains the reason.
"""

_PATIENCE = 3  # consecutive losses that are not finite
_SKIPS = 50  # consecutive skipped steps: more than any loss scale needs to adapt
_LAG = 0.9  # decay of the moving average of the loss: about ten steps
_STOPS = 3  # times that a script may catch `SweepOver`
_MAX_POINTS = 20_000  # recorded steps of a range test without a step limit


class SweepOver(SystemExit):
    """Exception that ends the script with exit status 0 when the range test is complete."""


@dataclass
class Run:
    """The recorded steps of an LR sweep, or of a short 1Cycle run that refines a sweep's result."""

    lrs: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    momenta: list[float | None] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    """Settings of the engine and the sweep, such as the backend, world size and precision."""
    end: str = ""
    """Why the recorder stopped: "divergence" or "steps" (all steps recorded); "" if it did not."""

    @property
    def curve(self) -> tuple[list[float], list[float]]:
        """The learning rates of all recorded steps but the last, and all losses but the first.

        A step computes the loss before it updates the parameters, so its learning rate first
        affects the loss of the next step.

        >>> Run(lrs=[0.1, 0.2, 0.4], losses=[2.3, 2.0, 1.5]).curve
        ([0.1, 0.2], [2.0, 1.5])
        """
        return self.lrs[:-1], self.losses[1:]

    def thin(self) -> None:
        """Remove every second recorded step."""
        for column in (self.lrs, self.losses, self.momenta):
            del column[1::2]

    @classmethod
    def read(cls, path: Path) -> Run:
        """Read a run from a record file. An incomplete last line is ignored."""
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
    """Recorder that stores the learning rate and loss of each step, and decides when to stop.

    Every rank has a recorder. All ranks end the sweep at the same step, because the loss is
    averaged over ranks.

    Args:
        steps: number of steps in the sweep; None for no limit. In that case, at most 20,000
            recorded steps are kept in memory: whenever there are more, every second recorded step
            is removed, and the interval between recorded steps doubles.
        divergence: maximum ratio of the smoothed loss to its previous minimum; a larger ratio ends
            the sweep.
        path: path of the record file; None on ranks other than 0.
        facts: settings of the engine and the sweep, written to the first line of the file.
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
        self._nonfinite = self._skips = self._stops = 0
        self._count = 0
        self._stride = 1  # the recorder records every n-th step
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            self._write(self.run.facts)

    def record(self, lr: float, momentum: float | None, loss: float, *, applied: bool) -> None:
        """Record a step. Mark the run as over if all steps are recorded or the loss has diverged.

        Args:
            lr: learning rate of the step.
            momentum: momentum of the step; None if the optimizer has no momentum.
            loss: mean loss over the batch and all ranks.
            applied: whether the optimizer step was applied. A skipped step is recorded only if its
                loss is not finite.
        """
        if self.run.end:
            return
        run = self.run
        self._skips = 0 if applied else self._skips + 1
        finite = math.isfinite(loss)
        if applied or not finite:  # ignore steps skipped only because of the loss scale
            self._add(lr, momentum, loss)
            shown = {"lr": lr, "loss": loss if finite else None, "momentum": momentum}
            self._write(shown)
        if self._has_diverged(loss):
            run.end = "divergence"
        elif self._steps is not None and len(run.lrs) >= self._steps:
            run.end = "steps"
        if run.end:
            self._write({"end": run.end})

    def _add(self, lr: float, momentum: float | None, loss: float) -> None:
        run = self.run
        if self._steps is None and len(run.lrs) >= _MAX_POINTS:
            run.thin()
            self._stride *= 2
        if self._count % self._stride == 0:
            run.lrs.append(lr)
            run.losses.append(loss)
            run.momenta.append(momentum)
        self._count += 1

    def _has_diverged(self, loss: float) -> bool:
        if not math.isfinite(loss):
            self._nonfinite += 1
            return self._nonfinite >= _PATIENCE
        self._nonfinite = 0
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
        """Raise `SweepOver` to end the script if the sweep is over.

        If the script has caught the exception three times, end the process with `os._exit` instead.

        Raises:
            SweepOver: if the sweep is over.
        """
        if not self.run.end:
            return
        self._stops += 1
        if self._stops > _STOPS:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        raise SweepOver(0)
