"""Preview a config's schedule: compute the learning rate at each step before launch."""

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
    """A config's schedule, and its curves for the optimizer and run length of the config."""

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
        """Compute the values of a loss-driven schedule for recorded losses.

        Args:
            losses: recorded loss at each step.

        Returns:
            The values of each hyperparameter at each step, and the losses from which the schedule
            determined the end of its warmup (None if the warmup did not end).

        Raises:
            ValueError: the schedule is not loss-driven.
        """
        if self.schedule.feedback is None:
            name = self.schedule.type_name
            raise ValueError(
                f"`--losses` requires a loss-driven schedule such as AutoWU, got {name}."
            )
        done = replay(self.schedule, losses, base=self.base, horizon=self.horizon)
        columns = {
            name: [row[name][0] for row in done.rows] for name in self.schedule.hyperparameters
        }
        return columns, done.evidence

    @property
    def span(self) -> int:
        """Default number of steps to plot.

        This is the length of the run, or of the schedule if the length of the run is
        unknown.
        """
        return int(self.horizon.scaled_steps or 0) or self.schedule.span

    @property
    def columns(self) -> dict[str, Any]:
        """The curves, by column name.

        The column name is the hyperparameter, such as ``lr``. If the param groups have different
        curves, there is one column per param group: ``lr.0``, ``lr.1``, …
        """
        columns = {}
        for name, curves in self.curves.items():
            if len(set(curves)) == 1:
                columns[name] = curves[0]
            else:
                columns |= {f"{name}.{group}": curve for group, curve in enumerate(curves)}
        return columns

    def rows(self, steps: int) -> Iterator[tuple[float, ...]]:
        """Return an iterator over the first ``steps`` steps.

        Each item contains the step and the value of each column at that step.
        """
        values = [curve.values(steps) for curve in self.columns.values()]
        return zip(range(steps), *values, strict=True)


def preview(config: Source, *, steps_per_epoch: int | None = None) -> Preview:
    """Validate the schedule of a config, and return a preview of it.

    Problems in sections that do not affect the schedule are ignored.

    Args:
        config: path of the config, or the config as a dict. Only ``scheduler`` is required.
        steps_per_epoch: number of optimizer steps per epoch; required if the config has durations
            in epochs.

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
    """Return whether the curves of the schedule cannot be computed because of a problem."""
    if problem.severity != "error" or problem.rule == "batch-sizes":
        return False
    section, *_ = [*split_pointer(problem.pointer), ""]
    if problem.rule == "unresolved-auto":
        return section == "scheduler"
    return section in {"", "optimizer", "scheduler", "engine"}
