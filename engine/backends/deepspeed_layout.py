"""Check that a checkpoint fits the model and the optimizer before DeepSpeed loads it.

DeepSpeed assigns the weights before it finds that the rest of a checkpoint does not fit. At ZeRO
stage 3, it copies tensors of different shapes into each other's memory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.checkpoint.deepspeed_files import DeepSpeedFiles
from engine.errors import CheckpointError

__all__ = ["Layout"]

_FILE = "layout.json"


class Layout:
    """Records the shapes and dtypes of a model's weights, and the parameter shapes of param groups.

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

    def check(self, files: DeepSpeedFiles, *, optimizer: bool, strict: bool) -> None:
        """Check that a checkpoint fits the model and the optimizer.

        If DeepSpeed alone wrote the checkpoint, the layout is read from its own files.

        Args:
            files: files of the checkpoint.
            optimizer: whether the optimizer will be loaded.
            strict: whether the checkpoint and the model must have the same weights.

        Raises:
            CheckpointError: the checkpoint does not fit.
        """
        from engine.checkpoint.state import check_weights  # takes 50 ms, so import only if needed

        checkpoint_dir = files.directory
        if (checkpoint_dir / _FILE).is_file():
            found = json.loads((checkpoint_dir / _FILE).read_text(encoding="utf-8"))
        else:
            groups = files.get_group_shapes() or self._groups
            if files.zero_stage == 3:
                groups = _merge_parts(groups, [len(group) for group in self._groups])
            found = {"weights": files.get_shapes(), "groups": groups}
        saved = {
            name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
            for name, (shape, dtype) in found["weights"].items()
        }
        own = self._read_weights(frozen=True)
        if not strict:
            own = {name: tensor for name, tensor in own.items() if name in saved}
        check_weights(checkpoint_dir, own, saved, strict=strict)
        if optimizer and found["groups"] != self._groups:
            counts, own_counts = (
                [len(g) for g in each] for each in (found["groups"], self._groups)
            )
            raise CheckpointError(
                f"{checkpoint_dir} does not match the optimizer: its param groups have {counts} "
                f"parameters in the checkpoint, {own_counts} now, or their shapes differ. Build "
                "the optimizer that was saved, or pass `load_optimizer_states=False`."
            )

    def _read_weights(self, *, frozen: bool) -> dict[str, Tensor]:
        """Return a dict from the name of each weight to a meta tensor with its shape and dtype."""
        return {
            name: torch.empty(_get_shape(value), dtype=value.dtype, device="meta")
            for name, value in self._model.state_dict(keep_vars=True).items()
            if isinstance(value, Tensor)
            and (frozen or value.requires_grad or not isinstance(value, nn.Parameter))
        }


def _merge_parts(parts: list[list[Any]], sizes: list[int]) -> list[list[Any]]:
    """Merge parts of param groups, as large as ``sub_group_size``, that ZeRO stage 3 saves.

    Args:
        parts: parameters of each part.
        sizes: number of parameters in each param group now. A group ends at the end of a part.

    >>> _merge_parts([[1, 2], [3], [4, 5]], [3, 2]), _merge_parts([[1, 2], [3]], [1, 2])
    ([[1, 2, 3], [4, 5]], [[1, 2], [3]])
    """
    merged, rest = [], list(parts)
    for size in sizes:
        group: list[Any] = []
        while rest and len(group) < size:
            group += rest.pop(0)
        merged.append(group)
    return merged + rest


def _get_shape(tensor: Any) -> list[int]:
    return list(getattr(tensor, "ds_shape", tensor.shape))  # at stage 3, `shape` is that of a part
