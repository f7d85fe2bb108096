"""Build the training backend that the config selects: PyTorch, FSDP2 or DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from engine.backends.base import Backend
from engine.backends.model_parallelism import (
    check_stages,
    find_data_shard,
    find_model_parallelism,
)
from engine.config import Config
from engine.distributed.ranks import Ranks
from engine.training.optimizers import OptimizerFactory, check_shapes

__all__ = ["build", "find_data_shard", "find_deepspeed_need"]


def find_deepspeed_need(model: nn.Module, **arguments: Any) -> str | None:
    """Return a description of an argument or model feature that requires DeepSpeed, or None.

    Each of ``arguments`` requires DeepSpeed if it is not None. If all are None, the model is
    checked for modules and parameters that require DeepSpeed, such as MoE layers.
    """
    given = [f"the argument `{name}`" for name, value in arguments.items() if value is not None]
    return given[0] if given else find_model_parallelism(model)


def build(
    model: nn.Module,
    optimizer: Optimizer | OptimizerFactory | None,
    config: Config,
    ranks: Ranks,
    *,
    parameters: Iterable[Any] | None = None,
    mpu: Any = None,
    mesh_param: Any = None,
) -> Backend:
    """Build the backend that the config selects.

    Args:
        model: module to train. It is moved to the rank's device and, depending on the config,
            compiled, sharded or set up for activation checkpointing.
        optimizer: the user's optimizer, or a function that takes the parameters and returns an
            optimizer; if None, the config's optimizer is used.
        config: a validated config.
        ranks: rank, world size and device of this process.
        parameters: parameters or param groups to train, as `divide_parameters` returns them; if
            None, all parameters that require gradients.
        mpu: model-parallel unit; DeepSpeed only.
        mesh_param: shape of the device mesh; DeepSpeed only.

    Raises:
        ValueError: the model, parameters, optimizer and config are incompatible, or the model or
            an argument requires DeepSpeed but the config selects the PyTorch backend.
        ImportError: the config selects DeepSpeed, but DeepSpeed is not installed.
    """
    check_stages(model, config)
    groups = None if parameters is None else list(parameters)
    if config.backend.name == "torch":
        check_shapes(model, config.optimizer, groups)
    if config.backend.name == "deepspeed":
        from engine.backends.deepspeed import DeepSpeedBackend

        return DeepSpeedBackend(
            model, optimizer, config, ranks, parameters=groups, mpu=mpu, mesh_param=mesh_param
        )
    if need := find_deepspeed_need(model, mpu=mpu, mesh_param=mesh_param):
        raise ValueError(
            f"{need[0].upper()}{need[1:]} needs DeepSpeed, but this config selects the torch "
            'backend. Set "engine": {"backend": "deepspeed"} in the config.'
        )
    if config.zero_stage > 0 and ranks.world_size > 1:
        from engine.backends.fsdp import FSDPBackend

        return FSDPBackend(model, optimizer, config, ranks, parameters=groups)
    from engine.backends.pytorch import PyTorchBackend

    return PyTorchBackend(model, optimizer, config, ranks, parameters=groups)
