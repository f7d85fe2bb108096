"""What a run says of itself as it goes: lines in the log, and events for the monitors."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import Config
from engine.deepspeed_names import DeepSpeedNames
from engine.training.monitors import Event, Monitor

__all__ = ["Counters", "Progress"]

log = logging.getLogger("onecycle")


@dataclass
class Counters:
    """What an engine has done so far."""

    micro_steps: int = 0
    global_steps: int = 0
    skipped_steps: int = 0
    applied: bool = False

    @property
    def update(self) -> int:
        """The last update, counted from 0 as a plot counts them: only those that were applied."""
        return self.global_steps - self.skipped_steps - 1


class Progress:
    """Keeps the losses that are asked for, and tells them with what the updates used.

    Args:
        config: for ``steps_per_print`` and the sections of monitors.
        monitors: rank 0's; the other ranks take part in the mean of the loss all the same.
    """

    def __init__(self, config: Config, monitors: Sequence[Monitor]) -> None:
        self._every = config.steps_per_print
        self._monitors = tuple(monitors)
        self._is_watched = any(section["enabled"] for section in config.monitors.values())
        self._clock = time.perf_counter()
        self._window: list[Tensor] = []  # of this update, for the monitors
        self._sum: Tensor | float = 0.0  # since the last line of the log
        self._count = 0

    def add(self, loss: Tensor) -> None:
        """Take a micro-batch's loss, if anybody will ask for it."""
        if self._is_watched:
            self._window.append(loss.detach())
        if self._every:
            self._sum = self._sum + loss.detach().float()
            self._count += 1

    def tell(self, engine: DeepSpeedNames, done: Counters) -> None:
        """Tell of the update that is just over, before the schedule moves on from what it used."""
        if self._is_watched:
            self._write_events(engine, done)
        if self._every and done.applied and done.global_steps % self._every == 0:
            self._log(engine, done)

    def _write_events(self, engine: DeepSpeedNames, done: Counters) -> None:
        window, self._window = self._window, []
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        values = {
            "lr": engine.get_lr()[0],
            "momentum": (engine.get_momentum() or (None,))[0],
            "weight_decay": engine.optimizer.param_groups[0].get("weight_decay"),
            "train_loss": engine.mean(torch.stack(window).mean().item()) if window else None,
            "grad_norm": engine.get_global_grad_norm(),
            "loss_scale": engine.loss_scale if engine.fp16_enabled() else None,
            "samples_per_second": engine.train_batch_size() / max(seconds, 1e-9),
            "skipped_updates": done.skipped_steps,
            "update": done.update,
        }
        events = [
            Event(
                f"Train/Samples/{name}", float(value), done.global_steps * engine.train_batch_size()
            )
            for name, value in values.items()
            if value is not None
        ]
        for monitor in self._monitors:
            monitor.write_events(events)

    def _log(self, engine: DeepSpeedNames, done: Counters) -> None:
        # None came here if the script called `loss.backward()` itself.
        loss = engine.mean(float(self._sum) / self._count) if self._count else None
        self._sum, self._count = 0.0, 0
        values = {"lr": engine.get_lr(), "momentum": engine.get_momentum()}
        shown = [
            f"{name} {' '.join(format(value, '.4g') for value in dict.fromkeys(of_groups))}"
            for name, of_groups in values.items()
            if of_groups
        ]
        if engine.global_rank == 0:
            shown = shown if loss is None else [f"loss {loss:.4f}", *shown]
            log.info("update %d: %s", done.update, ", ".join(shown))
