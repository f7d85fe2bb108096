"""Write the report of a run: a single HTML file with interactive charts."""

from __future__ import annotations

import atexit
import json
import logging
import math
import re
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from engine.display.curve_pages import build_decision
from engine.display.html_charts import (
    Decision,
    Line,
    Mark,
    Page,
    Panel,
    Table,
    read_extra,
    write_html,
)
from engine.training.events import METRIC_LABELS, Event
from schedules.core.controller import Evidence

__all__ = ["RunReport"]

log = logging.getLogger("onecycle")

_PREFIX = "Train/Samples/"
_STEP = "step"
_MAY_BE_UNUSED = {"momentum", "weight_decay"}
"""Panels that the report omits if all their values are 0."""
_LOG_PANELS = {"train_loss", "lr", "grad_norm", "loss_scale"}
_MAX_POINTS = 2000
_MAX_CHECKPOINTS = 200
_INTERVAL = 30.0
"""Minimum number of seconds between writes of the report during training."""
_MAX_COST = 0.01
"""Maximum fraction of the training time that writing the report may take."""
_GROUP = re.compile(r"(lr|momentum|weight_decay)_(group_\d+)")


class _Point(NamedTuple):
    step: int
    samples: int
    value: float | None


@dataclass
class _Series:
    """The values of a metric, averaged so that the number of points stays bounded.

    Each point averages the finite values among ``stride`` consecutive values. Its step is the step
    of the last value.
    """

    stride: int = 1
    points: list[_Point] = field(default_factory=list)
    _finite: list[float] = field(default_factory=list)
    _count: int = 0

    def add(self, step: int, samples: int, value: float) -> None:
        """Add a value. If there are too many points, average adjacent points in pairs."""
        if math.isfinite(value):
            self._finite.append(value)
        self._count += 1
        if self._count < self.stride:
            return
        self.points.append(_Point(step, samples, _mean(self._finite)))
        self._finite, self._count = [], 0
        if len(self.points) >= _MAX_POINTS:
            self.stride *= 2
            pairs = zip(self.points[::2], self.points[1::2], strict=False)
            self.points = [_merge(*pair) for pair in pairs]

    def rewind(self, samples: int) -> None:
        """Remove the points recorded after the given number of samples."""
        self.points = [point for point in self.points if point.samples <= samples]
        self._finite, self._count = [], 0


def _merge(first: _Point, second: _Point) -> _Point:
    known = [each.value for each in (first, second) if each.value is not None]
    return second._replace(value=_mean(known))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


