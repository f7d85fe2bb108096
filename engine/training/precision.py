"""Prepare a model for 16-bit training: autocast, float32 weights, and casts of layer inputs."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = [
    "AutocastMethod",
    "autocast_methods",
    "cast_layer_inputs",
    "convert_to_float32",
    "find_methods",
    "restore_methods",
]


class AutocastMethod:
    """A bound method that runs under autocast.

    If the module is copied or unpickled, the method is bound to the new module and its weights.

    Args:
        method: bound method of a module.
        device_type: type of the device that autocast applies to, such as "cuda".
        dtype: ``torch.bfloat16`` or ``torch.float16``.
    """

    __wrapped__: Callable[..., Any]

    def __init__(self, method: Callable[..., Any], device_type: str, dtype: torch.dtype) -> None:
        functools.update_wrapper(self, method)
        self.device_type = device_type
        self.dtype = dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the method under autocast."""
        with torch.autocast(self.device_type, dtype=self.dtype):
            return self.__wrapped__(*args, **kwargs)


def find_methods(model: nn.Module) -> list[str]:
    """Return the names of a model's public methods that ``nn.Module`` does not have.

    >>> find_methods(nn.Linear(2, 2))
    ['reset_parameters']
    """
    return [
        name
        for name in dir(type(model))
        if not name.startswith("_")
        and not hasattr(nn.Module, name)
        and isinstance(inspect.getattr_static(type(model), name), types.FunctionType)
    ]


def autocast_methods(model: nn.Module, device_type: str, dtype: torch.dtype) -> None:
    """Wrap ``forward`` and the methods that `find_methods` lists, so that they run under autocast.

    >>> model = nn.Linear(2, 2)
    >>> autocast_methods(model, "cpu", torch.bfloat16)
    >>> model(torch.ones(1, 2)).dtype
    torch.bfloat16
    """
    for name in ("forward", *find_methods(model)):
        setattr(model, name, AutocastMethod(getattr(model, name), device_type, dtype))


def restore_methods(model: nn.Module) -> None:
    """Restore the methods that `autocast_methods` replaced in a model."""
    for name, method in list(vars(model).items()):
        if isinstance(method, AutocastMethod):
            delattr(model, name)
            if getattr(model, name) != method.__wrapped__:  # it was set on the instance
                setattr(model, name, method.__wrapped__)


def convert_to_float32(
    parameters: Iterable[nn.Parameter], optimizer: Optimizer | None = None
) -> torch.dtype | None:
    """Convert trainable 16-bit parameters to float32 in place, so that small updates are not lost.

    A bfloat16 weight has 8 bits of precision, so adding 1e-5 to a weight of 1.0 has no effect.

    Args:
        parameters: parameters of the model. Parameters that do not require gradients stay
            unchanged.
        optimizer: optimizer whose state for these parameters is also converted.

    Returns:
        The previous dtype of the converted parameters, or None if no parameter was converted.

    >>> weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    >>> convert_to_float32([weight]), weight.dtype
    (torch.bfloat16, torch.float32)
    """
    found = None
    states = {} if optimizer is None else optimizer.state
    for parameter in parameters:
        dtype = parameter.dtype
        if not parameter.requires_grad or dtype not in {torch.bfloat16, torch.float16}:
            continue
        found = dtype
        parameter.data = parameter.data.float()
        if parameter.grad is not None:
            parameter.grad = parameter.grad.float()
        state = states.get(parameter, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dtype == dtype:
                state[key] = value.float()
    return found


def cast_layer_inputs(model: nn.Module, dtype: torch.dtype) -> list[Any]:
    """Register hooks that cast the floating-point inputs of a model's layers to a 16-bit dtype.

    A layer is a module with floating-point parameters and no submodules, such as ``nn.Linear``.
    Tensors that are not passed to a layer, such as targets for the loss, keep their dtype.

    Returns:
        Handles for removing the hooks.
    """
    layers = [module for module in model.modules() if not any(True for _ in module.children())]
    return [
        layer.register_forward_pre_hook(_InputCast(dtype), with_kwargs=True)
        for layer in layers
        if any(parameter.is_floating_point() for parameter in layer.parameters())
    ]


class _InputCast:
    """Forward pre-hook that casts floating-point tensors to a dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        del module
        return _cast(args, self._dtype), _cast(kwargs, self._dtype)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Cast floating-point tensors, including those in nested containers, to a dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in {list, tuple}:
        return type(value)(_cast(each, dtype) for each in value)
    if type(value) is dict:
        return {name: _cast(each, dtype) for name, each in value.items()}
    return value
