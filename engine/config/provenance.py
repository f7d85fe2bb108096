"""Every value that a run would use, and where it comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import schemas
from engine.config.backend_choice import choose
from engine.config.batch_sizes import BATCH_KEYS, BatchError, solve
from engine.config.parser import Document
from engine.config.pointers import pointer_to
from engine.config.schema import (
    SCHEMA,
    is_parked,
    optimizer_name,
    optimizer_schema,
    resolve_reference,
    schedule_schema,
    walk,
)
from schedules.core.registry import find

__all__ = ["Entry", "as_config", "origins"]


class Entry(NamedTuple):
    """A value of the resolved config."""

    pointer: str
    value: Any
    origin: str

    @property
    def name(self) -> str:
        """The place in dots, as ``fp16.enabled``."""
        return self.pointer[1:].replace("/", ".")


def origins(document: Document, world_size: int) -> Iterator[Entry]:
    """Yield every value of a config that was proved right, with its origin.

    Args:
        document: the config.
        world_size: number of ranks, for what is derived.
    """
    config = document.value
    schema = schemas.read(SCHEMA)
    members = list(walk(config, schema))
    yield from _batch_sizes(document, world_size)
    backend = choose(config, members)
    for entry in _of_object(document, config, schema, "", backend.name):
        if entry.pointer[1:] in BATCH_KEYS:
            continue
        if entry.pointer == "/engine/backend" and entry.value == "auto":
            yield Entry(entry.pointer, backend.name, f"derived: {backend.reason}")
            continue
        yield entry


def _batch_sizes(document: Document, world_size: int) -> Iterator[Entry]:
    given = {key: document.value[key] for key in BATCH_KEYS if key in document.value}
    derived = {}
    if "auto" not in given.values():
        try:
            sizes = solve(given, world_size)
        except BatchError:  # proved for another number of ranks
            sizes = None
        if sizes:
            derived = dict(
                zip(BATCH_KEYS, (sizes.train, sizes.micro, sizes.accumulation), strict=True)
            )
    for key in BATCH_KEYS:
        if key in given:
            yield Entry(f"/{key}", given[key], _place(document, f"/{key}", {}))
        elif key in derived:
            ranks = f"{world_size} rank{'s' * (world_size > 1)}"
            yield Entry(f"/{key}", derived[key], f"derived for {ranks}")


def _of_object(
    document: Document,
    value: Mapping[str, Any],
    schema: Mapping[str, Any],
    pointer: str,
    backend: str,
) -> Iterator[Entry]:
    properties = schema.get("properties", {})
    for key in dict.fromkeys([*properties, *value]):
        below = pointer_to(pointer, key)
        of_key = resolve_reference(properties.get(key, {}))
        if key in value:
            if not is_parked(key):
                yield from _given(document, value, key, of_key, below, backend)
        elif of_key.get("x-backend") == "deepspeed" and backend != "deepspeed":
            continue
        elif "default" in of_key and "x-alias-of" not in of_key and "x-removed" not in of_key:
            yield Entry(below, of_key["default"], "default")
        elif "properties" in of_key and "required" not in of_key and not of_key.get("deprecated"):
            yield from _of_object(document, {}, of_key, below, backend)


def _given(
    document: Document,
    around: Mapping[str, Any],
    key: str,
    schema: Mapping[str, Any],
    pointer: str,
    backend: str,
) -> Iterator[Entry]:
    value = around[key]
    if key == "params" and pointer == "/optimizer/params":
        schema = optimizer_schema(optimizer_name(around["type"]) or "Adam")
    elif key == "params" and pointer == "/scheduler/params":
        schema = schedule_schema(find(around["type"]))
    if isinstance(value, dict) and "properties" in schema:
        yield from _of_object(document, value, schema, pointer, backend)
    else:
        yield Entry(pointer, value, _place(document, pointer, schema if value == "auto" else {}))


def _place(document: Document, pointer: str, schema: Mapping[str, Any]) -> str:
    filled = f", filled in by {schema['x-auto']}" if "x-auto" in schema else ""
    if pointer in document.arguments:
        return f"{document.arguments[pointer]}{filled}"
    place = document.places.get(pointer)
    where = f"{document.name}:{place.value[0]}" if place else document.name
    return f"{where}{filled}"


def as_config(entries: Sequence[Entry]) -> dict[str, Any]:
    """Return the entries as a config.

    >>> as_config([Entry("/fp16/enabled", False, "default")])
    {'fp16': {'enabled': False}}
    """
    config: dict[str, Any] = {}
    for entry in entries:
        *path, key = entry.pointer.split("/")[1:]
        around = config
        for part in path:
            around = around.setdefault(part, {})
        around[key] = entry.value
    return config
