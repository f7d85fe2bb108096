"""Find training runs in directories, and read their checkpoints, settings and reports."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from engine.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from engine.config.batch_sizes import BATCH_KEYS
from engine.config.parser import parse
from engine.errors import CheckpointError
from engine.ui.metrics import CSVMetrics, EventMetrics, MetricSource, Series, is_metric_file

__all__ = ["Run", "compare_settings", "find_runs", "read_saved_settings"]

_MAX_DEPTH = 4
_MAX_DIRECTORIES = 2000
_MAX_RUNS = 20
_MAX_BYTES = 20_000_000
_MAX_CONFIG = 200_000
_EVENTS = "events.out.tfevents."
_PLOTS = ("autowu.png", "lr_range.png")
_CONFIG_KEYS = {"optimizer", "scheduler", *BATCH_KEYS}


class Run:
    """A training run, read from its files.

    Args:
        name: name under which the web page shows the run.
        root: directory with the checkpoints and reports.
        directories: directories with the metrics, those with CSV files first.
    """

    def __init__(self, name: str, root: Path, directories: Sequence[Path]) -> None:
        self.name = name
        self.root = root
        self.progress = 0.0
        """Fraction of the metrics that has been read."""
        self.has_unreadable_events = False
        """Whether event files of the run cannot be read because tensorboard is not installed."""
        self._sources: dict[Path, MetricSource] = {}
        self.add_directories(directories)

    def add_directories(self, directories: Sequence[Path]) -> None:
        """Add directories from which `update` reads metrics."""
        for directory in directories:
            if directory in self._sources:
                continue
            if _has_csv_metrics(directory):
                self._sources[directory] = CSVMetrics(directory)
            elif find_spec("tensorboard") is None:
                self.has_unreadable_events = True
            else:
                self._sources[directory] = EventMetrics(directory)

    def update(self) -> None:
        """Read the metrics that have been written since the last call."""
        fractions = [source.update() for source in self._sources.values()]
        self.progress = min(fractions, default=1.0)

    @property
    def series(self) -> Mapping[str, Series]:
        """The metrics by name, each from the first directory that contains it."""
        found: dict[str, Series] = {}
        for source in self._sources.values():
            found = {**source.series, **found}
        return {name: series for name, series in found.items() if len(series.samples)}

    def list_checkpoints(self) -> list[Manifest]:
        """Return the complete checkpoints, sorted by step."""
        manifests = []
        for directory in _walk(self.root):
            if _is_own_file(directory / MANIFEST):
                try:
                    manifests.append(read_manifest(directory))
                except CheckpointError:  # the run is replacing it, or it is damaged
                    continue
        return sorted(manifests, key=lambda manifest: (manifest.step, manifest.sequence))

    def read_settings(self, checkpoints: Sequence[Manifest]) -> Mapping[str, Any]:
        """Return the run's config or, if there is none, the settings in its newest checkpoint."""
        for path in sorted(self.root.glob("*.json")):
            config = _read_config(path)
            if _CONFIG_KEYS & config.keys():
                return config
        return read_saved_settings(checkpoints)

    def find_range_test(self) -> Mapping[str, Any] | None:
        """Return the report of the newest LR range test, or None if the run has no such report."""
        paths = [directory / "report.json" for directory in _walk(self.root)]
        found = [path for path in paths if _is_own_file(path)]
        for path in sorted(found, key=lambda each: each.stat().st_mtime, reverse=True):
            report = _read_json(path)
            if isinstance(report, Mapping) and {"suggestion", "runs"} <= report.keys():
                return report
        return None

    def find_plots(self) -> list[Path]:
        """Return the paths of the plots that the run has saved, such as ``lr_range.png``."""
        return [
            directory / name
            for directory in _walk(self.root)
            for name in _PLOTS
            if _is_own_file(directory / name)
        ]


def read_saved_settings(checkpoints: Sequence[Manifest]) -> Mapping[str, Any]:
    """Return the settings saved in the newest checkpoint, with all durations converted to steps."""
    if not checkpoints:
        return {}
    return {**checkpoints[-1].identity, "backend": checkpoints[-1].backend}


def find_runs(roots: Sequence[Path], known: Sequence[Run] = ()) -> list[Run]:
    """Return the runs found in directories, reusing the `Run` objects in ``known``.

    The CSV files and the event files of a job can be in two directories with the same name, such as
    ``csv_monitor/JOB`` and ``runs/JOB``. Both then belong to the same run.
    """
    old = {(run.root, run.name): run for run in known}
    runs = []
    for root in roots:
        groups = _group_directories(root)
        title = root.resolve().name
        for (own_root, name), directories in groups.items():
            key = (root, title) if len(groups) == 1 else (own_root, f"{title}/{name}")
            run = old.get(key) or Run(key[1], key[0], directories)
            run.add_directories(directories)
            runs.append(run)
    return runs[:_MAX_RUNS]


