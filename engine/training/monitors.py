"""Monitors that write each step's metrics to TensorBoard, CSV files or Weights & Biases."""

from __future__ import annotations

import contextlib
import csv
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from engine.config import Config
from engine.distributed.ranks import Ranks
from engine.training.events import Event
from engine.training.run_report import RunReport
from schedules.core.controller import Evidence
from schedules.core.extras import require_package

__all__ = [
    "CSVMonitor",
    "Monitor",
    "Monitors",
    "RunDirectories",
    "TensorBoardMonitor",
    "WandbMonitor",
    "build_monitors",
]

log = logging.getLogger("onecycle")


class Monitor(Protocol):
    """Interface for objects that write the metrics of each step."""

    def write_events(self, events: Iterable[Event]) -> None:
        """Write the events of a step immediately, so that a crash does not lose them."""
        ...

    def rewind(self, samples: int) -> None:
        """Remove the events recorded after the given number of samples.

        A resumed run writes these events again.
        """
        ...

    def close(self) -> None:
        """Release files and threads."""
        ...


class RunDirectories:
    """The directories for a run's metric files. A new run never reuses an earlier run's directory.

    If the config specifies the directory ``DIR``, the first run writes to ``DIR``, and later runs
    write to ``DIR-2``, ``DIR-3`` and so on.
    """

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        """Maps each directory that the config specifies to the numeric suffix of the directory that
        this run uses, such as 2 for ``runs-2``. Checkpoints contain these numbers."""

    def get(self, directory: str) -> Path:
        """Return the directory to which this run writes a monitor's files.

        The first call chooses ``directory`` itself if no earlier run has used it. Otherwise, the
        first call chooses a numbered directory, such as ``runs-2`` for ``runs``.
        """
        number = self.numbers.get(directory)
        if number is None or _OWNERS.get(_add_number(directory, number)) is not self:
            number = self.numbers[directory] = _create_unused(directory)
            _OWNERS[_add_number(directory, number)] = self
            log.info("writing metrics to %s", _add_number(directory, number))
        path = _add_number(directory, number)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def take_over(self) -> None:
        """Use the directories in ``numbers``, even if an earlier engine in this process uses them.

        If the earlier engine writes more metrics, it chooses new directories.
        """
        for directory, number in self.numbers.items():
            _OWNERS[_add_number(directory, number)] = self


_OWNERS: weakref.WeakValueDictionary[Path, RunDirectories] = weakref.WeakValueDictionary()
"""Maps each directory to the `RunDirectories` object that currently uses it in this process."""


def _add_number(directory: str, number: int) -> Path:
    path = Path(directory).absolute()
    return path if number == 1 else path.with_name(f"{path.name}-{number}")


def _create_unused(directory: str) -> int:
    """Create the first unused directory among ``directory``, ``directory-2`` and so on.

    Return its numeric suffix: 1 for ``directory`` itself. An empty ``directory`` counts as unused.
    """
    first = Path(directory)
    if first.is_dir() and not any(first.iterdir()):  # the user has created it
        return 1
    number = 1
    while True:
        # If two processes try to create a directory at once, one of them fails.
        with contextlib.suppress(FileExistsError):
            _add_number(directory, number).mkdir(parents=True)
            return number
        number += 1


class TensorBoardMonitor:
    """Monitor that writes TensorBoard event files.

    Args:
        directory: output directory that the config specifies.
        directories: object that appends a number to the name of ``directory`` if an earlier run
            has used that directory.
    """

    def __init__(self, directory: str, directories: RunDirectories) -> None:
        require_package("tensorboard", "`tensorboard.enabled`")
        self._directory = directory
        self._directories = directories
        self._writer: Any = None
        self._purge_step: int | None = None

    def write_events(self, events: Iterable[Event]) -> None:
        """Add each event as a scalar, then flush the event file."""
        directory = str(self._directories.get(self._directory))
        if self._writer is None or self._writer.log_dir != directory:
            from torch.utils.tensorboard import SummaryWriter

            self.close()
            self._writer = SummaryWriter(directory, purge_step=self._purge_step)
            # End the writer's thread if the engine is deleted without a call to `destroy`.
            self._finalizer = weakref.finalize(self, self._writer.close)
        for event in events:
            self._writer.add_scalar(event.name, event.value, event.samples)
        self._writer.flush()

    def rewind(self, samples: int) -> None:
        """Make TensorBoard hide the events recorded after ``samples`` samples.

        This takes effect at the next call to `write_events`, which starts a new event file.
        """
        self.close()
        self._purge_step = samples + 1

    def close(self) -> None:
        """Close the event file and stop the thread that writes to it."""
        if self._writer is not None:
            self._finalizer()
            self._writer = None


class CSVMonitor:
    """Monitor that writes one CSV file per metric.

    Each row contains the number of samples so far and the value of the metric.

    Args:
        directory: output directory that the config specifies.
        directories: object that appends a number to the name of ``directory`` if an earlier run
            has used that directory.
    """

    def __init__(self, directory: str, directories: RunDirectories) -> None:
        self._directory = directory
        self._directories = directories

    def write_events(self, events: Iterable[Event]) -> None:
        """Append each event as a row to the CSV file of its metric."""
        directory = self._directories.get(self._directory)
        for event in events:
            path = directory / f"{event.name.replace('/', '_')}.csv"
            new = not path.exists()
            with path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                if new:
                    writer.writerow(["step", event.name.rpartition("/")[2]])
                writer.writerow([event.samples, event.value])

    def rewind(self, samples: int) -> None:
        """Remove rows recorded after ``samples`` samples, and any incomplete last row."""
        if self._directory not in self._directories.numbers:
            return
        for path in self._directories.get(self._directory).glob("*.csv"):
            lines = path.read_bytes().splitlines(keepends=True)
            rows = (row for row in lines[1:] if row.endswith(b"\n"))
            kept = [row for row in rows if int(row.partition(b",")[0]) <= samples]
            partial = path.with_suffix(".partial")
            partial.write_bytes(b"".join(lines[:1] + kept))
            partial.replace(path)

    def close(self) -> None:
        """Do nothing, because no file stays open between steps."""


