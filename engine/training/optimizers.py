"""Build the optimizer that a config describes, and use a fused kernel if one is available."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from engine.config.optimizer_block import OptimizerBlock
from engine.config.schema import is_import_path, optimizer_name, optimizer_schema
from schedules.core.imports import import_attribute

__all__ = [
    "NoOptimizer",
    "OptimizerFactory",
    "build_optimizer",
    "check_modes",
    "check_shapes",
    "has_no_optimizer",
    "is_buildable",
    "set_optimizer_mode",
]

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
"""Function that takes parameters or param groups and returns an optimizer for them."""

_FUSED_OPTIMIZERS = {"Adam", "AdamW", "SGD"}


class NoOptimizer(Optimizer):
    """An optimizer without parameters, for an engine that only runs inference.

    >>> NoOptimizer().param_groups
    [{'params': []}]
    """

    def __init__(self) -> None:
        super().__init__([{"params": []}], {})


def has_no_optimizer(optimizer: Optimizer) -> bool:
    """Return whether an optimizer is a `NoOptimizer`, which an inference-only engine uses."""
    return isinstance(optimizer, NoOptimizer)


def build_optimizer(
    block: OptimizerBlock, parameters: Iterable[Any], *, may_fuse: bool = True
) -> Optimizer:
    """Build the optimizer described by the config's `optimizer` block.

    A custom class, such as ``"my_module:MyOptimizer"``, is imported.

    Args:
        block: type and hyperparameters of the optimizer.
        parameters: tensors or param groups. Hyperparameters in a group override the block's
            hyperparameters.
        may_fuse: whether to use a fused kernel if there is one. Fused kernels do not support sparse
            gradients.

    Raises:
        ValueError: a custom class cannot be imported, or does not accept the hyperparameters.

    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> params = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "dampening": 0.0}
    >>> build_optimizer(OptimizerBlock("SGD", params), [weight]).defaults["momentum"]
    0.9
    """
    name, groups = block.type, list(parameters)
    if is_import_path(name):
        return _build_custom(name, groups, _convert(block.params))
    properties = optimizer_schema(name)["properties"]
    # A validated block sets keys of DeepSpeed only to values that PyTorch's optimizers always use.
    params = {
        key: value
        for key, value in block.params.items()
        if properties.get(key, {}).get("x-backend") != "deepspeed"
    }
    if params.pop("adam_w_mode", False) and name == "Adam":
        name = "AdamW"
    is_chosen = any(params.get(key) is not None for key in ("fused", "foreach"))
    may_fuse &= not params.pop("torch_adam", False) and not is_chosen
    # The momentum buffers of fused SGD start at zero, which is wrong with dampening.
    has_dampening = any(isinstance(group, dict) and group.get("dampening") for group in groups)
    has_dampening |= bool(params.get("dampening"))
    if has_dampening and params.get("fused"):
        raise ValueError(
            "`fused` must be false with `dampening`, because PyTorch's fused SGD computes wrong "
            "first steps. Remove `fused` from optimizer.params."
        )
    may_fuse &= not has_dampening
    if name in _FUSED_OPTIMIZERS and may_fuse and _has_fused_kernel(name, groups):
        params["fused"] = True
    optimizer = _construct(getattr(torch.optim, name), groups, _convert(params))
    if name == "SGD" and params.get("fused"):
        optimizer.register_step_pre_hook(_start_momenta)
    return optimizer


def set_optimizer_mode(optimizer: Optimizer, *, training: bool) -> None:
    """Switch an optimizer to train or eval mode if it has the methods ``train`` and ``eval``.

    Schedule-free optimizers have these methods. In eval mode, such an optimizer replaces the
    model's weights with their average over past steps.
    """
    if _has_modes(optimizer):
        getattr(optimizer, "train" if training else "eval")()


def check_modes(optimizer: Optimizer, wrapper: Optimizer) -> None:
    """Check that a schedule-free optimizer holds the weights of the model, not copies.

    Args:
        optimizer: unwrapped torch optimizer.
        wrapper: the backend's optimizer; ``optimizer`` itself if the backend does not wrap it.

    Raises:
        ValueError: the optimizer is schedule-free, and DeepSpeed has wrapped it.
    """
    if _has_modes(optimizer) and wrapper is not optimizer:
        raise ValueError(
            f"{type(optimizer).__name__} replaces the model's weights in eval mode. The DeepSpeed "
            'backend does not support this with ZeRO or 16-bit training. Set "engine": {"backend": '
            '"torch"} in the config.'
        )


def _has_modes(optimizer: Optimizer) -> bool:
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def _convert(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of ``params`` with ``betas`` as a tuple, as in PyTorch's defaults."""
    has_list = isinstance(params.get("betas"), list)
    return {**params, "betas": tuple(params["betas"])} if has_list else dict(params)


