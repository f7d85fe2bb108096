"""Check that a checkpoint fits the model and the optimizer before DeepSpeed loads it.

DeepSpeed assigns the weights before it finds that the rest of a checkpoint does not fit. At ZeRO
stage 3, it copies tensors of different shapes into each other's memory.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.checkpoint.plain_values import report_damage
from engine.errors import CheckpointError
from schedules.core.saved_state import Count, describe, restore

__all__ = ["Layout"]

_FILE = "layout.json"


class Layout:
    """The shapes and dtypes of a model's weights, and the shapes in each param group.

    Args:
        model: model before or after DeepSpeed has sharded it.
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
        """Write the layout to a checkpoint.

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

    def check(self, checkpoint_dir: Path, *, optimizer: bool, strict: bool) -> None:
        """Check that a checkpoint fits, if it has a layout.

        Args:
            checkpoint_dir: directory of the checkpoint.
            optimizer: whether the optimizer will be loaded.
            strict: whether the checkpoint and the model must have the same weights.

        Raises:
            CheckpointError: the checkpoint does not fit.
        """
        from engine.checkpoint.state import check_weights  # takes 50 ms, so import only if needed

        if not (checkpoint_dir / _FILE).is_file():
            return
        with report_damage(checkpoint_dir / _FILE):
            text = (checkpoint_dir / _FILE).read_text(encoding="utf-8")
            found: _Saved = restore(_Saved, json.loads(text), "layout")
            saved = {
                name: torch.empty(shape, dtype=_find_dtype(dtype), device="meta")
                for name, (shape, dtype) in found.weights.items()
            }
        own = self._read_weights(frozen=True)
        if not strict:
            own = {name: tensor for name, tensor in own.items() if name in saved}
        check_weights(checkpoint_dir, own, saved, strict=strict)
        groups = [[list(shape) for shape in group] for group in found.groups]
        if optimizer and groups != self._groups:
            counts, own_counts = ([len(g) for g in each] for each in (groups, self._groups))
            raise CheckpointError(
                f"{checkpoint_dir} does not match the optimizer: its param groups have {counts} "
                f"parameters in the checkpoint, {own_counts} now, or their shapes differ. Build "
                "the optimizer that was saved, or pass `load_optimizer_states=False`."
            )

    def _read_weights(self, *, frozen: bool) -> dict[str, Tensor]:
        """Return meta tensors with the shapes and dtypes of the model's weights, by name."""
        return {
            name: torch.empty(_get_shape(value), dtype=value.dtype, device="meta")
            for name, value in self._model.state_dict(keep_vars=True).items()
            if isinstance(value, Tensor)
            and (frozen or value.requires_grad or not isinstance(value, nn.Parameter))
        }


@dataclass(frozen=True)
class _Saved:
    """The contents of the file: the shape and dtype of each weight, and the shapes per group."""

    weights: dict[str, tuple[tuple[Count, ...], str]]
    groups: tuple[tuple[tuple[Count, ...], ...], ...]


def _find_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"a dtype must be that of a tensor, got {describe(name)}.")  # noqa: TRY004
    return dtype


def _get_shape(tensor: Any) -> list[int]:
    return list(getattr(tensor, "ds_shape", tensor.shape))  # at stage 3, `shape` is that of a part
