"""Read a run's metrics from CSV files and TensorBoard event files, even during the run."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "CSVMetrics",
    "EventMetrics",
    "MetricSource",
    "Series",
    "find_metric_name",
    "is_metric_file",
]

_CHUNK = 8_000_000
_MAX_PER_UPDATE = 48_000_000
"""Maximum number of bytes to read in one update. Larger files are read in several updates."""
_MAX_ROW = 1000
"""Maximum length of a row or of the header, in bytes."""
_PREFIX = "Train_Samples_"
_HEADER = re.compile(rb"step,[^\n,]+\r?\n")

Numbers = NDArray[np.float64]


class Series(NamedTuple):
    """The values of a metric, in the order in which they were written."""

    samples: Numbers
    """Number of training samples seen when each value was recorded."""
    values: Numbers


_EMPTY = Series(np.empty(0), np.empty(0))


def find_metric_name(name: str) -> str:
    """Return a metric's name without the prefix ``Train/Samples/``, with each "/" replaced by "_".

    >>> find_metric_name("Train/Samples/lr"), find_metric_name("Validation/loss")
    ('lr', 'Validation_loss')
    """
    return name.replace("/", "_").removeprefix(_PREFIX)


def is_metric_file(path: Path) -> bool:
    """Return whether a file is a CSV file written by ``csv_monitor``."""
    try:
        with path.open("rb") as file:
            return _HEADER.fullmatch(file.readline(_MAX_ROW)) is not None
    except OSError:
        return False


class MetricSource(ABC):
    """Base class of objects that read the metrics in a directory."""

    @abstractmethod
    def update(self) -> float:
        """Read the metrics that have been written since the previous call.

        Returns:
            The fraction of all data that has been read so far, from 0 to 1.
        """

    @property
    @abstractmethod
    def series(self) -> Mapping[str, Series]:
        """The metrics, keyed by short name."""


class _CSVFile:
    """A CSV file with the columns step and value. Only complete rows are read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._forget()

    def _forget(self) -> None:
        self.offset = 0
        self.inode = 0
        self._parts: list[Numbers] = []

    def update(self, most: int) -> tuple[int, int]:
        """Read up to about ``most`` new bytes, and return ``(bytes_read, bytes_unread)``."""
        try:
            with self.path.open("rb") as file:
                status = self.path.stat()
                # A resumed run replaces the file by a shorter one.
                if status.st_ino != self.inode or status.st_size < self.offset:
                    self._forget()
                    self.inode = status.st_ino
                    header = file.readline(_MAX_ROW)
                    if not _HEADER.fullmatch(header):
                        self.inode = 0
                        return 0, 0
                    self.offset = len(header)
                file.seek(self.offset)
                start = self.offset
                while self.offset - start < most and self._read_chunk(file):
                    pass
                return self.offset - start, max(0, status.st_size - self.offset)
        except OSError:  # The file was deleted, or a resumed run is replacing it.
            return 0, 0

    def _read_chunk(self, file: Any) -> bool:
        data = file.read(_CHUNK)
        end = data.rfind(b"\n") + 1
        if not end:
            return False
        self.offset += end
        file.seek(self.offset)
        self._parts.append(_parse_rows(data[:end]))
        return len(data) == _CHUNK

    @property
    def series(self) -> Series:
        if len(self._parts) > 1:
            self._parts = [np.concatenate(self._parts)]
        if not self._parts:
            return _EMPTY
        rows = self._parts[0]
        return Series(rows[:, 0], rows[:, 1])


def _parse_rows(data: bytes) -> Numbers:
    """Parse complete CSV rows, skipping rows that do not contain exactly two numbers."""
    numbers = _parse_numbers(data.replace(b"\r", b"").rstrip(b"\n").replace(b"\n", b","))
    if numbers is None or len(numbers) != 2 * data.count(b"\n"):
        rows = [row for line in data.splitlines() if (row := _parse_row(line)) is not None]
        numbers = np.array(rows, dtype=float)
    return numbers.reshape(-1, 2)


def _parse_numbers(text: bytes) -> Numbers | None:
    try:
        return np.array(text.split(b",")).astype(float)
    except ValueError:
        return None


def _parse_row(line: bytes) -> tuple[float, float] | None:
    try:
        step, value = map(float, line.split(b","))
    except ValueError:
        return None
    return step, value


class CSVMetrics(MetricSource):
    """The CSV files that ``csv_monitor`` writes to a directory, one per metric."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, _CSVFile] = {}

    def update(self) -> float:
        """Read new rows of all files, and return the fraction of all data that has been read."""
        for path in sorted(self._directory.glob("*.csv")):
            name = find_metric_name(path.stem)
            if name not in self._files and not path.is_symlink() and is_metric_file(path):
                self._files[name] = _CSVFile(path)
        each = _MAX_PER_UPDATE // max(len(self._files), 1)
        rests = [file.update(max(each, _CHUNK))[1] for file in self._files.values()]
        done = sum(file.offset for file in self._files.values())
        # The last row can be incomplete.
        is_done = all(rest <= _MAX_ROW for rest in rests)
        return 1.0 if is_done else done / (done + sum(rests))

    @property
    def series(self) -> Mapping[str, Series]:
        """The metrics, keyed by short name."""
        return {name: file.series for name, file in self._files.items()}


class EventMetrics(MetricSource):
    """The scalars in the TensorBoard event files of a directory."""

    def __init__(self, directory: Path) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        # 0 keeps all values.
        self._accumulator: Any = EventAccumulator(str(directory), size_guidance={"scalars": 0})
        self._series: dict[str, Series] = {}

    def update(self) -> float:
        """Read all new events, and return the fraction of the data read so far: always 1.0."""
        self._accumulator.Reload()
        self._series = dict(self._read())
        return 1.0

    def _read(self) -> Iterator[tuple[str, Series]]:
        for tag in self._accumulator.Tags()["scalars"]:
            events = self._accumulator.Scalars(tag)
            name, old = find_metric_name(tag), self._series.get(find_metric_name(tag), _EMPTY)
            if len(old.samples) == len(events) and events[-1].step == old.samples[-1]:
                yield name, old
                continue
            samples = np.array([event.step for event in events], dtype=float)
            yield name, Series(samples, np.array([event.value for event in events], dtype=float))

    @property
    def series(self) -> Mapping[str, Series]:
        """The metrics, keyed by short name."""
        return self._series