class RunReport:
    """A monitor that writes the report of a run, during training and at the end of the run.

    If the report cannot be written, training continues.

    Args:
        path: HTML file to write.
        config: the user's config, which the report shows.
        name: name of the config, shown in the title of the report.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], name: str) -> None:
        self.path = path
        self._name = name
        self._config = json.dumps(config, indent=2)
        self._setup: Mapping[str, str] = {}
        self._series: dict[str, _Series] = {}
        self._checkpoints: list[tuple[str, int]] = []
        self._decision: Decision | None = None
        self._step = 0
        self._next_write = time.monotonic() + _INTERVAL
        self._exit_hook: Any = None

    def write_events(self, events: Iterable[Event]) -> None:
        """Record the metrics of a step, and write the report if the next write is due."""
        found = {event.name.removeprefix(_PREFIX): event for event in events}
        if _STEP in found:
            self._step = int(found.pop(_STEP).value)
        for name, event in found.items():
            self._series.setdefault(name, _Series()).add(self._step, event.samples, event.value)
        if self._exit_hook is None:
            self._exit_hook = _write_at_exit(self)
        if time.monotonic() >= self._next_write:
            self._write("training")

    def note_setup(self, setup: Mapping[str, str]) -> None:
        """Record the names and values that describe the training setup."""
        self._setup = dict(setup)

    def note_checkpoint(self, tag: str, step: int) -> None:
        """Record that a checkpoint was saved."""
        others = [each for each in self._checkpoints if each[0] != tag]
        self._checkpoints = [*others[1 - _MAX_CHECKPOINTS :], (tag, step)]

    def note_decision(self, evidence: Evidence) -> None:
        """Record when and why a loss-driven warmup ended."""
        self._decision = build_decision(evidence)

    def rewind(self, samples: int) -> None:
        """Restore the saved report of a resumed run.

        Drop the entries that were recorded after ``samples`` samples.
        """
        try:
            if not self._series:
                self._read(read_extra(self.path))
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("starting a new report, because %s cannot be read: %s", self.path, error)
            self._series, self._checkpoints, self._decision = {}, [], None
            return
        for series in self._series.values():
            series.rewind(samples)
        steps = [series.points[-1].step for series in self._series.values() if series.points]
        self._step = max(steps, default=0)
        self._checkpoints = [each for each in self._checkpoints if each[1] <= self._step]

    def close(self) -> None:
        """Write the report of the whole run."""
        if self._exit_hook is None:  # no step was completed since the last call
            return
        atexit.unregister(self._exit_hook)
        self._exit_hook = None
        self._write("")

    def _write(self, status: str) -> None:
        start = time.monotonic()
        try:
            write_html(self.path, self._build_page(status), self._describe())
        except Exception as error:  # noqa: BLE001  # a failed report must not stop training
            log.warning("training continues, but %s could not be written: %s", self.path, error)
        now = time.monotonic()
        self._next_write = now + max(_INTERVAL, (now - start) / _MAX_COST)

    def _describe(self) -> dict[str, Any]:
        """Return the data that a resumed run needs to continue the report."""
        return {
            "series": {
                name: {"stride": series.stride, "points": series.points}
                for name, series in self._series.items()
            },
            "checkpoints": self._checkpoints,
            "decision": None if self._decision is None else asdict(self._decision),
        }

    def _read(self, extra: Mapping[str, Any]) -> None:
        series = {
            name: _Series(int(each["stride"]), [_Point(*point) for point in each["points"]])
            for name, each in extra["series"].items()
        }
        checkpoints = [(str(tag), int(step)) for tag, step in extra["checkpoints"]]
        decision = extra["decision"] and _read_decision(extra["decision"])
        self._series, self._checkpoints, self._decision = series, checkpoints, decision

    def _build_page(self, status: str) -> Page:
        facts: list[tuple[str, str | float]] = [("steps", f"{self._step:,}")]
        for name, label in (("train_loss", "last loss"), ("skipped_steps", "skipped steps")):
            points = self._series[name].points if name in self._series else []
            if points and points[-1].value is not None:
                facts.append((label, points[-1].value))
        tables = [Table("Setup", ("", ""), list(self._setup.items()))] if self._setup else []
        if self._checkpoints:
            rows = [(tag, f"{step:,}") for tag, step in reversed(self._checkpoints)]
            tables.append(Table("Checkpoints", ("Tag", "Step"), rows))
        marks = [Mark(step, "checkpoint" if not i else "") for i, (_, step) in
                 enumerate(sorted(self._checkpoints, key=lambda each: each[1]))]  # fmt: skip
        return Page(
            f"Report of {self._name}",
            list(self._list_panels()),
            status=status,
            facts=facts,
            marks=marks,
            tables=tables,
            decision=self._decision,
            config=self._config,
            is_grid=True,
        )

    def _list_panels(self) -> Iterator[Panel]:
        members: dict[str, dict[str, _Series]] = {name: {} for name in METRIC_LABELS}
        for name, series in self._series.items():
            group = _GROUP.fullmatch(name)
            panel, label = group.groups() if group else (name, "")
            if series.points:
                members.setdefault(panel, {})[label.replace("_", " ")] = series
        for name, lines in members.items():
            if lines and (name not in _MAY_BE_UNUSED or _has_values(lines)):
                yield _build_panel(name, lines)


def _has_values(lines: Mapping[str, _Series]) -> bool:
    return any(point.value for series in lines.values() for point in series.points)


def _build_panel(name: str, lines: Mapping[str, _Series]) -> Panel:
    label = METRIC_LABELS.get(name, name)
    steps = sorted({point.step for series in lines.values() for point in series.points})
    shown = []
    for each, series in lines.items():
        values = {point.step: point.value for point in series.points}
        title = each or ("group 0" if len(lines) > 1 else label)
        shown.append(Line(title, [values.get(step) for step in steps]))
    return Panel(name, label, steps, shown, is_log=name in _LOG_PANELS)


def _read_decision(value: Mapping[str, Any]) -> Decision:
    panels = [
        Panel(**{**panel, "lines": [Line(**line) for line in panel["lines"]]})
        for panel in value["panels"]
    ]
    return Decision(value["text"], panels, [Mark(**mark) for mark in value["marks"]])


def _write_at_exit(report: RunReport) -> Any:
    """Register and return a function that writes the report when the process exits."""
    reference = weakref.ref(report)

    def write() -> None:
        found = reference()
        if found is not None:
            found.close()

    atexit.register(write)
    return write
