"""Run settings that the user enters on the config page of ``onecycle ui``."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from engine.config.batch_sizes import (
    BATCH_KEYS,
    BatchError,
    BatchSizes,
    DataRanks,
    derive_batch_sizes,
)

__all__ = ["RunSettings", "find_batch_sizes"]

_MAX = 10**15


@dataclass(frozen=True)
class RunSettings:
    """Run settings that are not in the config. Each is None if unknown."""

    world_size: int | None = None
    steps_per_epoch: int | None = None
    dataset_size: int | None = None
    """Number of samples in the dataset."""
    steps: int | None = None
    """Number of steps to plot."""
    parameters: int | None = None
    """Number of parameters in the model, used to estimate its memory."""

    @classmethod
    def from_json(cls, values: Any) -> RunSettings:
        """Build the settings from a JSON object sent by the config page of ``onecycle ui``.

        Raises:
            ValueError: a value is neither null nor a whole number from 1 to `_MAX`.
        """
        given = values if isinstance(values, Mapping) else {}
        known = {each.name: given.get(each.name) for each in fields(cls)}
        for name, value in known.items():
            if value is not None and (type(value) is not int or not 1 <= value <= _MAX):
                raise ValueError(
                    f"`{name}` must be a whole number from 1 to {_MAX:,}, got {value!r}."
                )
        return cls(**known)

    def count_steps_per_epoch(
        self, config: Mapping[str, Any], batch: BatchSizes | None
    ) -> int | None:
        """Return the number of optimizer steps per epoch, or None if it is unknown.

        If the user has not entered the number, compute it from the size of the dataset, as the
        engine does for the data loaders that it builds.
        """
        if self.steps_per_epoch is not None or self.dataset_size is None or batch is None:
            return self.steps_per_epoch
        if config.get("dataloader_drop_last") is True:
            return self.dataset_size // batch.train or None
        return -(-self.dataset_size // batch.train)


def find_batch_sizes(config: Mapping[str, Any], ranks: DataRanks | None) -> BatchSizes | None:
    """Return the batch sizes of a config, or None if they are unknown or inconsistent.

    Args:
        config: config without invalid values.
        ranks: number of data-parallel ranks; None if unknown.
    """
    given = {key: config[key] for key in BATCH_KEYS if type(config.get(key)) is int}
    if ranks is None or not given:
        return None
    with contextlib.suppress(BatchError):
        return derive_batch_sizes(given, ranks)
    return None
