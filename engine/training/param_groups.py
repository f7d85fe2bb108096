"""Divide a model's parameters into the param groups that the config's optimizer describes."""

from __future__ import annotations

import difflib
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from engine.config import Config
from engine.config.optimizer_block import OptimizerBlock
from engine.config.param_groups import GroupSettings
from engine.display.param_groups import GroupRow
from engine.training.activation_checkpointing import find_blocks

__all__ = ["ParamGroup", "build_param_groups", "divide_parameters"]

_HEAD = re.compile(r"(^|[._])(head|heads|classifier|fc|fc_norm|score|logits|qa_outputs)\b")
"""Matches the usual names of output layers, which some models register before their blocks."""
_BLOCK_LISTS = {"block", "blocks", "h", "layer", "layers", "resblocks"}
"""Usual names of a transformer's list of blocks."""
_SYNTAX = re.compile(r"[\\^$.*+?()\[\]{}|]+")
_REST = "default"


@dataclass(frozen=True)
class ParamGroup:
    """A param group: parameters that share the same hyperparameters.

    Args:
        name: unique name of the group.
        entry: index of the entry in the config's ``optimizer.param_groups`` that selects the
            parameters; None if no entry selects them.
        parameters: dict that maps the name of each parameter to the parameter.
        hyperparameters: hyperparameters to use instead of those in ``optimizer.params``.
    """

    name: str
    entry: int | None
    parameters: Mapping[str, nn.Parameter]
    hyperparameters: Mapping[str, Any]

    def to_torch(self) -> dict[str, Any]:
        """Return the group in the form that optimizers accept."""
        hyperparameters = dict(self.hyperparameters)
        if "betas" in hyperparameters:
            hyperparameters["betas"] = tuple(hyperparameters["betas"])
        return {"params": list(self.parameters.values()), "name": self.name, **hyperparameters}

    def describe(self, block: OptimizerBlock, schedules: Mapping[int, str]) -> GroupRow:
        """Return a description of the group, without its tensors.

        Args:
            block: the config's ``optimizer`` block.
            schedules: type of each group's own schedule, keyed by the index of the group's entry in
                the config's ``optimizer.param_groups``.
        """
        shown = [key for key in ("lr", "weight_decay") if key in block.params]
        values = {key: block.params[key] for key in shown} | dict(self.hyperparameters)
        values.pop("wd_mult", None)  # redundant: the weight decay is already 0
        return GroupRow(
            name=self.name,
            entry=self.entry,
            hyperparameters=values,
            parameters=list(self.parameters),
            num_elements=sum(getattr(p, "ds_numel", p.numel()) for p in self.parameters.values()),
            schedule=None if self.entry is None else schedules.get(self.entry),
        )


def divide_parameters(
    model: nn.Module, config: Config, parameters: Iterable[Any] | None
) -> tuple[list[Any] | None, list[GroupRow]]:
    """Divide a model's parameters into param groups if the config defines any.

    Args:
        model: module to train.
        config: a validated config.
        parameters: parameters, ``(name, parameter)`` pairs, or param groups to train. Defaults to
            all parameters that require gradients.

    Returns:
        A tuple of the param groups for the optimizer and a description of each group. If the config
        defines no groups, the second item is empty, and the first is ``parameters`` as a list, or
        None if ``parameters`` is None.

    Raises:
        ValueError: the config's groups do not match the model, or ``parameters`` already contains
            param groups although the config defines groups.
    """
    given = None if parameters is None else [_list_members(each) for each in parameters]
    block = config.optimizer
    if block is None or not block.group_keys:
        return given, []
    groups = build_param_groups(model, block, given, config.model.wrap_classes)
    types = {index: own.type_name for index, own in block.group_schedules.items()}
    return (
        [group.to_torch() for group in groups],
        [group.describe(block, types) for group in groups],
    )


def _list_members(each: Any) -> Any:
    """Convert a param group's parameters to a list, and remove the names of named parameters.

    ``each`` is a param group or a single parameter. The parameters of a group may be a generator,
    which can be iterated only once. A named parameter is a ``(name, parameter)`` pair.
    """
    if isinstance(each, dict):
        members = each["params"]
        members = [members] if isinstance(members, torch.Tensor) else members
        return {**each, "params": [_list_members(member) for member in members]}
    is_named = isinstance(each, tuple) and len(each) == 2  # from `model.named_parameters()`
    return each[1] if is_named else each


