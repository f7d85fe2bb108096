"""Step the scheduler of a training run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from engine.training.loss_window import LossWindow
from schedules import ScheduleBinder
from schedules.core.controller import Evidence
from schedules.core.extras import require_package

__all__ = ["ScheduleDriver"]

log = logging.getLogger("onecycle")


class ScheduleDriver:
    """Driver that steps a scheduler after each applied optimizer step.

    If the scheduler needs the loss or a metric, the driver passes the value to the scheduler.

    Args:
        scheduler: any object with a ``step`` method, such as a PyTorch scheduler; None if the run
            has none.
        report: directory for plots of the schedule's decisions, such as AutoWU's decision to end
            the warmup. If None, no plots are saved.
        note: function to call with the `Evidence` of each decision before its plot is saved.

    Raises:
        MissingExtraError: plots of decisions are requested, but matplotlib is not installed.
    """

    def __init__(
        self,
        scheduler: LRScheduler | None,
        report: str | None = None,
        note: Callable[[Evidence], None] = lambda evidence: None,
    ) -> None:
        self.scheduler = scheduler
        self.metric: float | None = None
        """Metric value for the scheduler's next step, averaged over the ranks, or None."""
        self._report = report
        self._note = note
        if report is not None and self.feedback is not None:
            require_package("matplotlib", "`engine.report` with a feedback schedule")

    @property
    def feedback(self) -> Literal["loss", "metric"] | None:
        """Kind of value that the schedule needs at each step: "loss", "metric" or None."""
        scheduler = self.scheduler
        return scheduler.schedule.feedback if isinstance(scheduler, ScheduleBinder) else None

    def step(self, window: LossWindow) -> None:
        """Step the scheduler. Every rank must call this method after each applied optimizer step.

        Args:
            window: losses of the micro-batches of that optimizer step.
        """
        scheduler, feedback = self.scheduler, self.feedback
        if feedback is not None:
            assert isinstance(scheduler, ScheduleBinder)
            if feedback == "loss":
                scheduler.step(window.mean())
            else:
                scheduler.step(metric=self._take_metric())
            if scheduler.just_decided and self._report is not None:
                self._plot_decision(scheduler, Path(self._report))
        elif isinstance(scheduler, ReduceLROnPlateau):
            metric = self._take_metric()
            if metric is not None:
                scheduler.step(metric)
        elif scheduler is not None:
            scheduler.step()

    def _take_metric(self) -> float | None:
        metric, self.metric = self.metric, None
        return metric

    def _plot_decision(self, binder: ScheduleBinder, directory: Path) -> None:
        if binder.evidence is None:
            return
        from engine.display.plots import draw_decision

        name = binder.schedule.type_name
        path = directory / f"{name.lower()}.png"
        self._note(binder.evidence)
        try:
            draw_decision(binder.evidence, path, name)
        except Exception as error:  # noqa: BLE001  # a failed plot must not stop training
            log.warning("training continues, but the plot %s could not be saved: %s", path, error)
        else:
            log.info("saved %s, a plot of the data behind the schedule's decision", path)
