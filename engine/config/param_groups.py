"""Read and check the param groups of a config's ``optimizer`` section."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import schemas
from engine.config.parser import Document
from engine.config.pointers import dotted_name, join_pointer
from engine.config.schedule_blocks import check_scheduler
from engine.config.schema import is_ignored, is_import_path, optimizer_schema
from engine.config.violations import check_against_schema
from engine.config.wording import quote_value, shorten
from engine.errors import Problem

__all__ = [
    "GroupSettings",
    "build_group_schema",
    "check_param_groups",
    "find_group_schedulers",
    "read_hyperparameters",
]

POINTER = "/optimizer/param_groups"
_MAX_GROUPS = 200
_MAX_LENGTH = 500  # characters of a pattern
_NOT_PER_GROUP = {"initial_accumulator_value", "foreach", "fused", "capturable"}
"""Params that apply to all param groups of an optimizer."""
_SPLITS_GROUPS_ITSELF = "Muon"


@dataclass(frozen=True)
class GroupSettings:
    """An entry of ``optimizer.param_groups``.

    Args:
        name: name of the group.
        patterns: regular expressions that select parameters by name, with `re.search`.
        hyperparameters: hyperparameters of the group, which override ``optimizer.params``.
        no_decay: whether to disable weight decay for biases, normalization parameters and other
            parameters with at most one dimension.
    """

    name: str
    patterns: tuple[str, ...]
    hyperparameters: Mapping[str, Any]
    no_decay: bool

    @classmethod
    def from_config(cls, entry: Mapping[str, Any], *, no_decay: bool) -> GroupSettings:
        """Build the settings from a valid entry and the optimizer's default for ``no_decay``."""
        patterns = entry["params"]
        patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
        return cls(
            name=entry.get("name", patterns[0]),
            patterns=patterns,
            hyperparameters=read_hyperparameters(entry),
            no_decay=entry.get("no_decay", no_decay),
        )


def read_hyperparameters(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyperparameters in an entry of ``optimizer.param_groups``.

    >>> read_hyperparameters({"params": "head", "lr": 0.1, "//": "a comment"})
    {'lr': 0.1}
    """
    known = _read_entry_schema()["properties"]
    return {key: each for key, each in entry.items() if key not in known and not is_ignored(key)}


def _read_entry_schema() -> Mapping[str, Any]:
    section: Mapping[str, Any] = schemas.read("sections/optimizer.json")
    entry: Mapping[str, Any] = section["properties"]["param_groups"]["items"]
    return entry


def build_group_schema(optimizer: str) -> dict[str, Any]:
    """Return the JSON schema of ``optimizer.param_groups`` for an optimizer.

    Besides keys such as ``params``, each entry accepts the optimizer's hyperparameters that are
    floats or lists of numbers and can differ between groups.

    >>> schema = build_group_schema("SGD")
    >>> list(schema["items"]["properties"])
    ['params', 'name', 'no_decay', 'scheduler', 'lr', 'momentum', 'dampening', 'weight_decay']
    """
    entry = _read_entry_schema()
    own = {
        key: _drop_auto(schema)
        for key, schema in optimizer_schema(optimizer)["properties"].items()
        if {"number", "array"} & set(_list_types(schema)) and key not in _NOT_PER_GROUP
    }
    return {
        "type": "array",
        "items": {
            **entry,
            "properties": {**entry["properties"], **own},
            "patternProperties": {"^(x-|//|_)": True},
            "additionalProperties": is_import_path(optimizer),
        },
    }


def _list_types(schema: Mapping[str, Any]) -> list[str]:
    types = schema.get("type", [])
    return [types] if isinstance(types, str) else types


def _drop_auto(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a hyperparameter's schema without "auto", which param groups do not accept."""
    kept = {key: each for key, each in schema.items() if key not in {"pattern", "x-auto"}}
    return {**kept, "type": [each for each in _list_types(schema) if each != "string"]}


def find_group_schedulers(config: Mapping[str, Any]) -> Iterator[tuple[int, str, Any]]:
    """Yield the group index, JSON pointer and value of each ``scheduler`` in a param group.

    >>> config = {"optimizer": {"param_groups": [{"scheduler": {"type": "StepLR"}}]}}
    >>> list(find_group_schedulers(config))
    [(0, '/optimizer/param_groups/0/scheduler', {'type': 'StepLR'})]
    """
    block = config.get("optimizer")
    entries = block.get("param_groups") if isinstance(block, Mapping) else None
    for index, entry in enumerate(entries if isinstance(entries, list) else ()):
        if isinstance(entry, Mapping) and "scheduler" in entry:
            yield index, f"{POINTER}/{index}/scheduler", entry["scheduler"]


def check_param_groups(document: Document, optimizer: str, entries: Any) -> Iterator[Problem]:
    """Yield the problems in the entries of ``optimizer.param_groups``.

    Args:
        document: parsed config.
        optimizer: canonical name of the optimizer.
        entries: value of the key ``optimizer.param_groups``.
    """
    if not isinstance(entries, list) or not entries:
        return
    engine = document.value.get("engine")
    is_torch = isinstance(engine, Mapping) and engine.get("backend") == "torch"
    if optimizer == _SPLITS_GROUPS_ITSELF and not is_torch:
        message = f"`{dotted_name(POINTER)}` cannot be used with {optimizer}."
        hint = f"Remove the key. DeepSpeed builds the param groups of {optimizer} itself."
        yield document.build_problem("param-groups", POINTER, message, hint)
        return
    if len(entries) > _MAX_GROUPS:
        message = f"`{dotted_name(POINTER)}` must have at most {_MAX_GROUPS} entries, "
        yield document.build_problem(
            "param-groups", POINTER, f"{message}got {len(entries):,}.", "Merge some entries."
        )
        return
    yield from check_against_schema(document, entries, build_group_schema(optimizer), POINTER)
    for index, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            continue
        pointer = join_pointer(POINTER, index)
        yield from _check_patterns(document, entry.get("params"), join_pointer(pointer, "params"))
        block = entry.get("scheduler")
        if isinstance(block, Mapping) and _has_valid_types(block):
            yield from check_scheduler(document, block, join_pointer(pointer, "scheduler"))


def _has_valid_types(block: Mapping[str, Any]) -> bool:
    return isinstance(block.get("type"), str) and isinstance(block.get("params", {}), Mapping)


def _check_patterns(document: Document, patterns: Any, pointer: str) -> Iterator[Problem]:
    given = [patterns] if isinstance(patterns, str) else patterns
    for pattern in given if isinstance(given, list) else ():
        error = _find_pattern_error(pattern) if isinstance(pattern, str) else None
        if error is None:
            continue
        name = dotted_name(pointer)
        message = (
            f"`{name}` must be a valid regular expression, got {quote_value(pattern)}: {error}."
        )
        hint = ""
        if "*" in pattern:
            meant = ".*".join(map(re.escape, pattern.split("*")))
            hint = f"`*` repeats the character before it. Write {shorten(json.dumps(meant))}."
        yield document.build_problem("param-groups", pointer, message, hint)


def _find_pattern_error(pattern: str) -> str | None:
    """Return the reason why a regular expression is invalid, or None if it is valid."""
    if len(pattern) > _MAX_LENGTH:
        return f"it is longer than {_MAX_LENGTH} characters"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return str(error)
    return None