def build_param_groups(
    model: nn.Module,
    block: OptimizerBlock,
    parameters: Iterable[Any] | None = None,
    wrap: Sequence[str] = (),
) -> list[ParamGroup]:
    """Divide a model's parameters into param groups.

    A parameter belongs to the first entry of the config's ``optimizer.param_groups`` with a pattern
    that matches one of the parameter's names. The parameters that match no entry form the last
    group. ``no_decay`` and ``layer_decay`` divide these groups further.

    Args:
        model: module whose parameters are trained.
        block: the config's ``optimizer`` block.
        parameters: parameters to train. Defaults to all parameters that require gradients.
        wrap: class names of the blocks for ``layer_decay``; see `find_blocks`.

    Raises:
        ValueError: a pattern selects none of the parameters to train, ``parameters`` contains param
            groups or parameters outside the model, or the model has no blocks for ``layer_decay``.

    >>> settings = GroupSettings("head", ("^1",), {"lr": 0.1}, no_decay=False)
    >>> block = OptimizerBlock("SGD", {"lr": 0.01, "weight_decay": 0.0}, (settings,))
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    >>> [(group.name, list(group.parameters)) for group in build_param_groups(model, block)]
    [('head', ['1.weight', '1.bias']), ('default', ['0.weight', '0.bias'])]
    """
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    if parameters is None:
        trained = [each for each in names if each.requires_grad]
    else:
        trained = list(parameters)
        _check_not_grouped_twice(trained, block)
        _check_are_named(trained, names)
    entry_of = _assign_entries(block.param_groups, trained, names)
    scales = _find_layers(model, names, block.layer_decay, wrap) if block.layer_decay != 1 else {}
    exempt = _find_without_decay(model, names)
    found: dict[tuple[Any, ...], list[nn.Parameter]] = {}
    for parameter in trained:
        entry = entry_of.get(parameter)
        settings = _get_settings(block, entry)
        is_exempt = settings.no_decay and parameter in exempt
        order = len(block.param_groups) if entry is None else entry
        key = (order, entry, scales.get(parameter), is_exempt)
        found.setdefault(key, []).append(parameter)
    return [
        _build_group(block, key, {names[each][0]: each for each in found[key]})
        for key in sorted(found, key=lambda key: (key[0], key[2] or 0, key[3]))
    ]


def _check_not_grouped_twice(parameters: Sequence[Any], block: OptimizerBlock) -> None:
    """Check that ``parameters`` contains no param groups if the config already defines groups.

    Raises:
        ValueError: both ``parameters`` and the config define param groups.
    """
    if block.group_keys and any(isinstance(each, dict) for each in parameters):
        raise ValueError(
            f"`model_parameters` must be parameters, not param groups, because the config has "
            f"`{block.group_keys[0]}`. Pass the parameters, or remove the key from the config."
        )


def _check_are_named(
    parameters: Sequence[nn.Parameter], names: Mapping[nn.Parameter, list[str]]
) -> None:
    for parameter in parameters:
        if parameter not in names:
            raise ValueError(
                "`model_parameters` must contain only parameters of `model`, got a parameter of "
                f"shape {tuple(parameter.shape)} that is not in the model. Register it in the "
                "model, because the config assigns parameters to groups by name."
            )


def _get_settings(block: OptimizerBlock, entry: int | None) -> GroupSettings:
    if entry is None:
        return GroupSettings(_REST, (), {}, block.no_decay)
    return block.param_groups[entry]


def _build_group(
    block: OptimizerBlock, key: tuple[Any, ...], parameters: Mapping[str, nn.Parameter]
) -> ParamGroup:
    order, entry, layer, is_exempt = key
    settings = _get_settings(block, entry)
    hyperparameters = dict(settings.hyperparameters)
    name = settings.name
    is_ambiguous = name in {_REST, *(each.name for each in block.param_groups[:order])}
    if entry is not None and is_ambiguous:
        name = f"{name} ({entry})"
    if layer is not None:
        depth, count = layer
        lr = hyperparameters.get("lr", block.params["lr"])
        hyperparameters["lr"] = lr * block.layer_decay ** (count - depth)
        name = f"{name}, layer {depth}"
    if is_exempt:
        # A schedule of the weight decay multiplies it by `wd_mult`.
        hyperparameters |= {"weight_decay": 0.0, "wd_mult": 0.0}
        name = f"{name}, no decay"
    return ParamGroup(name, entry, parameters, hyperparameters)


def _assign_entries(
    entries: Sequence[GroupSettings],
    trained: Sequence[nn.Parameter],
    names: Mapping[nn.Parameter, list[str]],
) -> dict[nn.Parameter, int]:
    """Return a dict that maps each selected parameter to the index of its entry.

    If several entries select a parameter, the first one applies.

    Raises:
        ValueError: a pattern matches no parameter in ``trained``, or only parameters that earlier
            entries already select.
    """
    found: dict[nn.Parameter, int] = {}
    for index, entry in enumerate(entries):
        selected = set()
        for pattern in entry.patterns:
            search = re.compile(pattern).search
            matched = {p: None for p, own in names.items() if any(map(search, own))}
            free = [p for p in trained if p in matched and p not in found]
            if not free:
                place = f"`optimizer.param_groups.{index}.params`"
                raise ValueError(_explain_empty(place, pattern, list(matched), found, names))
            selected |= set(free)
        found |= dict.fromkeys(selected, index)
    return found