def _build_custom(path: str, groups: list[Any], params: Mapping[str, Any]) -> Optimizer:
    optimizer_class = import_attribute(path)
    try:
        optimizer: Optimizer = optimizer_class(groups, **params)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The optimizer {path} cannot be built with `optimizer.params` "
            f"{json.dumps(dict(params))}: {error}"
        ) from error
    return optimizer


def _start_momenta(optimizer: Optimizer, *_: Any) -> None:
    """Create a zero-filled momentum buffer for each parameter that has a gradient but no buffer.

    PyTorch's fused SGD fails if only some parameters have a momentum buffer. It also leaves new
    buffers uninitialized if a non-finite gradient makes its kernel skip the first step. Without
    dampening, a zero-filled buffer gives the same result as no buffer.
    """
    state, groups = optimizer.state, optimizer.param_groups
    if len(state) == sum(len(group["params"]) for group in groups):
        return
    for group in groups:
        for parameter in group["params"] if group["momentum"] else ():
            if parameter.grad is not None and state[parameter].get("momentum_buffer") is None:
                state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _construct(
    optimizer_class: type[Optimizer], groups: list[Any], params: Mapping[str, Any]
) -> Optimizer:
    """Construct an optimizer in time linear in the number of param groups.

    `Optimizer.add_param_group` compares each new group with all earlier groups. For 10,000 groups,
    these comparisons take half a minute. This function compares each new group with a set of all
    earlier parameters instead.
    """
    optimizer = optimizer_class.__new__(optimizer_class)
    known: set[torch.Tensor] = set()

    def add_param_group(group: dict[str, Any]) -> None:
        earlier, optimizer.param_groups = optimizer.param_groups, []
        optimizer_class.add_param_group(optimizer, group)
        if not known.isdisjoint(group["params"]):
            raise ValueError(
                "Some parameters appear in more than one parameter group. Pass each parameter once."
            )
        known.update(group["params"])
        earlier.extend(optimizer.param_groups)
        optimizer.param_groups = earlier

    # The constructor calls the method of this name.
    vars(optimizer)["add_param_group"] = add_param_group
    optimizer_class.__init__(optimizer, groups, **params)
    del vars(optimizer)["add_param_group"]
    return optimizer


def check_shapes(
    model: nn.Module, block: OptimizerBlock | None, parameters: list[Any] | None
) -> None:
    """Check that the config's optimizer supports the shapes of the parameters to train.

    PyTorch's Muon supports only 2D parameters.

    Args:
        model: module to train.
        block: optimizer block of the config; None if the script passes an optimizer.
        parameters: parameters or param groups to train. Defaults to all parameters that require
            gradients.

    Raises:
        ValueError: the optimizer does not support the shape of at least one parameter.
    """
    if block is None or block.type != "Muon":
        return
    given = [p for p in model.parameters() if p.requires_grad] if parameters is None else parameters
    trained = [p for each in given for p in (each["params"] if isinstance(each, dict) else [each])]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    invalid = [parameter for parameter in trained if parameter.ndim != 2]
    if invalid:
        shown = ", ".join(
            f"`{names.get(id(p), 'a parameter')}` of shape {tuple(p.shape)}" for p in invalid[:3]
        )
        raise ValueError(
            f"PyTorch's Muon supports only 2D parameters, but {len(invalid)} of {len(trained)} "
            f"parameters are not 2D, for example {shown}. Pass only 2D parameters as "
            '`model_parameters`, or set "engine": {"backend": "deepspeed"} so that DeepSpeed '
            "trains the other parameters with Adam."
        )


def is_buildable(block: Mapping[str, Any]) -> bool:
    """Return whether the DeepSpeed backend can use `build_optimizer` for an ``optimizer`` block.

    The result is False if the type or one of the params is specific to one backend, or if
    ``torch_adam`` is false, which selects DeepSpeed's own Adam.

    >>> is_buildable({"type": "AdamW"}), is_buildable({"type": "Lamb"})
    (True, False)
    """
    schema = optimizer_schema(optimizer_name(block["type"]) or "")
    properties = schema["properties"]
    params = block.get("params", {})
    has_deepspeed_keys = any("x-backend" in properties.get(key, {}) for key in params)
    wants_deepspeed_adam = params.get("torch_adam") is False
    is_torch = not {"x-backend", "x-selects"} & schema.keys()
    return is_torch and not has_deepspeed_keys and not wants_deepspeed_adam


def _has_fused_kernel(name: str, groups: list[Any]) -> bool:
    tensors = [
        tensor
        for group in groups
        for tensor in (group["params"] if isinstance(group, dict) else [group])
    ]
    # torch 2.13's fused SGD on the CPU updates only the end of a 16-bit tensor, and it does not
    # support sharded tensors.
    return all(
        tensor.dtype in {torch.float32, torch.float64}
        and tensor.device.type in {"cpu", "cuda"}
        and not (name == "SGD" and isinstance(tensor, DTensor))
        for tensor in tensors
    )
