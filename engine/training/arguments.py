"""Check the arguments that a script passes to `initialize`."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from engine.config.optimizer_types import CLOSURE_FIX, needs_closure

__all__ = [
    "check_are_in_model",
    "check_arguments",
    "check_is_trainable",
    "check_needs_no_closure",
]


def check_arguments(
    args: Any, model: Any, optimizer: Any, training_data: Any, lr_scheduler: Any
) -> None:
    """Check the types of the arguments that a script passes to `initialize`.

    Raises:
        ValueError: an argument has the wrong type, for example a class instead of an instance.
    """
    # A dict may hold a parsed command line, but without a model it is probably a misplaced config.
    is_config = type(args) is dict and not isinstance(model, nn.Module)
    is_misplaced = isinstance(args, nn.Module | str | os.PathLike | type) or is_config
    _check(
        not is_misplaced,
        f"`args`, the first argument, must be a parsed command line, got {_describe(args)}. "
        "Pass the other arguments by name, as in `initialize(model=model, config=config)`.",
    )
    _check(
        isinstance(model, nn.Module),
        f"`model` must be a torch.nn.Module, got {_describe(model)}. Pass the model to train.",
    )
    _check(
        not isinstance(training_data, type | str | os.PathLike),
        f"`training_data` must be a dataset or a data loader, got {_describe(training_data)}. Pass "
        "an instance, such as `TensorDataset(x, y)`.",
    )
    is_several = isinstance(optimizer, list | tuple | dict)
    _check(
        not is_several,
        f"`optimizer` must be one optimizer, got {_describe(optimizer)}. To train several modules, "
        "such as those of a GAN, call `initialize` once for each module. To use different "
        "hyperparameters within a module, pass one optimizer with several param groups.",
    )
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        _check_factory("optimizer", optimizer, argument="parameters")
    check_needs_no_closure(optimizer)
    has_step = hasattr(lr_scheduler, "step") and not isinstance(lr_scheduler, type)
    if lr_scheduler is not None and not has_step:
        _check_factory("lr_scheduler", lr_scheduler, argument="optimizer")


def check_needs_no_closure(optimizer: Any) -> None:
    """Check that an optimizer or optimizer class does not require a closure.

    Raises:
        ValueError: the method ``step`` requires a closure.
    """
    cls = optimizer if isinstance(optimizer, type) else type(optimizer)
    _check(
        not needs_closure(cls),
        f"`optimizer` must not be {cls.__name__}, which needs a closure. {CLOSURE_FIX}",
    )


def check_is_trainable(model: nn.Module) -> None:
    """Check that at least one parameter of a model requires gradients.

    Raises:
        ValueError: no parameter requires gradients.
    """
    count = sum(1 for _ in model.parameters())
    _check(
        any(parameter.requires_grad for parameter in model.parameters()),
        f"`model` must have at least one parameter that requires gradients, got 0 of {count}. "
        "Before you call `initialize`, unfreeze the parameters to train. To unfreeze them later, "
        "pass them as `model_parameters`.",
    )


def check_are_in_model(model: nn.Module, groups: Iterable[Any], backend: str) -> None:
    """Check that all parameters in ``groups`` belong to the model.

    The backend neither saves parameters outside of the model nor averages their gradients.

    Args:
        model: module to train.
        groups: parameters or param groups to train.
        backend: name of the backend, for the error message.

    Raises:
        ValueError: a parameter does not belong to the model.
    """
    known = {id(parameter) for parameter in model.parameters()}
    for each in groups:
        for parameter in each["params"] if isinstance(each, dict) else [each]:
            _check(
                id(parameter) in known,
                f"With {backend}, `model_parameters` and the optimizer must contain only "
                f"parameters of `model`, got a parameter of shape {tuple(parameter.shape)} that is "
                "not in the model. Register its module in the model, as in `model.criterion = "
                "criterion`, or use the PyTorch backend without ZeRO.",
            )


def _check_factory(name: str, value: Any, *, argument: str) -> None:
    """Check that a value is a function that can be called with one argument."""
    kind = name.removeprefix("lr_")
    _check(
        callable(value),
        f"`{name}` must be a torch {kind} or a function that takes the {argument}, got "
        f"{_describe(value)}. Pass one of these, or set `{kind}` in the config.",
    )
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):  # some functions that are written in C have no signature
        return
    try:
        signature.bind(None)
    except TypeError as error:
        builder = getattr(value, "__name__", "build")
        raise ValueError(
            f"`{name}` must be callable with the {argument} as its only argument, got "
            f"{_describe(value)}: {error}. Pass `lambda {argument}: {builder}({argument}, …)`."
        ) from None


def _check(is_valid: bool, message: str) -> None:  # reads like an assertion
    if not is_valid:
        raise ValueError(message)


def _describe(value: Any) -> str:
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"a value of type {type(value).__name__}"