def _explain_empty(
    place: str,
    pattern: str,
    matched: Sequence[nn.Parameter],
    found: Mapping[nn.Parameter, int],
    names: Mapping[nn.Parameter, list[str]],
) -> str:
    taken = [each for each in matched if each in found]
    if taken:
        name, entry = names[taken[0]][0], found[taken[0]]
        return (
            f"{place} must match a parameter that no earlier entry selects, got {pattern!r}. "
            f"`optimizer.param_groups.{entry}` already selects `{name}`. Move this entry before "
            f"`optimizer.param_groups.{entry}`."
        )
    if matched:
        return (
            f"{place} must match a parameter that is trained, got {pattern!r}. The pattern matches "
            f"only parameters that are not trained, such as `{names[matched[0]][0]}`. Unfreeze the "
            "parameters, or remove the entry."
        )
    near = _find_near_names(pattern, [name for own in names.values() for name in own])
    listed = ", ".join(f"`{name}`" for name in near)
    fix = (
        f"Similar names: {listed}."
        if near
        else "Use a name that `onecycle config --model` lists, or a part of one."
    )
    return f"{place} must match the name of a parameter, got {pattern!r}. {fix}"


def _find_near_names(pattern: str, names: Sequence[str]) -> list[str]:
    """Return up to three names of modules or parameters that are similar to a pattern."""
    plain = _SYNTAX.sub(".", pattern).strip(".")
    candidates: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        for index in range(len(parts)):
            candidates |= {".".join(parts[: index + 1]): None, ".".join(parts[index:]): None}
            candidates[parts[index]] = None
    folded = {each.lower(): each for each in reversed(candidates) if not each.isdigit()}
    near = difflib.get_close_matches(plain.lower(), list(folded), n=3, cutoff=0.6)
    return [folded[each] for each in near]


def _find_without_decay(
    model: nn.Module, names: Mapping[nn.Parameter, list[str]]
) -> set[nn.Parameter]:
    """Return the parameters that usually have no weight decay.

    These are biases, parameters of normalization layers, and all other parameters with at most one
    dimension.
    """
    found = {
        parameter
        for parameter, own in names.items()
        if len(getattr(parameter, "ds_shape", parameter.shape)) <= 1
        or any(name.rpartition(".")[2].endswith("bias") for name in own)
    }
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            found.update(module.parameters(recurse=False))
    return found


def _find_layers(
    model: nn.Module,
    names: Mapping[nn.Parameter, list[str]],
    layer_decay: float,
    wrap: Sequence[str],
) -> dict[nn.Parameter, tuple[int, int]]:
    """Return a dict that maps each parameter to ``(index of its layer, index of the last layer)``.

    Layer 0 contains the parameters before the first block, layer 1 the first block, layer 2 the
    second block, and so on. The last layer contains the parameters after the last block.

    Raises:
        ValueError: the model has no blocks.
    """
    blocks = _find_outermost_blocks(model, wrap)
    if not blocks:
        raise ValueError(
            "`optimizer.layer_decay` must be 1 if the blocks of the model cannot be found, got "
            f'{layer_decay:g}. List the class names of the blocks in "engine": '
            '{"wrap": […]}, or set the learning rates in `optimizer.param_groups`.'
        )
    in_block = {p: index for index, each in enumerate(blocks, 1) for p in each.parameters()}
    order = {parameter: position for position, parameter in enumerate(names)}
    starts = [min(order[p] for p in each.parameters()) for each in blocks]
    last = len(blocks) + 1
    found = {}
    for parameter, own in names.items():
        passed = bisect_right(starts, order[parameter])
        layer = in_block.get(parameter, passed + 1 if passed else 0)
        is_head = parameter not in in_block and layer == 0 and _HEAD.search(own[0])
        found[parameter] = (last if is_head else layer, last)
    return found


def _find_outermost_blocks(model: nn.Module, wrap: Sequence[str]) -> list[nn.Module]:
    """Return the blocks that are not inside another block, in the order of `model.parameters()`.

    The blocks are the modules that `find_blocks` returns. If ``wrap`` is empty, the children of
    a Sequential are also blocks under two conditions: there are at least two children, all of the
    same class, and the last part of the Sequential's name is in `_BLOCK_LISTS`.
    """
    blocks = find_blocks(model, wrap)
    for name, module in () if wrap else model.named_modules():
        members = list(module.children())
        is_list = isinstance(module, nn.Sequential) and name.rpartition(".")[2] in _BLOCK_LISTS
        if is_list and len(members) > 1 and len({type(member) for member in members}) == 1:
            blocks += members
    inner = {id(each) for block in blocks for each in block.modules() if each is not block}
    order = {parameter: position for position, parameter in enumerate(model.parameters())}
    found = [
        each for each in blocks if id(each) not in inner and any(True for _ in each.parameters())
    ]
    return sorted(found, key=lambda block: min(order[each] for each in block.parameters()))
