"""Structure of the file that stores a run's counters, schedule and position in the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from engine.checkpoint.plain_values import TRUST_FIX, read_values, report_damage
from engine.training.progress import Counters
from schedules.core.fields import Range
from schedules.core.saved_state import OPTIONAL, Count, Size, restore

__all__ = ["check_foreign_run", "read_run"]

_CountOrNone = Annotated[int, Range(at_least=-1)]


@dataclass(frozen=True)
class _Position:
    """The result of `DataPosition.get_state`."""

    epoch: _CountOrNone
    given: int
    """Number of micro-batches requested from the data loader so far in the current epoch.

    Some earlier versions saved a negative number, which `DataPosition.read` replaces with 0.
    """
    finished: Count = field(default=0, metadata=OPTIONAL)


@dataclass(frozen=True)
class _Batch:
    """Batch sizes of a run.

    ``world_size`` is set only in checkpoints from old versions of onecycle.
    """

    train: Size
    accumulation: Size
    micro: Any = field(default=None, metadata=OPTIONAL)
    data_ranks: Any = field(default=None, metadata=OPTIONAL)
    unit: Any = field(default=None, metadata=OPTIONAL)
    world_size: Any = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True)
class _Metric:
    """The result of `BestMetric.state_dict`."""

    name: str
    mode: Literal["min", "max"]
    value: float | None
    step: Count
    misses: Count
    last_step: _CountOrNone


@dataclass(frozen=True)
class _SavedRun:
    """Saved state of a run, except for the model and the optimizer."""

    lr_scheduler: dict[Any, Any] | None
    counters: Counters
    loader: _Position | None
    client_state: dict[Any, Any]
    monitors: dict[str, Size] = field(default_factory=dict, metadata=OPTIONAL)
    batch: _Batch | None = field(default=None, metadata=OPTIONAL)
    best: _Metric | None = field(default=None, metadata=OPTIONAL)


def read_run(path: Path, *, trusts: bool = False) -> dict[str, Any]:
    """Read a run's saved state, and check its structure.

    Args:
        path: file to read.
        trusts: whether to unpickle objects of any class from ``client_state``.

    Raises:
        CheckpointError: if the file is damaged or contains untrusted objects.
    """
    values: dict[str, Any] = read_values(path, trusts=trusts, fix=TRUST_FIX)
    with report_damage(path):
        restore(_SavedRun, values, path.stem)
        _check_counters(values["counters"])
    return values


def check_foreign_run(values: Mapping[str, Any]) -> None:
    """Validate the run state that `DeepSpeedFiles.read_run_state` returned.

    Raises:
        ValueError: if a value has the wrong type or is out of range.
    """
    counters = asdict(Counters()) | values["counters"]
    batch = values["batch"] | {"accumulation": 1}  # unknown
    whole = {**values, "loader": None, "counters": counters, "batch": batch}
    restore(_SavedRun, whole, "checkpoint")
    _check_counters(counters)


def _check_counters(values: Mapping[str, Any]) -> None:
    counters = Counters(**values)
    if counters.applied_steps < 0:
        raise ValueError(
            f"`engine.counters.skipped_steps` must be <= `global_steps` "
            f"({counters.global_steps}), got {counters.skipped_steps}."
        )
