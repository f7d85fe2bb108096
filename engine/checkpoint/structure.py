"""Check that saved values have the same structure as the values of this run."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from schedules.core.saved_state import describe

__all__ = [
    "HYPERPARAMETERS",
    "check_param_groups",
    "check_parameter_states",
    "check_same_structure",
]

_IMPLEMENTATION = {"fused", "foreach"}
"""Settings of a param group that only select an implementation, so they are not restored."""
_NOT_IN_TEMPLATES = {*_IMPLEMENTATION, "capturable", "params"}
_MAX_INT = 2**63 - 1
_MAX_FLOAT = torch.finfo(torch.float32).max
"""Largest finite float32 number: the limit for the numeric settings of a param group."""
HYPERPARAMETERS = ("lr", "momentum", "betas", "weight_decay")
"""Settings of a param group that a checkpoint must contain if the optimizer has them."""


def check_same_structure(saved: Any, own: Any, name: str) -> None:
    """Check that a saved value has the same type and structure as this run's value.

    If this run's value is None, the saved value may have any type. A saved list may be longer than
    this run's list, and a saved mapping may have more keys.

    Args:
        saved: value in the checkpoint.
        own: corresponding value of this run.
        name: name of the value, for the error message.

    Raises:
        ValueError: if a key or an item is missing, or a value has the wrong type or shape.

    >>> check_same_structure({"last_epoch": "3"}, {"last_epoch": 0}, "lr_scheduler")
    Traceback (most recent call last):
    ValueError: `lr_scheduler.last_epoch` must be a number, got '3'.
    """
    kind = _classify(own)
    if kind == "nothing":
        return
    if _classify(saved) != kind:
        raise ValueError(f"`{name}` must be {kind}, got {describe(saved)}.")
    if isinstance(own, Mapping):
        for key, value in own.items():
            if key not in saved:
                raise ValueError(f"`{name}` must have the key {describe(key)}.")
            check_same_structure(saved[key], value, f"{name}.{key}")
    elif kind == "a list":
        _check_items(saved, own, name)
    elif kind == "a tensor" and saved.shape != own.shape:
        raise ValueError(
            f"`{name}` must have the shape {tuple(own.shape)}, got {tuple(saved.shape)}."
        )
    elif kind == "a number":
        _check_number(saved, own, name)
    elif hasattr(own, "__dict__"):
        check_same_structure(vars(saved), vars(own), name)


def _classify(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, Tensor) and value.dim() == 0:
        is_real = value.dtype != torch.bool and not value.is_complex()
        return "a number" if is_real else f"of type {value.dtype}"
    if isinstance(value, int | float | np.generic):
        return "a number"
    for kind, word in (
        (Tensor, "a tensor"),
        (Mapping, "a mapping"),
        (list | tuple, "a list"),
        (str, "a string"),
    ):
        if isinstance(value, kind):
            return word
    return "an object" if hasattr(value, "__dict__") else f"of type {type(value).__name__}"


def _check_items(saved: Sequence[Any], own: Sequence[Any], name: str) -> None:
    if len(saved) < len(own) or (isinstance(own, tuple) and len(saved) != len(own)):
        raise ValueError(f"`{name}` must have length {len(own)}, got {len(saved)}.")
    for index, value in enumerate(saved):
        check_same_structure(
            value, own[min(index, len(own) - 1)] if own else None, f"{name}[{index}]"
        )


def _check_number(saved: Any, own: Any, name: str) -> None:
    is_huge = isinstance(saved, int) and abs(saved) > _MAX_INT
    if is_huge or (isinstance(own, int) and isinstance(saved, float) and not math.isfinite(saved)):
        raise ValueError(f"`{name}` must be a finite number, got {describe(saved)}.")


def check_param_groups(saved: Any, own: Sequence[Mapping[str, Any]]) -> None:
    """Check that an optimizer can continue with the settings of saved param groups.

    Args:
        saved: param groups in the checkpoint.
        own: param groups of this run. Their ``params`` are names or indices, as in ``saved``.

    Raises:
        ValueError: if a value is missing, has the wrong type or is out of range.
    """
    name = "optimizer.param_groups"
    check_same_structure(saved, [], name)
    if len(saved) != len(own):
        raise ValueError(f"`{name}` must have length {len(own)}, got {len(saved)}.")
    for index, (group, own_group) in enumerate(zip(saved, own, strict=True)):
        check_same_structure(group, {}, f"{name}[{index}]")
        _check_group(group, own_group, f"{name}[{index}]")


def check_parameter_states(
    saved: Any,
    groups: Sequence[Mapping[str, Any]],
    optimizer: Optimizer,
    parameters: Mapping[Any, Tensor],
) -> None:
    """Check that an optimizer can continue with the saved states of its parameters.

    Settings such as ``amsgrad`` determine the structure of a state. The states must fit both the
    saved settings and this run's settings. The values of tensors are not checked, except for step
    counts.

    Args:
        saved: state of each parameter that has a state, keyed by the parameter's name or index.
        groups: saved param groups that passed `check_param_groups`. Their ``params`` use the
            same names or indices as the keys of ``saved``.
        optimizer: optimizer of this run, with or without state.
        parameters: parameters of the optimizer, keyed by name or index.

    Raises:
        ValueError: if a value is missing, has the wrong type or shape, or is out of range.
    """
    check_same_structure(saved, {}, "optimizer.state")
    templates = _Templates(optimizer)
    group_of = {key: group for group in groups for key in group["params"]}
    for key, values in saved.items():
        name = f"optimizer.state[{describe(key)}]"
        if key not in parameters:
            raise ValueError(f"`{name}` does not belong to a parameter of the optimizer.")
        check_same_structure(values, {}, name)
        for settings in ({}, group_of.get(key, {})):
            _check_parameter_state(values, templates.build(parameters[key], settings), name)


def _check_group(group: Mapping[str, Any], own: Mapping[str, Any], name: str) -> None:
    for key, value in own.items():
        if key in group and key not in _IMPLEMENTATION:
            exact = tuple(value) if isinstance(value, list) else value
            check_same_structure(group[key], exact, f"{name}.{key}")
        elif key in {*HYPERPARAMETERS, "params"}:
            raise ValueError(f"`{name}` must have the key `{key}`.")
    if list(group["params"]) != list(own["params"]):
        raise ValueError(
            f"`{name}.params` must list the same parameters as this run, in the same order."
        )
    for key in own.keys() & group.keys() - {"params"}:
        limits = [abs(each) <= _MAX_FLOAT for each in _list_numbers(own[key])]
        for value in _list_numbers(group[key]) if limits and all(limits) else ():
            is_valid = 0 <= value < 1 if key == "betas" else abs(value) <= _MAX_FLOAT
            if not is_valid:
                limit = ">= 0 and < 1" if key == "betas" else "a finite float32 number"
                raise ValueError(f"`{name}.{key}` must be {limit}, got {value}.")


def _list_numbers(value: Any) -> list[float]:
    values = value if isinstance(value, list | tuple) else [value]
    return [float(each) for each in values if _classify(each) == "a number"]


def _check_parameter_state(
    values: Mapping[str, Any], template: Mapping[str, Any], name: str
) -> None:
    if values and template:
        for key in template:
            if key not in values:
                raise ValueError(f"`{name}` must have the key {describe(key)}.")
    for key, value in values.items():
        check_same_structure(value, template.get(key), f"{name}.{key}")
        if key == "step" and _classify(value) == "a number" and not 0 <= float(value) < math.inf:
            raise ValueError(f"`{name}.step` must be >= 0 and finite, got {describe(value)}.")


class _Templates:
    """Builder of the expected optimizer state of a parameter.

    For an optimizer class in `torch.optim`, the state comes from a temporary optimizer that takes
    one step on a small stand-in with the same number of dimensions. For any other class, a step
    could have side effects, so the current state of the parameter is used.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._kind = type(optimizer)
        self._is_known = getattr(torch.optim, self._kind.__name__, None) is self._kind
        accepted = inspect.signature(self._kind).parameters if self._is_known else ()
        self._accepted = {*accepted} - _NOT_IN_TEMPLATES
        self._groups = {
            id(parameter): group
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        self._own: Mapping[Tensor, Mapping[str, Any]] = optimizer.state
        self._known: dict[Any, Mapping[str, Any]] = {}

    def build(self, parameter: Tensor, saved: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the expected state of a parameter, or an empty mapping if the state is unknown.

        The tensors may be meta tensors, because only their shapes are compared.

        Args:
            parameter: parameter of the optimizer.
            saved: saved settings that override this run's settings of the param group.
        """
        group = self._groups.get(id(parameter))
        if group is None or not self._is_known:
            return self._own.get(parameter, {})
        settings = {
            key: value for key, value in {**group, **saved}.items() if key in self._accepted
        }
        dimensions = parameter.dim()
        structure = {k: v if isinstance(v, bool) else bool(v) for k, v in settings.items()}
        key = (dimensions, *structure.items())
        if key not in self._known:
            self._known[key] = self._take_step(dimensions, settings)
        return {name: _scale(value, parameter.shape) for name, value in self._known[key].items()}

    def _take_step(self, dimensions: int, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        small = torch.zeros([2] * dimensions, requires_grad=True)
        small.grad = torch.zeros_like(small)
        try:
            copy = self._kind([small], **settings)
            copy.step()
        except (TypeError, ValueError, RuntimeError):
            return {}  # such as LBFGS, because it needs a closure
        return dict(copy.state[small])


def _scale(value: Any, shape: torch.Size) -> Any:
    """Return the optimizer-state value that a parameter of the given shape would have.

    A tensor with as many dimensions as ``shape`` becomes a meta tensor, in which each size of 2 is
    replaced by the corresponding size in ``shape``. Any other value is returned unchanged.

    Args:
        value: value in the optimizer state of a small stand-in for the parameter. The stand-in has
            size 2 in each dimension.
        shape: shape of the parameter.
    """
    if not isinstance(value, Tensor) or value.dim() != len(shape) or not shape:
        return value
    sizes = [own if small == 2 else small for own, small in zip(shape, value.shape, strict=True)]
    return torch.empty(sizes, device="meta")
