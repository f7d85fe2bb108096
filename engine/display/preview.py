"""Preview a config's schedule: compute its values at each step before launch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from engine.config import ConfigError, Problem, Source, load_document
from engine.config.pointers import split_pointer
from engine.config.schedule_context import build_base_values, build_horizon, get_train_batch_size
from engine.config.validate import examine
from schedules import Horizon, Schedule
from schedules.core.controller import Base, Curves, Evidence
from schedules.core.trace import replay

__all__ = ["Preview", "preview"]


@dataclass(frozen=True)
class Preview:
    """The schedule of a config and its curves for the config's optimizer and run length."""

    name: str
    schedule: Schedule[Any]
    curves: Curves
    horizon: Horizon
    base: Base

    @property
    def title(self) -> str:
        """The schedule's type, followed by "on a synthetic loss" if it is loss-driven."""
        note = " on a synthetic loss" if self.schedule.feedback else ""
        return f"{self.schedule.type_name}{note}"

    def replay_losses(
        self, losses: Sequence[float]
    ) -> tuple[dict[str, list[float]], Evidence | None]:
        """Run a loss-driven schedule on recorded losses.

        Args:
            losses: loss of each step.

        Returns:
            The values of each column, and the data on which the schedule based the end of its
            warmup. The data is None if the warmup did not end.

        Raises:
            ValueError: the schedule does not depend on the loss.
        """
        if self.schedule.feedback is None:
            name = self.schedule.type_name
            raise ValueError(f"`--losses` requires a loss-driven schedule, got {name}.")
        done = replay(self.schedule, losses, base=self.base, horizon=self.horizon)
        columns = {
            name: [row[name][0] for row in done.rows] for name in self.schedule.hyperparameters
        }
        return columns, done.evidence

    @property
    def span(self) -> int:
        """Number of steps to plot: the length of the run; if unknown, of the schedule."""
        return int(self.horizon.scaled_steps or 0) or self.schedule.span

    @property
    def columns(self) -> dict[str, Any]:
        """Curves by column name.

        A column has the name of its hyperparameter, such as ``lr``. If param groups have different
        curves, there is one column per group: ``lr.0``, ``lr.1``, …
        """
        columns = {}
        for name, curves in self.curves.items():
            if len(set(curves)) == 1:
                columns[name] = curves[0]
            else:
                columns |= {f"{name}.{group}": curve for group, curve in enumerate(curves)}
        return columns

    def rows(self, steps: int) -> Iterator[tuple[float, ...]]:
        """Return an iterator of rows: the step and the value of each column."""
        values = [curve.values(steps) for curve in self.columns.values()]
        return zip(range(steps), *values, strict=True)


def preview(config: Source, *, steps_per_epoch: int | None = None) -> Preview:
    """Validate the schedule of a config, and return its preview.

    Problems of sections that do not affect the schedule are ignored.

    Args:
        config: path of the config, or the config as a dict. Only ``scheduler`` is required.
        steps_per_epoch: steps per epoch; required if the config has durations in epochs.

    Raises:
        ConfigError: the file cannot be read or parsed, there is no ``scheduler``, or the section
            ``scheduler``, ``optimizer`` or ``engine`` is invalid.

    >>> warmup = {"type": "WarmupLR", "params": {"warmup_num_steps": 2, "warmup_type": "linear"}}
    >>> list(preview({"scheduler": warmup}).rows(3))
    [(0, 0.0), (1, 0.0005), (2, 0.001)]
    """
    document = load_document(config)
    problems, context = examine(document, None, reject_auto=True)
    problems = [problem for problem in problems if _prevents_curve(problem)]
    if problems or context is None:
        raise ConfigError(document.name, problems)
    if context.schedule is None:
        message = "The section `scheduler` is missing. Add it to preview a schedule."
        raise ConfigError(document.name, [Problem("missing-key", "error", "", 0, 0, message)])
    schedule = context.schedule
    try:
        horizon = build_horizon(
            context.get_section("engine"),
            samples_per_step=get_train_batch_size(context.config),
            steps_per_epoch=steps_per_epoch,
        )
        resolved = schedule.resolve(horizon)
    except ValueError as error:
        problem = document.build_problem("schedule", "/scheduler/params", str(error))
        raise ConfigError(document.name, [problem]) from None
    base = build_base_values(context.config, schedule)
    curves = schedule.build_curves(base, horizon)
    return Preview(document.name, resolved, curves, horizon, base)


def _prevents_curve(problem: Problem) -> bool:
    """Return whether a problem prevents the computation of the curves."""
    if problem.severity != "error" or problem.rule == "batch-sizes":
        return False
    section, *_ = [*split_pointer(problem.pointer), ""]
    if problem.rule == "unresolved-auto":
        return section == "scheduler"
    return section in {"", "optimizer", "scheduler", "engine"}