class WandbMonitor:
    """Monitor for Weights & Biases. Offline mode is used unless ``WANDB_MODE`` is set."""

    def __init__(self, section: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                "`wandb.enabled` is true, but wandb is not installed. Run `pip install wandb`, or "
                "enable `tensorboard` or `csv_monitor` instead."
            ) from error
        self._run = wandb.init(
            project=section["project"],
            group=section["group"],
            entity=section["team"],
            mode=os.environ.get("WANDB_MODE", "offline"),
        )

    def write_events(self, events: Iterable[Event]) -> None:
        """Log the events, with the number of samples so far as the W&B step."""
        for event in events:
            self._run.log({event.name: event.value}, step=event.samples)

    def rewind(self, samples: int) -> None:
        """Do nothing, because a resumed run starts a new W&B run."""

    def close(self) -> None:
        """Finish the W&B run."""
        self._run.finish()


class Monitors:
    """The monitors of a run, and the directories that they write to.

    Args:
        monitors: monitors that receive the events of each step.
        directories: object that chooses the directories; None for a new `RunDirectories`.
        report: run report, which also receives the events; None if the run has no report.
    """

    def __init__(
        self,
        monitors: Sequence[Monitor] = (),
        directories: RunDirectories | None = None,
        report: RunReport | None = None,
    ) -> None:
        self._monitors = (*monitors, *(() if report is None else (report,)))
        self._report = report
        self._directories = directories or RunDirectories()
        self._resumes_after: int | None = None

    @property
    def enabled(self) -> bool:
        """Whether there are any monitors. Ranks other than 0 have none."""
        return bool(self._monitors)

    def write_events(self, events: Iterable[tuple[str, Any, int]]) -> None:
        """Pass events to each monitor.

        Args:
            events: tuples of a metric's name, its value, and the number of samples so far.
        """
        each_event = [Event(name, float(value), samples) for name, value, samples in events]
        # Rewind only now: a script may load a checkpoint only to evaluate the model.
        if self._resumes_after is not None:
            samples, self._resumes_after = self._resumes_after, None
            self._directories.take_over()
            for monitor in self._monitors:
                monitor.rewind(samples)
        for monitor in self._monitors:
            monitor.write_events(each_event)

    def note_setup(self, setup: Mapping[str, str]) -> None:
        """Add the training setup to the run report."""
        if self._report is not None:
            self._report.note_setup(setup)

    def note_checkpoint(self, tag: str, step: int) -> None:
        """Add a checkpoint to the run report."""
        if self._report is not None:
            self._report.note_checkpoint(tag, step)

    def note_decision(self, evidence: Evidence) -> None:
        """Add a feedback schedule's decision to the run report."""
        if self._report is not None:
            self._report.note_decision(evidence)

    def state_dict(self) -> dict[str, int]:
        """Return the numeric suffixes of the directories that this run writes to.

        For example, ``{"runs": 2}`` means that the config specifies ``runs`` and this run writes to
        ``runs-2``. The number 1 means that the directory has no suffix.
        """
        return dict(self._directories.numbers)

    def resume(self, state: Mapping[str, int], samples: int) -> None:
        """Continue the metric files of an earlier run, given the `state_dict` that it saved.

        The next call to `write_events` first removes the events recorded after ``samples`` samples.
        """
        self._directories.numbers.update(state)
        self._resumes_after = samples

    def close(self) -> None:
        """Close each monitor."""
        for monitor in self._monitors:
            monitor.close()


_FILE_MONITORS: Mapping[str, tuple[Callable[[str, RunDirectories], Monitor], str]] = {
    "tensorboard": (TensorBoardMonitor, "runs"),
    "csv_monitor": (CSVMonitor, "csv_monitor"),
}
"""Maps the config section of each file-writing monitor to its class and default ``output_path``."""


def build_monitors(config: Config, ranks: Ranks) -> Monitors:
    """On rank 0, build the monitors that the config enables. Other ranks have no monitors.

    Args:
        config: config of the run.
        ranks: rank, world size and device of this process.

    Raises:
        ValueError: ``wandb`` is enabled, but the package is not installed.
        MissingExtraError: ``tensorboard`` is enabled, but the package is not installed.
    """
    enabled = {name: each for name, each in config.monitors.items() if each["enabled"]}
    if ranks.rank != 0:
        return Monitors()
    directories = RunDirectories()
    monitors: list[Monitor] = []
    for name, (kind, default) in _FILE_MONITORS.items():
        if name in enabled:
            parent, job = enabled[name]["output_path"] or default, enabled[name]["job_name"]
            monitors.append(kind(str(Path(parent, job)), directories))
    if "wandb" in enabled:
        monitors.append(WandbMonitor(enabled["wandb"]))
    report = None
    if config.report is not None:
        report = RunReport(Path(config.report.page), config.raw, config.name)
    return Monitors(monitors, directories, report)
