"""Count the steps of a run, and report the metrics of each step to the log and the monitors."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from engine.config import Config
from engine.display.progress_bar import ProgressBar
from engine.training.events import Event
from engine.training.monitors import Monitors
from engine.training.pass_timer import PassTimer
from schedules.core.saved_state import OPTIONAL, Count

__all__ = ["Counters", "ProgressReporter", "StepRecord", "StepRecorder"]

log = logging.getLogger("onecycle")

_SUMMED_AT_ONCE = 100  # one sum of many losses costs less than many sums


@dataclass
class Counters:
    """Step counters of a run, saved in checkpoints."""

    micro_steps: Count = 0
    global_steps: Count = 0
    """Number of completed optimizer steps, including skipped steps."""
    global_samples: Count = field(default=0, metadata=OPTIONAL)
    """Number of samples processed in the completed steps, across all ranks."""
    skipped_steps: Count = 0
    applied: bool = False
    """Whether the most recent call to `Engine.step` applied an optimizer step."""

    @property
    def applied_steps(self) -> int:
        """The number of applied optimizer steps."""
        return self.global_steps - self.skipped_steps


@dataclass(frozen=True)
class StepRecord:
    """Metrics of one optimizer step, for the log and the monitors."""

    step: int
    """Number of completed steps, including this step and all skipped steps."""
    global_samples: int
    is_applied: bool
    skipped_steps: int
    """Number of skipped steps so far."""
    lr: Sequence[float]
    """Learning rate of each param group."""
    momentum: Sequence[float | None] | None
    """Momentum (first beta for Adam) of each param group; 0 for a group without momentum.

    If no group has momentum, the attribute is None.
    """
    weight_decay: Sequence[float] | None
    """Weight decay of each param group that has one. None is equivalent to an empty list."""
    loss: float | None
    """Mean loss over micro-batches and ranks; None if the engine did not record the loss."""
    grad_norm: float | None
    loss_scale: float | None
    """Factor by which the loss is multiplied; None if the run does not use fp16."""
    batch_size: int


class StepRecorder(Protocol):
    """Interface for objects that record each step of an LR range test."""

    def record(self, lr: float, momentum: float | None, loss: float, *, applied: bool) -> None:
        """Record a step's learning rate, momentum and loss, and whether the step was applied."""
        ...

    def stop_if_over(self) -> None:
        """Raise `SystemExit` if the LR range test is over."""
        ...


