"""The events that a run passes to its monitors."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["METRIC_LABELS", "Event"]

METRIC_LABELS = {
    "train_loss": "loss",
    "lr": "learning rate",
    "momentum": "momentum",
    "weight_decay": "weight decay",
    "grad_norm": "gradient norm",
    "samples_per_second": "samples per second",
    "skipped_steps": "skipped steps",
    "loss_scale": "loss scale",
}
"""Labels of the built-in metrics, in the order in which reports show them.

Metrics that the script defines are shown after the built-in metrics.
"""


class Event(NamedTuple):
    """Value of a metric, such as ``Train/Samples/lr``, after a number of training samples."""

    name: str
    value: float
    samples: int
