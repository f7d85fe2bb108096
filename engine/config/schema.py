"""Iterate over the keys of a config together with their schemas, and look up their defaults."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import schemas
from engine.config.pointers import pointer_to, split_pointer
from schedules import SCHEDULES, Schedule
from schedules.core.json_schema import build_json_schema
from schedules.core.registry import find

__all__ = [
    "ABSENT",
    "OPTIMIZERS",
    "SCHEMA",
    "SECTION",
    "Member",
    "default_of",
    "is_parked",
    "nest",
    "optimizer_name",
    "optimizer_schema",
    "resolve_reference",
    "schedule_schema",
    "walk",
    "with_defaults",
]

SCHEMA = "ds_config.schema.json"
PARKED = ("x-", "//", "_")
"""Keys with these prefixes are ignored. Users keep notes and disabled settings in them."""
OPTIMIZERS: Mapping[str, dict[str, Any]] = schemas.read("optimizers.json")["$defs"]

ABSENT: Any = object()
"""Marks a key that a config does not have and that has no default."""
SECTION: Mapping[str, Any] = {}
"""Marks a section that a config does not have, but whose keys have defaults."""


def is_parked(key: str) -> bool:
    """Return whether a key is ignored because of its prefix.

    >>> is_parked("_comment"), is_parked("fp16")
    (True, False)
    """
    return key.startswith(PARKED)


def optimizer_name(name: str) -> str | None:
    """Return the canonical name of an optimizer, ignoring case; None if it is unknown."""
    return {known.lower(): known for known in OPTIMIZERS}.get(name.lower())


def optimizer_schema(name: str) -> dict[str, Any]:
    """Return the schema of an optimizer's ``params``."""
    return OPTIMIZERS[name]


def schedule_schema(cls: type[Schedule[Any]]) -> dict[str, Any]:
    """Return the schema of a schedule's ``params``.

    The schema is read from a file for built-in schedules, and generated for custom schedules.
    """
    if SCHEDULES.get(cls.type_name) is cls:
        with contextlib.suppress(FileNotFoundError):
            return schemas.read(f"schedulers/{cls.type_name}.json")
    return build_json_schema(cls)


def resolve_reference(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a schema. If it references a file, merge it with the schema in that file."""
    reference = schema.get("$ref")
    return {**schemas.read(reference), **schema} if reference else schema


class Member(NamedTuple):
    """A key of a config with its value, which is either given or filled in from the schema."""

    pointer: str
    value: Any
    schema: Mapping[str, Any]
    """JSON schema of the value; empty for an unknown key."""
    is_given: bool = True
    """Whether the config contains the key. If not, the value was filled in."""

    @property
    def is_section(self) -> bool:
        """Whether the value is an object whose keys are also members."""
        if "properties" not in self.schema:
            return False
        return isinstance(self.value, Mapping) if self.is_given else self.value is SECTION


def walk(
    value: Any,
    schema: Mapping[str, Any],
    pointer: str = "",
    *,
    fill: Callable[[Mapping[str, Any]], Any] | None = None,
) -> Iterator[Member]:
    """Yield all keys of an object and of its sections; a section comes before its keys.

    The schema of ``params`` depends on ``type``. Keys with an ignored prefix are skipped.

    Args:
        value: object to iterate over; it may be invalid.
        schema: schema of the object.
        pointer: JSON pointer of the object.
        fill: function that receives the schema of an absent key and returns the value to yield. If
            it returns `SECTION`, the keys of that section are also filled in. If it returns
            `ABSENT`, the key is skipped. By default, all absent keys are skipped.

    >>> [member.pointer for member in walk({"fp16": {"enabled": True}}, schemas.read(SCHEMA))]
    ['/fp16', '/fp16/enabled']
    """
    if not isinstance(value, Mapping):
        return
    properties = schema.get("properties", {})
    replaced = _replaced_names(value, properties) if fill else ()
    for key in {**properties, **value} if fill else value:
        is_given = key in value
        if is_parked(key) or (key in replaced and not is_given):
            continue
        below = pointer_to(pointer, key)
        schema_of_key = _schema_of_member(properties.get(key, {}), below, value)
        filled = value[key] if is_given else fill(schema_of_key) if fill else ABSENT
        if filled is ABSENT:
            continue
        member = Member(below, filled, schema_of_key, is_given)
        yield member
        if member.is_section:
            yield from walk(filled, schema_of_key, below, fill=fill)


def _replaced_names(value: Mapping[str, Any], properties: Mapping[str, Any]) -> set[str | None]:
    """Return the keys that the object sets by a different name, such as a deprecated one."""
    given = [properties[key] for key in value if key in properties]
    return {schema.get(word) for schema in given for word in ("x-alias-of", "x-instead")}


def _schema_of_member(
    schema: Mapping[str, Any], pointer: str, around: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Return the schema of a key, with references resolved.

    The schema of ``params`` depends on ``type``. The schema of an optimizer's ``type`` is that of
    the optimizer, which includes annotations such as the backend.
    """
    name = around.get("type")
    if isinstance(name, str):
        of_optimizer = OPTIMIZERS.get(optimizer_name(name) or "")
        if pointer == "/optimizer/type" and of_optimizer:
            return of_optimizer
        if pointer == "/optimizer/params" and of_optimizer:
            return {"properties": of_optimizer.get("properties", {})}
        if pointer == "/scheduler/params":
            with contextlib.suppress(ValueError):
                return schedule_schema(find(name))
    return resolve_reference(schema)


def default_of(schema: Mapping[str, Any], backend: str) -> Any:
    """Return the value that a backend uses if a config does not contain a key.

    Args:
        schema: schema of the key.
        backend: "torch" or "deepspeed".

    Returns:
        The default value. It is `SECTION` for a section whose keys have defaults. It is `ABSENT` if
        the key has no default, is deprecated or removed, or is not supported by the backend.

    >>> default_of({"default": 2}, "torch")
    2
    """
    is_old = bool(schema.get("deprecated")) or "x-alias-of" in schema or "x-removed" in schema
    if is_old or (backend != "deepspeed" and schema.get("x-backend") == "deepspeed"):
        return ABSENT
    is_section = "properties" in schema and "required" not in schema
    return schema.get("default", SECTION if is_section else ABSENT)


def nest(members: Iterable[Member], pointer: str = "") -> dict[str, Any]:
    """Convert members to nested dicts.

    Args:
        members: members in the order in which `walk` yields them.
        pointer: JSON pointer of the object that contains them.

    >>> nest([Member("/fp16/enabled", False, {})])
    {'fp16': {'enabled': False}}
    """
    config: dict[str, Any] = {}
    for member in members:
        around = config
        *path, key = split_pointer(member.pointer.removeprefix(pointer))
        for part in path:
            around = around.setdefault(part, {})
        around[key] = {} if member.is_section else member.value
    return config


def with_defaults(value: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of an object with default values added and ignored keys removed.

    No defaults are added for keys that only DeepSpeed supports; DeepSpeed uses its own defaults.

    >>> with_defaults({"enabled": True, "x-note": 1}, schemas.read("sections/bf16.json"))["enabled"]
    True
    """
    return nest(walk(value, schema, fill=partial(default_of, backend="torch")))
