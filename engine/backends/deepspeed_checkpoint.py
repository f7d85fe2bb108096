"""Read and check DeepSpeed's checkpoint files before DeepSpeed loads them."""

from __future__ import annotations

import contextlib
import importlib
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import safe_globals

from engine.checkpoint.plain_values import LOADABLE, report_damage
from engine.checkpoint.structure import (
    check_param_groups,
    check_parameter_states,
    check_same_structure,
)
from engine.errors import CheckpointError
from schedules.core.saved_state import describe

__all__ = ["CheckpointFiles"]

_CLASSES = {
    "argparse": ["Namespace"],
    "deepspeed.runtime.fp16.loss_scaler": ["DynamicLossScaler", "LossScaler"],
    "deepspeed.runtime.zero.config": ["ZeroStageEnum"],
    "deepspeed.utils.tensor_fragment": ["fragment_address"],
}
"""Classes whose instances DeepSpeed saves; unpickling them runs no code from the file."""
_OPTIMIZER = "optimizer_state_dict"


class CheckpointFiles:
    """The files of a checkpoint that DeepSpeed loads on this rank.

    DeepSpeed assigns the weights before it reads the other files. Here, all files are read and
    checked first.

    Args:
        directory: directory of the checkpoint.
        trusts_pickle: whether objects of any class are unpickled, which can run code.
    """

    def __init__(self, directory: Path, *, trusts_pickle: bool) -> None:
        self._directory = directory
        self._trusts_pickle = trusts_pickle
        self._loaded: dict[str, Any] = {}

    def check(self, engine: Any, *, optimizer: bool, strict: bool) -> None:
        """Check that the files have the structure of those that DeepSpeed's engine would write.

        Args:
            engine: DeepSpeed's engine.
            optimizer: whether the optimizer will be loaded.
            strict: whether the checkpoint must have all weights of the model.

        Raises:
            CheckpointError: a file is damaged, or contains objects of unknown classes.
        """
        root, tag = str(self._directory.parent), self._directory.name
        has_own_file = bool(engine.zero_optimization())
        saves_optimizer = optimizer and engine.optimizer is not None
        path = engine._get_ckpt_name(root, tag)  # noqa: SLF001  # it has no public name
        if not Path(path).is_file():
            return  # not a checkpoint of DeepSpeed, or one for another number of ranks
        values = self._loaded[path] = self._read(path)
        own: dict[str, Any] = {"dp_world_size": 1, "mp_world_size": 1}
        own |= {"global_steps": 0, "skipped_steps": 0, "module": {}}
        with report_damage(Path(path)):
            own |= {"global_samples": 0} if "global_samples" in values else {}
            check_same_structure(values, own, "checkpoint")
            weights = _read_weights(engine)
            own = {key: each for key, each in weights.items() if strict or key in values["module"]}
            check_same_structure(values["module"], own, "module")
            unknown = values["module"].keys() - weights.keys()
            if strict and unknown:
                raise ValueError(f"the model has no {describe(min(unknown, key=str))}.")
            if saves_optimizer and not has_own_file:
                _check_optimizer(values.get("optimizer"), engine)
        if not saves_optimizer or not has_own_file or engine.zero_nvme_offload_optimizer():
            return
        if values["dp_world_size"] != engine.seq_dp_world_size:
            raise CheckpointError(
                f"{path} was saved with {values['dp_world_size']} data-parallel ranks, but there "
                f"are {engine.seq_dp_world_size} now. DeepSpeed cannot convert the optimizer's "
                "state. Use as many ranks, or pass `load_optimizer_states=False`."
            )
        path = engine._get_zero_ckpt_name(root, tag)  # noqa: SLF001  # it has no public name
        values = self._loaded[path] = self._read(path)
        with report_damage(Path(path)):
            check_same_structure(values, {_OPTIMIZER: {}}, "checkpoint")
            _check_optimizer(values[_OPTIMIZER], engine)

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Let DeepSpeed load the files as they were read here.

        DeepSpeed calls ``torch.load`` with ``weights_only=False`` and has no setting for it.

        Raises:
            CheckpointError: DeepSpeed cannot load a file.
        """
        from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import (
            TorchCheckpointEngine,
        )

        original = TorchCheckpointEngine.load

        def load(_: Any, path: str, map_location: Any = None) -> Any:
            return (
                self._loaded.pop(path) if path in self._loaded else self._read(path, map_location)
            )

        TorchCheckpointEngine.load = load
        try:
            with report_damage(self._directory):
                yield
        finally:
            TorchCheckpointEngine.load = original

    def _read(self, path: str, map_location: Any = "cpu") -> Any:
        if self._trusts_pickle:
            return torch.load(path, map_location=map_location, weights_only=False)
        try:
            with report_damage(Path(path)), safe_globals([*LOADABLE, *_import_classes()]):
                return torch.load(path, map_location=map_location, weights_only=True)
        except CheckpointError as error:
            named = re.search(r"GLOBAL ([\w.]+)", str(error.__cause__))
            if named is None or not isinstance(error.__cause__, pickle.UnpicklingError):
                raise
            raise CheckpointError(
                f"{path} contains an object of `{named[1]}`, and unpickling it can run code. If "
                "you trust the checkpoint, set `engine.checkpoint.trust_pickle` to true."
            ) from None


def _read_weights(engine: Any) -> dict[str, Any]:
    """Return the weights as DeepSpeed saves them: at stage 3, those of a sharded model."""
    has_events = engine._optimizer_has_ckpt_event_prologue()  # noqa: SLF001  # it has no public name
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
    """Check the state of DeepSpeed's optimizer.

    Raises:
        ValueError: a value is missing, or has another type or shape.
    """
    own = engine.optimizer.state_dict()
    check_same_structure(saved, own, "optimizer")
    torch_optimizer = engine.basic_optimizer
    for key in ("base_optimizer_state", _OPTIMIZER):  # where the state of torch's optimizer is
        saved, own = saved.get(key, saved), own.get(key, own)
    if not isinstance(saved, Mapping):
        return
    check_param_groups(saved["param_groups"], own["param_groups"])
    # At stage 3, the param groups are empty between steps.
    fill = getattr(engine.optimizer, "_set_fp32_optimizer_param_groups", lambda: None)
    clear = getattr(engine.optimizer, "_clear_fp32_optimizer_param_groups", lambda: None)
    fill()
    try:
        parameters = [p for group in torch_optimizer.param_groups for p in group["params"]]
        check_parameter_states(saved["state"], torch_optimizer, dict(enumerate(parameters)))
    finally:
        clear()


def _import_classes() -> list[Any]:
    return [
        getattr(importlib.import_module(module), name)
        for module, names in _CLASSES.items()
        for name in names
    ]
