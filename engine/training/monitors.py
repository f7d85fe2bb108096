"""Monitors by DeepSpeed's names: what each update used and gave, for TensorBoard, CSV and W&B."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from engine.distributed.ranks import Ranks

__all__ = ["Event", "Monitor", "monitors_of"]


class Event(NamedTuple):
    """A value, under the name that DeepSpeed's monitors have for it, at a count of samples."""

    name: str
    value: float
    samples: int


class Monitor(Protocol):
    """Takes the events of an update."""

    def write_events(self, events: Iterable[Event]) -> None:
        """Write them, so that they are there if the process dies next."""
        ...


class TensorBoardMonitor:
    """Writes event files into ``output_path/job_name``."""

    def __init__(self, section: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(_folder(section, "runs")))

    def write_events(self, events: Iterable[Event]) -> None:
        """Write them and flush."""
        for event in events:
            self._writer.add_scalar(event.name, event.value, event.samples)
        self._writer.flush()


class CSVMonitor:
    """Writes a file a name into ``output_path/job_name``: columns step (samples) and the name."""

    def __init__(self, section: Mapping[str, Any]) -> None:
        self._folder = _folder(section, "csv_monitor")
        self._folder.mkdir(parents=True, exist_ok=True)

    def write_events(self, events: Iterable[Event]) -> None:
        """Append a row to each name's file."""
        for event in events:
            path = self._folder / f"{event.name.replace('/', '_')}.csv"
            new = not path.exists()
            with path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                if new:
                    writer.writerow(["step", event.name.rpartition("/")[2]])
                writer.writerow([event.samples, event.value])


class WandbMonitor:
    """Logs to Weights & Biases; offline unless the environment says otherwise (WANDB_MODE)."""

    def __init__(self, section: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                "`wandb.enabled` must be false where wandb is not installed, but is true instead; "
                "`pip install wandb`, or use `tensorboard` or `csv_monitor`."
            ) from error
        self._run = wandb.init(
            project=section["project"],
            group=section["group"],
            entity=section["team"],
            mode=os.environ.get("WANDB_MODE", "offline"),
        )

    def write_events(self, events: Iterable[Event]) -> None:
        """Log them at their count of samples."""
        for event in events:
            self._run.log({event.name: event.value}, step=event.samples)


_KINDS: Mapping[str, Callable[[Mapping[str, Any]], Monitor]] = {
    "tensorboard": TensorBoardMonitor,
    "csv_monitor": CSVMonitor,
    "wandb": WandbMonitor,
}


def monitors_of(sections: Mapping[str, Mapping[str, Any]], ranks: Ranks) -> list[Monitor]:
    """Return the monitors that a config switches on; rank 0's alone.

    Args:
        sections: ``tensorboard``, ``csv_monitor`` and ``wandb``, with their defaults.
        ranks: this process's place.

    Raises:
        ValueError: one cannot be had here.
    """
    if ranks.rank != 0:
        return []
    return [
        kind(sections[name])
        for name, kind in _KINDS.items()
        if sections.get(name, {}).get("enabled")
    ]


def _folder(section: Mapping[str, Any], default: str) -> Path:
    return Path(section["output_path"] or default) / str(section["job_name"])
