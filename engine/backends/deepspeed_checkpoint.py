"""Load DeepSpeed's checkpoint files without running code from them."""

from __future__ import annotations

import contextlib
import importlib
import pickle
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch.serialization import safe_globals

from engine.checkpoint.plain_values import LOADABLE
from engine.errors import CheckpointError

__all__ = ["refuse_pickled_code"]

_CLASSES = {
    "argparse": ["Namespace"],
    "deepspeed.runtime.fp16.loss_scaler": ["DynamicLossScaler", "LossScaler"],
    "deepspeed.runtime.zero.config": ["ZeroStageEnum"],
    "deepspeed.utils.tensor_fragment": ["fragment_address"],
}
"""Classes whose instances DeepSpeed saves; unpickling them runs no code from the file."""


@contextlib.contextmanager
def refuse_pickled_code() -> Iterator[None]:
    """Inside this context, reject checkpoint files that could run code when DeepSpeed loads them.

    Only tensors, plain values and instances of the classes in `_CLASSES` are unpickled. By default,
    DeepSpeed calls ``torch.load`` with ``weights_only=False``, and no setting of DeepSpeed changes
    this.

    Raises:
        CheckpointError: a file contains an object of another class.
    """
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    allowed = [*LOADABLE, *_import_classes()]
    original = TorchCheckpointEngine.load

    def load(self: Any, path: str, map_location: Any = None) -> Any:
        del self
        try:
            with safe_globals(allowed):
                return torch.load(path, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            what = f"an object of `{named[1]}`" if named else "an unknown object"
            raise CheckpointError(
                f"{path} contains {what}, and unpickling it can run code. If you trust the "
                "checkpoint, set `engine.checkpoint.trust_pickle` to true."
            ) from None

    TorchCheckpointEngine.load = load
    try:
        yield
    finally:
        TorchCheckpointEngine.load = original


def _import_classes() -> list[Any]:
    return [
        getattr(importlib.import_module(module), name)
        for module, names in _CLASSES.items()
        for name in names
    ]
