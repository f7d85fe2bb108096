"""Detect models that implement their own parallelism, such as tensor or expert parallelism.

Only the DeepSpeed backend supports such models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from engine.config import Config
from engine.config.batch_sizes import PIPELINE_STAGES, count_ranks_per_model
from engine.distributed.ranks import get_rank, get_world_size

__all__ = ["check_stages", "find_data_shard", "find_model_parallelism"]

_PACKAGES = (
    "deepspeed.moe",
    "deepspeed.module_inject",
    "deepspeed.pipe",
    "deepspeed.runtime.pipe",
    "deepspeed.sequence",
)


def find_model_parallelism(model: nn.Module) -> str | None:
    """Find a module or parameter that implements the model's own parallelism.

    Averaging all gradients of such a model over all ranks would be incorrect. For example, the
    ranks may hold different experts of an MoE layer.

    Returns:
        A noun phrase for error messages, such as "the expert parameter `w`"; None if there is no
        such module or parameter.

    >>> find_model_parallelism(nn.Linear(2, 2))
    """
    for name, module in model.named_modules():
        for cls in type(module).__mro__:
            if cls.__module__.startswith(_PACKAGES):
                return f"the {cls.__name__} in `model{'.' * bool(name)}{name}`"
    for name, parameter in model.named_parameters():
        if not getattr(parameter, "allreduce", True):
            return f"the expert parameter `{name}`"
        if getattr(parameter, "tensor_model_parallel", False):
            return f"the tensor-parallel parameter `{name}`"
        if hasattr(parameter, "ds_id"):
            return f"the parameter `{name}` sharded by `deepspeed.zero.Init`"
    return None


def find_data_shard(model: Any, mpu: Any, mesh_param: Any) -> tuple[int, int] | None:
    """Return the index of this rank's data shard and the number of shards.

    The values are the same as in DeepSpeed. Return None if the arguments do not determine them.

    Args:
        model: model to train. If it is a PipelineModule, its own ``mpu()`` replaces ``mpu``.
        mpu: model-parallel unit, as in ``deepspeed.initialize``.
        mesh_param: pair ``(data_parallel_size, sequence_parallel_size)``.
    """
    if _is_pipeline(model):
        mpu = model.mpu()
    if mpu is not None:
        if hasattr(mpu, "get_data_parallel_world_size"):
            return mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
        if hasattr(mpu, "get_sequence_parallel_world_size"):
            mesh_param = None, mpu.get_sequence_parallel_world_size()
    if not isinstance(mesh_param, Sequence):
        return None
    ranks_per_model = mesh_param[1]
    return get_rank() // ranks_per_model, get_world_size() // ranks_per_model


def check_stages(model: Any, config: Config) -> None:
    """Check that the model is a pipeline with as many stages as the config specifies.

    Without this check, the batch sizes would be validated for the wrong number of data-parallel
    ranks.

    Raises:
        ValueError: the numbers of stages differ, or the model is not a pipeline.
    """
    stages = count_ranks_per_model(config.raw).get(PIPELINE_STAGES)
    own = model.num_stages if _is_pipeline(model) else None
    if stages in {None, own}:
        return
    found = "not a PipelineModule" if own is None else f"a PipelineModule with {own} stages"
    fix = "" if own is None else f", or set it to {own}"
    raise ValueError(
        f"`{PIPELINE_STAGES}` in {config.name} is {stages}, but the model is {found}. Remove the "
        f"key{fix}, or pass a PipelineModule with `num_stages={stages}`."
    )


def _is_pipeline(model: nn.Module) -> bool:
    """Return whether a model is an instance of DeepSpeed's PipelineModule."""
    return any(
        cls.__module__ == "deepspeed.runtime.pipe.module" and cls.__name__ == "PipelineModule"
        for cls in type(model).__mro__
    )
