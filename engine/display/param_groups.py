"""Format the param groups of a run, with their parameters and hyperparameters."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.config.wording import count_noun

__all__ = ["GroupRow", "abbreviate_names", "format_param_groups"]

_SHOWN_NAMES = 3
_SHOWN_GROUPS = 60
_PLACE = "\0"
_INDEX = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True)
class GroupRow:
    """A param group without its tensors, as shown in the log.

    Args:
        name: name of the group.
        entry: index of the group's entry in the config's ``optimizer.param_groups``; None if no
            entry selects the parameters.
        hyperparameters: values to show, such as the learning rate.
        parameters: names of the parameters.
        num_elements: total number of elements of the parameters.
        schedule: type of the schedule that the config sets for this group only, if any.
    """

    name: str
    entry: int | None
    hyperparameters: Mapping[str, Any]
    parameters: Sequence[str]
    num_elements: int
    schedule: str | None = None


def format_param_groups(groups: Sequence[GroupRow]) -> Iterator[str]:
    """Yield one line per param group, with aligned columns.

    >>> print(*format_param_groups([GroupRow("head", 0, {"lr": 0.1}, ["head.bias"], 8)]))
    0  head  lr 0.1  1 parameter, 8 elements: head.bias
    """
    rows = [
        (str(index), group.name, _format_values(group), _format_parameters(group))
        for index, group in enumerate(groups[:_SHOWN_GROUPS])
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)] if rows else []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        yield "  ".join([*cells, row[-1]])
    if len(groups) > _SHOWN_GROUPS:
        yield f"… {count_noun(len(groups) - _SHOWN_GROUPS, 'more group')}"


def _format_values(group: GroupRow) -> str:
    values = [f"{name} {_format_value(each)}" for name, each in group.hyperparameters.items()]
    return ", ".join([*values, *([group.schedule] if group.schedule else [])])


def _format_value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_format_value, value))})"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _format_parameters(group: GroupRow) -> str:
    count = count_noun(len(group.parameters), "parameter")
    names = abbreviate_names(group.parameters)
    shown = ", ".join(names[:_SHOWN_NAMES])
    more = f", … ({len(names) - _SHOWN_NAMES} more)" if len(names) > _SHOWN_NAMES else ""
    return f"{count}, {group.num_elements:,} elements: {shown}{more}"


def abbreviate_names(names: Sequence[str]) -> list[str]:
    """Merge names that differ only in their indices, such as the names of transformer layers.

    Names are merged only if every combination of their indices occurs.

    >>> abbreviate_names(["h.0.bias", "h.1.bias", "h.2.bias", "head.bias"])
    ['h.0-2.bias', 'head.bias']
    >>> abbreviate_names(["h.0.1", "h.1.0"])
    ['h.0.1', 'h.1.0']
    >>> abbreviate_names(["h.0.mlp.0.bias", "h.0.mlp.2.bias", "h.1.mlp.0.bias", "h.1.mlp.2.bias"])
    ['h.0-1.mlp.0,2.bias']
    """
    templates: dict[str, list[list[int]]] = {}
    for name in names:
        indices = [int(each) for each in _INDEX.findall(name)]
        templates.setdefault(_INDEX.sub(_PLACE, name), []).append(indices)
    found = []
    for template, rows in templates.items():
        columns = [sorted(set(column)) for column in zip(*rows, strict=True)]
        is_product = len(rows) == math.prod(map(len, columns))
        merged = [columns] if is_product else [[[index] for index in row] for row in rows]
        parts = template.split(_PLACE)
        found += [
            "".join(map("".join, zip(parts, [*map(_format_ranges, each), ""], strict=True)))
            for each in merged
        ]
    return found


def _format_ranges(numbers: Sequence[int]) -> str:
    """Format ascending whole numbers as ranges, such as ``0-2,5``."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(f"{low}" if low == high else f"{low}-{high}" for low, high in ranges)