def _group_directories(root: Path) -> dict[tuple[Path, str], list[Path]]:
    """Return a dict that maps each run's ``(root, name)`` to its directories with metrics."""
    groups: dict[tuple[Path, str], list[Path]] = {}
    for directory in _walk(root):
        key = _find_own_root(root, directory), directory.name
        if _has_csv_metrics(directory):
            groups.setdefault(key, []).insert(0, directory)
        elif any(_EVENTS in entry.name for entry in _list_files(directory)):
            groups.setdefault(key, []).append(directory)
    names = {name for _, name in groups}
    if len(groups) == 2 and len(names) == 1:
        # The monitors can write to different parents: csv_monitor/JOB and runs/JOB.
        both = [each for directories in groups.values() for each in directories]
        both.sort(key=_has_csv_metrics, reverse=True)
        if [_has_csv_metrics(each) for each in both] == [True, False]:
            return {(root, names.pop()): both}
    roots = [own_root for own_root, _ in groups]
    if len(names) < len(groups) and len(set(roots)) == len(groups):
        # The jobs have the same name, so the parent directories name the runs.
        return {(own, own.name): directories for (own, _), directories in groups.items()}
    return groups or {(root, ""): []}


def _find_own_root(root: Path, directory: Path) -> Path:
    """Return the root directory of the run whose metrics are in ``directory``.

    It is ``root`` if ``directory`` is ``root`` or a child of ``root``. Otherwise, it is the child
    of ``root`` that contains ``directory``.
    """
    parts = directory.relative_to(root).parts
    return root / parts[0] if len(parts) > 1 else root


def _has_csv_metrics(directory: Path) -> bool:
    return any(
        entry.name.endswith(".csv") and is_metric_file(Path(entry.path))
        for entry in _list_files(directory)
    )


def compare_settings(settings: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the settings that differ between runs; for a single run, all its settings.

    Args:
        settings: settings of each run, by the name of the run.

    >>> compare_settings({"a": {"x": 1, "y": {"z": 2}}, "b": {"x": 1, "y": {"z": 3}}})
    [{'key': 'y.z', 'values': ['2', '3']}]
    """
    flat = {run: dict(_flatten(values)) for run, values in settings.items()}
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    rows = [
        {"key": key, "values": [values.get(key, "") for values in flat.values()]} for key in keys
    ]
    return [row for row in rows if len(flat) == 1 or len(set(row["values"])) > 1]


def _flatten(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, below in value.items():
            yield from _flatten(below, f"{path}.{key}" if path else str(key))
    else:
        yield path, json.dumps(value, ensure_ascii=False)


def _walk(root: Path) -> Iterator[Path]:
    """Yield a directory and its subdirectories, except hidden ones and symbolic links."""
    pending = [(root, 0)]
    for _ in range(_MAX_DIRECTORIES):
        if not pending:
            return
        directory, depth = pending.pop(0)
        yield directory
        if depth < _MAX_DEPTH:
            below = (entry for entry in _scan(directory) if entry.is_dir(follow_symlinks=False))
            pending += [(Path(entry.path), depth + 1) for entry in below]


def _list_files(directory: Path) -> list[os.DirEntry[str]]:
    return [entry for entry in _scan(directory) if entry.is_file(follow_symlinks=False)]


def _scan(directory: Path) -> list[os.DirEntry[str]]:
    try:
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
    except OSError:
        return []
    return [entry for entry in entries if not entry.name.startswith(".")]


def _read_config(path: Path) -> Mapping[str, Any]:
    """Return the content of a config file, or an empty dict if it does not contain an object."""
    text = _read_text(path, _MAX_CONFIG)
    value = None if text is None else parse(text, path.name).value
    return value if isinstance(value, Mapping) else {}


def _read_json(path: Path) -> Any:
    """Return the content of a JSON file, or None if the file is missing, too large or invalid."""
    try:
        return json.loads(_read_text(path, _MAX_BYTES) or "null")
    except (ValueError, RecursionError):
        return None


def _is_own_file(path: Path) -> bool:
    """Return whether a path is a regular file and not a symbolic link."""
    return path.is_file() and not path.is_symlink()


def _read_text(path: Path, most: int) -> str | None:
    try:
        is_small = _is_own_file(path) and path.stat().st_size <= most
        return path.read_text(encoding="utf-8") if is_small else None
    except (OSError, ValueError):
        return None
