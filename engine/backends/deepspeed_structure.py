"""Check the structure of DeepSpeed's checkpoint files before DeepSpeed loads them.

DeepSpeed loads the weights before it reads the other files. Without these checks, a damaged file
could leave the model with the saved weights and the optimizer with its old state.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint.deepspeed_pickles import read_file
from engine.checkpoint.plain_values import report_damage
from engine.checkpoint.structure import (
    check_param_groups,
    check_parameter_states,
    check_same_structure,
)
from schedules.core.saved_state import describe

__all__ = ["check_structure", "read_weights"]

_OPTIMIZER = "optimizer_state_dict"
_NESTED = ("base_optimizer_state", _OPTIMIZER, "state", "param_groups")
"""Keys of DeepSpeed's optimizer state that hold the state of the wrapped torch optimizer."""


def check_structure(
    engine: Any, directory: Path, weights: Mapping[str, Any], *, strict: bool, trusts: bool
) -> None:
    """Check that this rank's checkpoint files have the structure that DeepSpeed's engine expects.

    Args:
        engine: DeepSpeed's engine.
        directory: directory of the checkpoint.
        weights: meta tensors that `read_weights` returned.
        strict: whether the saved ``state_dict`` must have the same keys as the model's.
        trusts: whether to unpickle objects of any class. Unpickling them can run code from the
            files.

    Raises:
        CheckpointError: a file is damaged.
    """
    root, tag = str(directory.parent), directory.name
    path = Path(engine._get_ckpt_name(root, tag))  # noqa: SLF001  # private in DeepSpeed
    if not path.is_file():
        return  # written by another number of ranks
    values = read_file(path, trusts=trusts)
    with report_damage(path):
        _check_model(values, weights, strict=strict)
        if not engine.zero_optimization():
            _check_optimizer(values.get("optimizer"), engine)
    if engine.zero_optimization() and not engine.zero_nvme_offload_optimizer():
        path = Path(engine._get_zero_ckpt_name(root, tag))  # noqa: SLF001  # private in DeepSpeed
        values = read_file(path, trusts=trusts)
        with report_damage(path):
            check_same_structure(values, {_OPTIMIZER: {}}, "checkpoint")
            _check_optimizer(values[_OPTIMIZER], engine)


def _check_model(values: Any, weights: Mapping[str, Any], *, strict: bool) -> None:
    """Check the contents of this rank's model file.

    Raises:
        ValueError: a value is missing or has the wrong type or shape.
    """
    own: dict[str, Any] = {"dp_world_size": 1, "mp_world_size": 1, "module": {}}
    own |= {"global_steps": 0, "skipped_steps": 0}
    own |= {"global_samples": 0} if "global_samples" in values else {}
    check_same_structure(values, own, "checkpoint")
    saved = values["module"]
    check_same_structure(saved, {key: weights[key] for key in saved if key in weights}, "module")
    if strict and (different := saved.keys() ^ weights.keys()):
        name = describe(min(different, key=str))
        raise ValueError(f"the key {name} is missing from either the model or the saved `module`.")


def read_weights(engine: Any) -> dict[str, Any]:
    """Return the model's ``state_dict`` as DeepSpeed would save it, but with meta tensors.

    With ZeRO stage 3, the result describes the sharded model. In this case, every rank must call
    this function, because DeepSpeed gathers small parameters with a collective operation.
    """
    has_events = engine._optimizer_has_ckpt_event_prologue()  # noqa: SLF001  # private in DeepSpeed
    if has_events:
        engine.optimizer.checkpoint_event_prologue()
    weights = {
        name: torch.empty_like(value, device="meta") if isinstance(value, Tensor) else value
        for name, value in engine.module_state_dict().items()
    }
    if has_events:
        engine.optimizer.checkpoint_event_epilogue()
    return weights


def _check_optimizer(saved: Any, engine: Any) -> None:
    """Check that DeepSpeed's optimizer can load a saved state.

    The state may come from an optimizer of another class, such as FusedAdam instead of AdamW.

    Raises:
        ValueError: a value is missing or has the wrong type or shape.
    """
    own = engine.optimizer.state_dict()
    own_rest = {key: value for key, value in own.items() if key not in _NESTED}
    check_same_structure(saved, own_rest, "optimizer")
    for key in _NESTED[:2]:
        saved, own = saved.get(key, saved), own.get(key, own)
    if not isinstance(own, Mapping):
        return
    check_same_structure(saved, {"state": {}, "param_groups": []}, "optimizer")
    check_param_groups(saved["param_groups"], own["param_groups"])
    # FusedAdam counts the steps in its param groups.
    counts = [group["step"] for group in saved["param_groups"] if "step" in group]
    states = {
        key: {"step": counts[0], **each} if counts and isinstance(each, dict) and each else each
        for key, each in saved["state"].items()
    }
    # At stage 3, the param groups are empty between steps.
    fill = getattr(engine.optimizer, "_set_fp32_optimizer_param_groups", lambda: None)
    clear = getattr(engine.optimizer, "_clear_fp32_optimizer_param_groups", lambda: None)
    fill()
    try:
        groups = engine.basic_optimizer.param_groups
        parameters = dict(enumerate(p for group in groups for p in group["params"]))
        check_parameter_states(states, saved["param_groups"], engine.basic_optimizer, parameters)
    finally:
        clear()
