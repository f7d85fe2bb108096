"""Unpickle DeepSpeed's checkpoint files, by default without running code from them."""

from __future__ import annotations

import importlib
import zipfile
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.plain_values import TRUST_FIX, report_damage, unpickle

__all__ = ["import_classes", "read_file"]

_CLASSES = {
    "deepspeed.runtime.fp16.loss_scaler": ["DynamicLossScaler", "LossScaler"],
    "deepspeed.runtime.zero.config": ["ZeroStageEnum"],
    "deepspeed.utils.tensor_fragment": ["fragment_address"],
}
"""Names of DeepSpeed classes whose instances are safe to unpickle, by module."""


class _Attributes:
    """Placeholder for a DeepSpeed class; its instances have attributes but no methods."""


def read_file(path: Path, *, trusts: bool = False) -> Any:
    """Return the contents of a DeepSpeed checkpoint file.

    If ``trusts`` is false, DeepSpeed is not imported, and the file is memory-mapped if possible.

    Args:
        path: file to read.
        trusts: whether to unpickle objects of any class. Unpickling such objects can execute
            arbitrary code from the file.

    Raises:
        CheckpointError: the file is damaged, or ``trusts`` is false and the file contains an object
            that is not a tensor, a plain value or an instance of a class in `_CLASSES`.
    """
    stand_ins = [
        (int if name == "ZeroStageEnum" else _Attributes, f"{module}.{name}")
        for module, names in _CLASSES.items()
        for name in names
    ]
    with report_damage(path):
        if trusts:
            return torch.load(path, map_location="cpu", weights_only=False)
        return unpickle(path, stand_ins, mmap=zipfile.is_zipfile(path), fix=TRUST_FIX)


def import_classes() -> list[Any]:
    """Import and return the DeepSpeed classes in `_CLASSES`."""
    return [
        getattr(importlib.import_module(module), name)
        for module, names in _CLASSES.items()
        for name in names
    ]
