"""Load DeepSpeed checkpoints with the PyTorch backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorProperties, TensorStorageMetadata
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from engine.checkpoint.deepspeed_files import DeepSpeedFiles, SavedTensor
from engine.checkpoint.optimizer_state import KEPT_SETTINGS, list_group_names

__all__ = ["DeepSpeedSource", "has_states_for"]

_ADAM = {"betas", "eps"}, {"exp_avg", "exp_avg_sq"}
_KINDS: Mapping[type[Optimizer], tuple[set[str], set[str]]] = {
    Adam: _ADAM,
    AdamW: _ADAM,  # not a subclass of Adam in PyTorch 2.6
    SGD: ({"momentum"}, {"momentum_buffer"}),
    RMSprop: ({"alpha"}, {"square_avg"}),
    Adagrad: ({"lr_decay"}, {"sum"}),
}
"""Maps each optimizer class to its characteristic keys in the param groups and in the states.

The keys identify the saved optimizer, because DeepSpeed does not save its class.
"""


class DeepSpeedSource:
    """Contents of a DeepSpeed checkpoint, under the names that the PyTorch backend uses.

    Args:
        files: files of the checkpoint.
        model: model to load the checkpoint into.
        optimizer: optimizer of the model.
    """

    def __init__(self, files: DeepSpeedFiles, model: nn.Module, optimizer: Optimizer) -> None:
        names = list_group_names(model, optimizer)
        found = {f"model.{name}": value for name, value in files.find_weights(names).items()}
        for name, state in files.find_optimizer_states(names).items():
            if isinstance(state.get("step"), int):  # torch's optimizers count in tensors
                state["step"] = torch.tensor(float(state["step"]))
            found |= {f"optimizer.state.{name}.{key}": value for key, value in state.items()}
        for index, group in enumerate(files.find_param_groups()):
            own = optimizer.param_groups[index] if index < len(optimizer.param_groups) else group
            settings = own.keys() - KEPT_SETTINGS - {"params", "step"}
            found |= {
                f"optimizer.param_groups.{index}.{key}": value
                for key, value in group.items()
                if key in settings
            }
        for name, value in found.items():
            if isinstance(value, Tensor):
                found[name] = SavedTensor(value.shape, [value.flatten()])
        self._tensors = {k: v for k, v in found.items() if isinstance(v, SavedTensor)}
        self.values = {k: v for k, v in found.items() if not isinstance(v, SavedTensor)}

    @property
    def tensors(self) -> Mapping[str, TensorStorageMetadata]:
        """The shape and the dtype of each tensor, by name."""
        return {
            name: TensorStorageMetadata(TensorProperties(tensor.dtype), tensor.shape, [])
            for name, tensor in self._tensors.items()
        }

    def load(self, own: dict[str, Any]) -> None:
        """Copy the saved tensors into the tensors with the same names in ``own``."""
        for name, target in own.items():
            whole = self._tensors[name].read()
            if isinstance(target, DTensor):
                # Each rank shards its local tensor, so no rank waits for another rank.
                whole = distribute_tensor(
                    whole.to(target.device),
                    target.device_mesh,
                    target.placements,
                    src_data_rank=None,
                )
            target.detach().copy_(whole)


def has_states_for(optimizer: Optimizer, files: DeepSpeedFiles, model: nn.Module) -> bool:
    """Return whether ``optimizer`` can load the optimizer state in a checkpoint.

    The saved optimizer must be of the same kind as ``optimizer``, and `_KINDS` must contain this
    kind. Adam and AdamW count as the same kind.
    """
    states = files.find_optimizer_states(list_group_names(model, optimizer)).values()
    groups = files.find_param_groups()
    saved = {key for state in states for key in state if key != "step"}
    for kind, (settings, names) in _KINDS.items():
        if isinstance(optimizer, kind):
            has_settings = all(settings <= group.keys() for group in groups)
            return bool(groups) and has_settings and (names <= saved or not saved)
    return False
