"""Find models that implement their own parallelism, which only DeepSpeed supports."""

from __future__ import annotations

from torch import nn

__all__ = ["find_model_parallelism"]

_PACKAGES = (
    "deepspeed.moe",
    "deepspeed.module_inject",
    "deepspeed.pipe",
    "deepspeed.runtime.pipe",
    "deepspeed.sequence",
)


def find_model_parallelism(model: nn.Module) -> str | None:
    """Return the part of a model that implements its own parallelism, such as an MoE layer.

    Return None if the model has no such part. Averaging all gradients over all ranks would be
    incorrect for a model with such a part: for example, each rank may hold different experts.

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
