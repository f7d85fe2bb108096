"""Replace "auto" values in a config, so that the config's schedule can be previewed.

In a run, Hugging Face Transformers replaces the "auto" values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from engine.config.parser import Document

__all__ = ["AutoValues", "replace_auto_values"]

_AUTO = "auto"
_TOTAL_STEPS = 1000


@dataclass(frozen=True)
class AutoValues:
    """Values that replace "auto" in a preview. In a run, Transformers provides the values."""

    learning_rate: float = 5e-5
    """Learning rate of the optimizer. The default is the same as in Transformers."""
    total_steps: int | None = None
    """Length of the run in steps; None to use ``engine.max_duration``, or 1,000 if it is absent."""
    warmup_steps: int | None = None
    """Length of the warmup in steps; None for a tenth of the run."""


def replace_auto_values(document: Document, values: AutoValues) -> tuple[Document, dict[str, Any]]:
    """Replace an "auto" learning rate and "auto" scheduler parameters in a config.

    Returns:
        The document with the replacements, and a dict that maps each replaced parameter of the
        optimizer or scheduler to its new value.
    """
    config = document.value
    if not isinstance(config, dict):
        return document, {}
    optimizer, params = _get_params(config, "optimizer"), _get_params(config, "scheduler")
    own = optimizer.get("lr", _AUTO)
    lr = values.learning_rate if own == _AUTO else own
    run = config.get("engine")
    is_known = isinstance(run, dict) and "max_duration" in run and values.total_steps is None
    total = values.total_steps or _TOTAL_STEPS
    warmup: int | str = "0.1dur" if is_known else max(1, total // 10)
    known = {
        "warmup_min_lr": 0.0,
        "warmup_max_lr": lr,
        "warmup_num_steps": values.warmup_steps or warmup,
        "total_num_steps": "1dur" if is_known else total,
    }
    for_schedule = {name: known[name] for name in known if params.get(name) == _AUTO}
    for_optimizer = {"lr": lr} if optimizer.get("lr") == _AUTO else {}
    changed = dict(config)
    if for_schedule:
        changed["scheduler"] = {**config["scheduler"], "params": {**params, **for_schedule}}
    if for_optimizer:
        changed["optimizer"] = {**config["optimizer"], "params": {**optimizer, **for_optimizer}}
    return replace(document, value=changed), {**for_optimizer, **for_schedule}


def _get_params(config: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    block = config.get(section)
    params = block.get("params") if isinstance(block, dict) else None
    return params if isinstance(params, dict) else {}
