"""Check that a checkpoint fits the model and the optimizer before DeepSpeed loads it.

DeepSpeed loads the weights first. If the rest of the checkpoint does not fit, loading fails only
after the model has changed. With ZeRO stage 3, DeepSpeed copies saved weights into parameters even
if the shapes differ.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.checkpoint.deepspeed_files import DeepSpeedFiles
from engine.checkpoint.plain_values import report_damage
from engine.errors import CheckpointError
from schedules.core.saved_state import Count, restore

__all__ = ["Layout"]

_FILE = "layout.json"
_FIX = "Build the optimizer with the same param groups, or pass `load_optimizer_states=False`."


class Layout:
    """The shapes and dtypes of a model's weights, and the parameter shapes of each param group.

    Args:
        model: model to describe; DeepSpeed may already have sharded it.
        groups: parameters or param groups to train, before DeepSpeed flattens them.
    """

    def __init__(self, model: nn.Module, groups: list[Any]) -> None:
        self._model = model
        is_one_group = not any(isinstance(each, dict) for each in groups)
        self._groups = [
            [_get_shape(parameter) for parameter in each["params"]]
            for each in ([{"params": groups}] if is_one_group else groups)
        ]

    def write(self, checkpoint_dir: Path, *, frozen: bool) -> None:
        """Write the layout to ``layout.json`` in the checkpoint directory.

        Args:
            checkpoint_dir: directory of the checkpoint.
            frozen: whether the checkpoint contains the parameters that do not require gradients.
        """
        weights = {
            name: (list(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in self._read_weights(frozen=frozen).items()
        }
        (checkpoint_dir / _FILE).write_text(
            json.dumps({"weights": weights, "groups": self._groups}), encoding="utf-8"
        )

    def check(self, files: DeepSpeedFiles, *, optimizer: bool, strict: bool) -> None:
        """Check that a checkpoint fits the model and the optimizer.

        The saved shapes and dtypes are read from ``layout.json``. If this file does not exist, they
        are read from DeepSpeed's own files.

        Args:
            files: files of the checkpoint.
            optimizer: whether the optimizer's state will be loaded.
            strict: whether the checkpoint must contain the same weight names as the model.

        Raises:
            CheckpointError: the checkpoint does not fit the model or the optimizer.
        """
        from engine.checkpoint.state import check_weights  # takes 50 ms, so import only if needed

        path, groups = files.directory / _FILE, None
        weights: Any = files.get_shapes()
        if path.is_file():
            with report_damage(path):
                found = json.loads(path.read_text(encoding="utf-8"))
                restore(_Saved, found, "layout")
            weights, groups = found["weights"], found["groups"]
        saved = {
            name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
            for name, (shape, dtype) in weights.items()
        }
        own = self._read_weights(frozen=True)
        if not strict:
            own = {name: tensor for name, tensor in own.items() if name in saved}
        check_weights(files.directory, own, saved, strict=strict)
        if optimizer and groups is not None and groups != self._groups:
            counts, own_counts = ([len(g) for g in each] for each in (groups, self._groups))
            problem = (
                "the shapes of the parameters differ between the checkpoint and this run"
                if counts == own_counts
                else f"the numbers of parameters in the param groups are {counts} in the "
                f"checkpoint and {own_counts} in this run"
            )
            raise CheckpointError(
                f"{files.directory} does not match the optimizer: {problem}. {_FIX}"
            )
        if optimizer and groups is None and not files.is_universal:
            self._check_groups(files)

    def _check_groups(self, files: DeepSpeedFiles) -> None:
        """Check the param groups of a checkpoint that does not contain ``layout.json``."""
        groups, shapes = files.find_param_groups(), files.get_trained_shapes()
        own_shapes = sorted(shape for group in self._groups for shape in group)
        if len(groups) != len(self._groups):
            raise CheckpointError(
                f"{files.directory} does not match the optimizer: the number of param groups is "
                f"{len(groups)} in the checkpoint and {len(self._groups)} in this run. {_FIX}"
            )
        if shapes not in (None, own_shapes):
            raise CheckpointError(
                f"{files.directory} does not match the optimizer: the shapes of the trainable "
                f"parameters differ between the checkpoint and this run. {_FIX}"
            )

    def _read_weights(self, *, frozen: bool) -> dict[str, Tensor]:
        """Return meta tensors with the unsharded shapes of the weights, keyed by weight name.

        Args:
            frozen: whether to include frozen parameters.
        """
        return {
            name: torch.empty(_get_shape(value), dtype=value.dtype, device="meta")
            for name, value in self._model.state_dict(keep_vars=True).items()
            if isinstance(value, Tensor)
            and (frozen or value.requires_grad or not isinstance(value, nn.Parameter))
        }


@dataclass(frozen=True)
class _Saved:
    """Contents of ``layout.json``."""

    weights: dict[str, tuple[tuple[Count, ...], str]]
    """Shape and dtype of each weight, by name."""
    groups: tuple[tuple[tuple[Count, ...], ...], ...]
    """Shapes of the parameters in each param group."""


def _get_shape(tensor: Any) -> list[int]:
    return list(getattr(tensor, "ds_shape", tensor.shape))  # at stage 3, `shape` is that of a part
