"""The page of ``onecycle ui`` that shows training runs."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.training.events import METRIC_LABELS
from engine.ui.decision import recompute_decision
from engine.ui.metrics import Series
from engine.ui.reduction import choose_points, smooth
from engine.ui.replies import Download, Numbers
from engine.ui.runs import Run, compare_settings, find_runs, read_saved_settings
from engine.ui.server import Action

__all__ = ["RunPage"]

_MAX_POINTS = 3000
"""Maximum number of points per series on the run page. More points would look the same."""
_NOTE = (
    "The event files are not shown: tensorboard is not installed. Run `pip install tensorboard`."
)
_OPTIONAL = {"weight_decay"}
"""Metrics that are not shown if they are always 0."""
_STEP = "step"
_GROUP = re.compile(r"(lr|momentum|weight_decay)_group_(\d+)")


class _Column(NamedTuple):
    panel: str
    run: str
    group: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    is_faint: bool = False


class RunPage:
    """Page that shows the metrics, settings and checkpoints of training runs.

    Args:
        roots: directories to search for runs.
    """

    html = "run.html"

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = roots
        self._runs = find_runs(roots)
        # Two tabs can request data at the same time.
        self._lock = threading.Lock()

    @property
    def actions(self) -> Mapping[str, Action]:
        """Dict that maps the name of each action to the function that runs it."""
        return {
            "summary": self._locked(self._summarize),
            "metrics": self._locked(self._read_metrics),
            "decision": self._locked(self._find_decision),
            "plot": self._locked(self._read_plot),
        }

    def _locked(self, action: Action) -> Action:
        def run(body: Mapping[str, Any]) -> Any:
            with self._lock:
                return action(body)

        return run

    def _summarize(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the checkpoints, settings and reports of all runs."""
        del body
        self._runs = find_runs(self._roots, self._runs)
        checkpoints = {run.name: run.list_checkpoints() for run in self._runs}
        settings = {run.name: run.read_settings(checkpoints[run.name]) for run in self._runs}
        return {
            "title": ", ".join(root.resolve().name for root in self._roots),
            "path": ", ".join(str(root.absolute()) for root in self._roots),
            "runs": [run.name for run in self._runs],
            "note": _NOTE if any(run.has_unreadable_events for run in self._runs) else "",
            "checkpoints": [
                {
                    "run": name,
                    "tag": manifest.tag,
                    "step": manifest.step,
                    "size": manifest.size,
                    "created": manifest.created,
                    "ranks": manifest.world_size,
                }
                for name, manifests in checkpoints.items()
                for manifest in manifests
            ],
            "settings": compare_settings({name: each for name, each in settings.items() if each}),
            "settingsOf": [name for name, each in settings.items() if each],
            "rangeTests": [
                {"run": run.name, **_reduce_range_test(report)}
                for run in self._runs
                if (report := run.find_range_test()) is not None
            ],
            "plots": [f"{run.name}: {path.name}" for run, path in self._list_plots()],
            "hasDecision": [
                name
                for name, each in settings.items()
                if isinstance(each.get("scheduler"), Mapping)
                and each["scheduler"].get("type") == "AutoWU"
            ],
        }

    def _read_metrics(self, body: Mapping[str, Any]) -> Numbers:
        """Return the points to draw, or no points if the browser already has the current ones."""
        window = body.get("window")
        window = tuple(map(float, window)) if isinstance(window, list) else None
        is_by_sample = body.get("axis") == "samples"
        width = body.get("smoothing")
        width = float(width) if isinstance(width, int | float) else 0.0
        for run in self._runs:
            run.update()
        series = {run.name: run.series for run in self._runs}
        counts = [len(each.samples) for metrics in series.values() for each in metrics.values()]
        version = f"{counts} {window} {is_by_sample} {width}"
        progress = min((run.progress for run in self._runs), default=1.0)
        if version == body.get("version"):
            return Numbers({"version": version, "isUnchanged": True, "progress": progress})
        columns = [
            column
            for run in self._runs
            for column in _list_columns(run.name, series[run.name], is_by_sample, width)
        ]
        columns.sort(key=_sort_key)
        panels: dict[str, dict[str, Any]] = {}
        arrays = []
        for column in columns:
            label = METRIC_LABELS.get(column.panel, column.panel)
            panel = panels.setdefault(
                column.panel, {"name": column.panel, "label": label, "columns": []}
            )
            panel["columns"].append(
                {
                    "run": column.run,
                    "group": column.group,
                    "isFaint": column.is_faint,
                    "last": _find_last(column.y),
                }
            )
            chosen = choose_points(column.x, column.y, window, _MAX_POINTS)
            arrays += [column.x[chosen], column.y[chosen]]
        header = {
            "version": version,
            "progress": progress,
            "panels": list(panels.values()),
            "hasSteps": all(_STEP in metrics for metrics in series.values() if metrics),
            "bounds": _find_bounds(columns),
        }
        return Numbers(header, arrays)

    def _find_decision(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the event in which AutoWU decided to end the warmup of the selected run."""
        for run in self._runs:
            if run.name == body.get("run"):
                checkpoints = run.list_checkpoints()
                # A checkpoint has the length of the run, which the config may leave open.
                saved = read_saved_settings(checkpoints)
                settings = saved or run.read_settings(checkpoints)
                return {"decision": recompute_decision(settings, run.series)}
        raise ValueError("Unknown run. Reload the page.")

    def _list_plots(self) -> list[tuple[Run, Path]]:
        return [(run, path) for run in self._runs for path in run.find_plots()]

    def _read_plot(self, body: Mapping[str, Any]) -> Download:
        """Return the requested plot as a PNG file."""
        index, plots = body.get("index"), self._list_plots()
        if type(index) is not int or not 0 <= index < len(plots):
            raise ValueError("Unknown image. Reload the page.")
        path = plots[index][1]
        return Download(path.name, "image/png", path.read_bytes())


def _list_columns(
    run: str, series: Mapping[str, Series], is_by_sample: bool, width: float
) -> Iterator[_Column]:
    steps = series.get(_STEP)
    for name, (samples, values) in series.items():
        is_unused = name in _OPTIONAL and not values.any()
        if name == _STEP or is_unused:
            continue
        group = _GROUP.fullmatch(name)
        panel, label = (group[1], f"group {group[2]}") if group else (name, "")
        x, y = samples, values
        if not is_by_sample and steps is not None:
            x = _convert_to_steps(samples, steps)
        if len(x) > 1 and (x[1:] < x[:-1]).any():
            order = np.argsort(x, kind="stable")
            x, y = x[order], y[order]
        if panel == "train_loss" and width > 0 and len(y) > 2:
            yield _Column(panel, run, label, x, y, is_faint=True)
            y = smooth(y, max(2, round(width * len(y))))
        yield _Column(panel, run, label, x, y)


def _convert_to_steps(samples: NDArray[np.float64], steps: Series) -> NDArray[np.float64]:
    if len(samples) == len(steps.samples) and (samples == steps.samples).all():
        return steps.values
    return np.interp(samples, steps.samples, steps.values)


def _sort_key(column: _Column) -> tuple[int, str]:
    order = list(METRIC_LABELS)
    is_known = column.panel in order
    return order.index(column.panel) if is_known else len(order), column.panel


def _find_bounds(columns: Sequence[_Column]) -> list[float]:
    ends = [(column.x[0], column.x[-1]) for column in columns if len(column.x)]
    if not ends:
        return [0.0, 1.0]
    return [float(min(first for first, _ in ends)), float(max(last for _, last in ends))]


def _find_last(values: NDArray[np.float64]) -> float | None:
    known = values[-100:][np.isfinite(values[-100:])]
    return float(known[-1]) if len(known) else None


def _reduce_range_test(report: Mapping[str, Any]) -> dict[str, Any]:
    """Reduce an LR range test's report to the data that the run page plots."""
    suggestion = report["suggestion"] if isinstance(report["suggestion"], Mapping) else {}
    sweeps = []
    for sweep in report["runs"] if isinstance(report["runs"], list) else []:
        lrs, losses = sweep.get("lr"), sweep.get("loss")
        if isinstance(lrs, list) and isinstance(losses, list):
            step = -(-len(lrs) // _MAX_POINTS) or 1
            sweeps.append({"lr": lrs[::step], "loss": losses[::step]})
    return {
        "minLr": suggestion.get("min_lr"),
        "maxLr": suggestion.get("max_lr"),
        "reason": suggestion.get("reason"),
        "rules": suggestion.get("rules") or {},
        "sweeps": sweeps,
    }