class ProgressReporter:
    """Reporter that writes a run's progress to the log or a progress bar, and to the monitors.

    By default, a line is logged for the first step after a start or resume, for every 10th step up
    to step 100, and for every 100th step after that. All ranks must report the same steps, because
    the loss is averaged over the ranks.

    Args:
        config: the run's config. It determines which steps are logged, whether a progress bar is
            shown, and which monitors are enabled.
        monitors: monitors to write to.
        average: function that averages a number over all ranks.
        is_first: whether this process is rank 0. Only rank 0 writes log lines or shows the progress
            bar.
    """

    def __init__(
        self,
        config: Config,
        monitors: Monitors,
        average: Callable[[float], float],
        *,
        is_first: bool,
    ) -> None:
        settings = config.progress
        self.is_monitored = config.report is not None or any(
            section["enabled"] for section in config.monitors.values()
        )
        self.monitors = monitors
        self.timer: PassTimer | None = None
        """Timer whose mean times are logged with each progress line; None if nothing is timed."""
        self.has_bar = settings.has_bar and is_first and ProgressBar.is_supported()
        """Whether this process shows a progress bar. If so, call `move_bar` after each step."""
        self._bar: ProgressBar | None = None
        self._bar_text = ""
        self._is_logged = settings.is_logged
        self._every = settings.every
        self._is_first_line = True
        self._average = average
        self._is_first = is_first
        self._clock = time.perf_counter()
        self._differing: set[str] = set()
        # The losses since the last log line. `_sum` does not include those in `_losses` yet.
        self._losses: list[Tensor] = []
        self._sum: Tensor | float = 0.0
        self._count = 0
        self._is_averaged = False  # whether the losses are means over the ranks

    def add(self, loss: Tensor) -> None:
        """Include the loss of a micro-batch in the mean loss of the next log line.

        Args:
            loss: detached loss of the micro-batch.
        """
        if self._is_logged:
            self._losses.append(loss)
            self._count += 1
            if len(self._losses) == _SUMMED_AT_ONCE:
                self._sum_losses()

    def _sum_losses(self) -> None:
        if self._losses:
            losses = torch.cat([each.reshape(1) for each in self._losses])
            self._sum = self._sum + losses.float().sum()
            self._losses.clear()

    def add_mean(self, loss: float, count: int) -> None:
        """Include several micro-batches in the mean loss of the next log line.

        Args:
            loss: mean loss of the micro-batches over all ranks.
            count: number of micro-batches per rank.
        """
        if self._is_logged:
            self._sum = self._sum + loss * count
            self._count += count
            self._is_averaged = True

    def clear_losses(self) -> None:
        """Discard the losses added since the latest log line, for example after a skipped step."""
        self._losses.clear()
        self._sum, self._count, self._is_averaged = 0.0, 0, False

    def needs_record(self, counters: Counters) -> bool:
        """Return whether `report` must be called for the step that has just been completed."""
        return self.is_monitored or self._is_line_due(counters.global_steps, counters.applied)

    def report(self, record: StepRecord) -> None:
        """Report a step to the log and the monitors. Every rank must call this method."""
        if self.is_monitored:
            self._write_events(record)
        if self._is_line_due(record.step, record.is_applied):
            self._write_line(record)

    def report_metrics(self, metrics: Mapping[str, float], counters: Counters) -> None:
        """Report metrics, such as a validation loss, that are already averaged over the ranks."""
        samples = counters.global_samples
        self.monitors.write_events([Event(name, value, samples) for name, value in metrics.items()])
        if self._is_first:
            shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            log.info("step %d: %s", counters.global_steps, shown)

    def move_bar(self, step: int, total: float | None) -> None:
        """Show the number of completed steps on the progress bar. The first call opens the bar.

        Args:
            step: number of completed steps.
            total: number of steps of the whole run; None if it is unknown.
        """
        if self._bar is None:
            self._bar = ProgressBar(step - 1, total)
        self._bar.move_to(step, total, self._bar_text)
        self.has_bar = self._bar.is_open

    def close(self) -> None:
        """Close the progress bar and the monitors."""
        self.has_bar = False
        if self._bar is not None:
            self._bar.close()
        self.monitors.close()

    def _is_line_due(self, step: int, is_applied: bool) -> bool:
        if not (self._is_logged and is_applied):
            return False
        if self._every is not None:
            return step % self._every == 0
        return step % (10 if step < 100 else 100) == 0 or self._is_first_line

    def _write_events(self, record: StepRecord) -> None:
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        values = {
            **self._name_values("lr", record.lr, always=True),
            **self._name_values("momentum", record.momentum),
            **self._name_values("weight_decay", record.weight_decay),
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
        self.monitors.write_events(events)

    def _name_values(
        self, name: str, values: Sequence[float | None] | None, *, always: bool = False
    ) -> dict[str, float | None]:
        """Return the param groups' values, with keys such as "lr", "lr_group_1" and "lr_group_2".

        If ``always`` is false and the groups have had equal values in every step so far, return
        only the first group's value.
        """
        if not values:
            return {}
        if always or len(set(values)) > 1:
            self._differing.add(name)
        shown = values if name in self._differing else values[:1]
        return {f"{name}_group_{i}" if i else name: value for i, value in enumerate(shown)}

    def _write_line(self, record: StepRecord) -> None:
        self._is_first_line = False
        self._sum_losses()
        # No loss was added if the script calls `loss.backward()` itself.
        loss = float(self._sum) / self._count if self._count else None
        if loss is not None and not self._is_averaged:
            loss = self._average(loss)
        self.clear_losses()
        if not self._is_first:
            return
        shown = [] if loss is None else [f"mean loss {loss:.4f}"]
        for name, values in (("lr", record.lr), ("momentum", record.momentum)):
            if values:
                distinct = [
                    format(value, ".4g") for value in dict.fromkeys(values) if value is not None
                ]
                shown.append(f"{name} {' '.join(distinct)}")
        if self.has_bar:
            self._bar_text = ", ".join(shown)
        else:
            log.info("step %d: %s", record.step, ", ".join(shown))
        if self.timer is not None:
            times = [f"{name} {mean:.2f} ms" for name, mean in self.timer.pop_means().items()]
            log.info("step %d: mean times: %s", record.step, ", ".join(times))
