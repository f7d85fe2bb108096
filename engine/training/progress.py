"""Count the steps of a run, and report the metrics of each step to the log and the monitors."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from engine.config import Config
from engine.training.monitors import Event, Monitor

__all__ = ["Counters", "ProgressReporter", "StepRecord", "StepRecorder"]

log = logging.getLogger("onecycle")


@dataclass
class Counters:
    """Step counters of a run, which are saved in its checkpoints."""

    micro_steps: int = 0
    global_steps: int = 0
    """Number of completed batches, including those of skipped steps."""
    global_samples: int = 0
    """Number of samples in the completed batches, over all ranks."""
    skipped_steps: int = 0
    applied: bool = False
    """Whether the last call of `Engine.step` applied an optimizer step."""

    @property
    def applied_steps(self) -> int:
        """The number of applied optimizer steps."""
        return self.global_steps - self.skipped_steps


@dataclass(frozen=True)
class StepRecord:
    """Metrics of one optimizer step, for the log and the monitors."""

    step: int
    """Zero-based index of the last applied step; a skipped step does not advance it."""
    global_steps: int
    global_samples: int
    is_applied: bool
    skipped_steps: int
    """Number of skipped steps so far."""
    lr: Sequence[float]
    """Learning rate of each param group."""
    momentum: Sequence[float] | None
    """Momentum (first beta for Adam) of each param group; None if there is none."""
    weight_decay: float | None
    """Weight decay of the first param group."""
    loss: float | None
    """Mean loss over micro-batches and ranks; None if it is unknown or was not needed."""
    grad_norm: float | None
    loss_scale: float | None
    """Loss scale; None without fp16."""
    batch_size: int


class StepRecorder(Protocol):
    """Records the learning rate and the loss of each step, for an LR range test."""

    def record(self, lr: float, momentum: float | None, loss: float, *, applied: bool) -> None:
        """Record the learning rate, momentum and loss of a step, and whether it was applied."""
        ...

    def stop_if_over(self) -> None:
        """Raise `SystemExit` if the LR range test is over."""
        ...


class ProgressReporter:
    """Writes a run's log lines and sends its metrics to the monitors.

    Args:
        config: config with ``steps_per_print`` and the sections of the monitors.
        monitors: monitors to write to; empty on all ranks except rank 0.
        average: function that averages a number over all ranks.
        writes_log: whether this rank writes log lines.
    """

    def __init__(
        self,
        config: Config,
        monitors: Sequence[Monitor],
        average: Callable[[float], float],
        *,
        writes_log: bool,
    ) -> None:
        self.is_monitored = any(section["enabled"] for section in config.monitors.values())
        self._every = config.steps_per_print
        self._monitors = tuple(monitors)
        self._average = average
        self._writes_log = writes_log
        self._clock = time.perf_counter()
        # The sum and number of losses since the last log line.
        self._sum: Tensor | float = 0.0
        self._count = 0

    def add(self, loss: Tensor) -> None:
        """Include the loss of a micro-batch in the mean loss of the next log line."""
        if self._every:
            self._sum = self._sum + loss.detach().float()
            self._count += 1

    def needs_record(self, counters: Counters) -> bool:
        """Return whether the last step must be passed to `report`, for the log or for a monitor."""
        return self.is_monitored or self._is_line_due(counters.global_steps, counters.applied)

    def report(self, record: StepRecord) -> None:
        """Report a step to the log and the monitors. Every rank must call this method."""
        if self.is_monitored:
            self._write_events(record)
        if self._is_line_due(record.global_steps, record.is_applied):
            self._write_line(record)

    def report_metrics(self, metrics: Mapping[str, float], counters: Counters) -> None:
        """Report metrics such as a validation loss, which are already averaged over the ranks."""
        events = [Event(name, value, counters.global_samples) for name, value in metrics.items()]
        for monitor in self._monitors:
            monitor.write_events(events)
        if self._writes_log:
            shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            log.info("step %d: %s", counters.applied_steps, shown)

    def _is_line_due(self, global_steps: int, is_applied: bool) -> bool:
        if not self._every:
            return False
        return is_applied and global_steps % self._every == 0

    def _write_events(self, record: StepRecord) -> None:
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        values = {
            "lr": record.lr[0],
            "momentum": record.momentum[0] if record.momentum else None,
            "weight_decay": record.weight_decay,
            "train_loss": record.loss,
            "grad_norm": record.grad_norm,
            "loss_scale": record.loss_scale,
            "samples_per_second": record.batch_size / max(seconds, 1e-9),
            "skipped_steps": record.skipped_steps,
            "step": record.step,
        }
        samples = record.global_samples
        events = [
            Event(f"Train/Samples/{name}", float(value), samples)
            for name, value in values.items()
            if value is not None
        ]
        for monitor in self._monitors:
            monitor.write_events(events)

    def _write_line(self, record: StepRecord) -> None:
        # No loss was added if the script calls `loss.backward()` itself.
        loss = self._average(float(self._sum) / self._count) if self._count else None
        self._sum, self._count = 0.0, 0
        if not self._writes_log:
            return
        shown = [] if loss is None else [f"loss {loss:.4f}"]
        for name, values in (("lr", record.lr), ("momentum", record.momentum)):
            if values:
                distinct = [format(value, ".4g") for value in dict.fromkeys(values)]
                shown.append(f"{name} {' '.join(distinct)}")
        log.info("step %d: %s", record.step, ", ".join(shown))
