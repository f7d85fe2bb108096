"""Monitors that write each step's metrics to TensorBoard, CSV files or Weights & Biases."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from engine.distributed.ranks import Ranks

__all__ = ["CSVMonitor", "Event", "Monitor", "TensorBoardMonitor", "WandbMonitor", "build_monitors"]


class Event(NamedTuple):
    """A metric's name (as in DeepSpeed), its value, and the number of samples trained on so far."""

    name: str
    value: float
    samples: int


class Monitor(Protocol):
    """Interface of the monitors: writes the metrics of each step."""

    def write_events(self, events: Iterable[Event]) -> None:
        """Write the events of a step without delay, so that a crash does not lose them."""
        ...


class TensorBoardMonitor:
    """Writes TensorBoard event files to ``output_path/job_name``."""

    def __init__(self, section: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(_get_output_directory(section, "runs")))

    def write_events(self, events: Iterable[Event]) -> None:
        """Add each event as a scalar, then flush the event file."""
        for event in events:
            self._writer.add_scalar(event.name, event.value, event.samples)
        self._writer.flush()


class CSVMonitor:
    """Writes one CSV file per metric to ``output_path/job_name``.

    Each row contains the number of samples so far and the value of the metric.
    """

    def __init__(self, section: Mapping[str, Any]) -> None:
        self._directory = _get_output_directory(section, "csv_monitor")
        self._directory.mkdir(parents=True, exist_ok=True)

    def write_events(self, events: Iterable[Event]) -> None:
        """Append a row to the CSV file of each event's metric."""
        for event in events:
            path = self._directory / f"{event.name.replace('/', '_')}.csv"
            new = not path.exists()
            with path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                if new:
                    writer.writerow(["step", event.name.rpartition("/")[2]])
                writer.writerow([event.samples, event.value])


class WandbMonitor:
    """Logs metrics to Weights & Biases, in offline mode unless ``WANDB_MODE`` is set."""

    def __init__(self, section: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                "`wandb.enabled` is true, but wandb is not installed. Run "
                "`pip install wandb`, or use `tensorboard` or `csv_monitor`."
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


_MONITOR_TYPES: Mapping[str, Callable[[Mapping[str, Any]], Monitor]] = {
    "tensorboard": TensorBoardMonitor,
    "csv_monitor": CSVMonitor,
    "wandb": WandbMonitor,
}


def build_monitors(sections: Mapping[str, Mapping[str, Any]], ranks: Ranks) -> list[Monitor]:
    """Build the monitors that the config enables. On ranks other than 0, return an empty list.

    Args:
        sections: config sections ``tensorboard``, ``csv_monitor`` and ``wandb``, with defaults
            filled in.
        ranks: rank, world size and device of this process.

    Raises:
        ValueError: if ``wandb`` is enabled, but the package is not installed.
    """
    if ranks.rank != 0:
        return []
    return [
        kind(sections[name])
        for name, kind in _MONITOR_TYPES.items()
        if sections.get(name, {}).get("enabled")
    ]


def _get_output_directory(section: Mapping[str, Any], default: str) -> Path:
    return Path(section["output_path"] or default) / str(section["job_name"])
