"""List every config value that a run uses, and the origin of each value."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import schemas
from engine.config.batch_sizes import BATCH_KEYS, BatchError, DataRanks, derive_batch_sizes
from engine.config.parser import Document
from engine.config.pointers import dotted_name
from engine.config.rules import RuleContext
from engine.config.schema import (
    SCHEMA,
    Member,
    add_optimizer_defaults,
    get_default,
    optimizer_name,
    to_nested_dict,
    walk,
)
from engine.config.wording import count_noun

__all__ = ["Entry", "as_config", "trace_origins"]

_WEIGHT_DECAY = "/optimizer/params/weight_decay"


class Entry(NamedTuple):
    """A value of the resolved config and its origin."""

    pointer: str
    value: Any
    origin: str

    @property
    def name(self) -> str:
        """The dotted name of the key, such as ``fp16.enabled``."""
        return dotted_name(self.pointer)


def trace_origins(context: RuleContext) -> Iterator[Entry]:
    """Yield every config value that a run uses, including defaults, with its origin."""
    document, backend = context.document, context.backend
    yield from _trace_batch_sizes(document, context.data_ranks or DataRanks(1))
    fill = partial(get_default, backend=backend.name)
    for member in walk(document.value, schemas.read(SCHEMA), fill=fill):
        if member.is_section or member.pointer[1:] in BATCH_KEYS:
            continue
        if member.pointer == "/engine/backend" and member.value == "auto":
            yield Entry(member.pointer, backend.name, f"derived: {backend.reason}")
        elif member.is_given:
            yield Entry(member.pointer, member.value, _describe_origin(document, member))
        else:
            value = member.value
            if member.pointer == _WEIGHT_DECAY:
                value = _get_weight_decay(document, backend.name)
            yield Entry(member.pointer, value, "default")


def _get_weight_decay(document: Document, backend: str) -> float:
    """Return the default weight decay of the config's optimizer for a backend."""
    block = document.value["optimizer"]
    name = optimizer_name(block["type"])
    assert name is not None
    params = add_optimizer_defaults(name, block.get("params", {}), backend)
    weight_decay: float = params["weight_decay"]
    return weight_decay


def _trace_batch_sizes(document: Document, ranks: DataRanks) -> Iterator[Entry]:
    given = {key: document.value[key] for key in BATCH_KEYS if key in document.value}
    derived = {}
    if "auto" not in given.values():
        try:
            sizes = derive_batch_sizes(given, ranks)
        except BatchError:  # the batch sizes are valid for a different number of ranks
            sizes = None
        if sizes:
            derived = dict(
                zip(BATCH_KEYS, (sizes.train, sizes.micro, sizes.accumulation), strict=True)
            )
    for key in BATCH_KEYS:
        if key in given:
            yield Entry(
                f"/{key}", given[key], _describe_origin(document, Member(f"/{key}", given[key], {}))
            )
        elif key in derived:
            yield Entry(
                f"/{key}", derived[key], f"derived for {count_noun(ranks.number, ranks.unit)}"
            )


def _describe_origin(document: Document, member: Member) -> str:
    """Return the origin of a value: a command-line argument, or a file name and line.

    For an "auto" value, the result also names the libraries that replace it, such as transformers.
    """
    filled_in = member.value == "auto" and "x-auto" in member.schema
    suffix = f", filled in by {member.schema['x-auto']}" if filled_in else ""
    location = document.locations.get(member.pointer)
    line = f"{document.name}:{location.value[0]}" if location else document.name
    return f"{document.arguments.get(member.pointer, line)}{suffix}"


def as_config(entries: Sequence[Entry]) -> dict[str, Any]:
    """Build a config as a nested dict from its entries.

    >>> as_config([Entry("/fp16/enabled", False, "default")])
    {'fp16': {'enabled': False}}
    """
    return to_nested_dict(Member(entry.pointer, entry.value, {}) for entry in entries)
