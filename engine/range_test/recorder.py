"""The record of an LR range test: each step's learning rate and loss, and when the test is over."""

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
"""Name of the record: a line of facts about the run, a line per step, a line for how it ended."""

_PATIENCE = 3  # losses in a row that are not finite
_SKIPS = 50  # updates in a row that are skipped: no loss scale is so far off
_LAG = 0.9  # of the mean that divergence is judged by: about ten updates
_STOPS = 3  # times a script may catch the stop


class SweepOver(SystemExit):
    """Ends the script of a range test, with status 0: all is noted."""


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
