"""Iterate over the keys of a config and their JSON schemas, and look up defaults."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import schemas
from engine.config.pointers import get_parent, join_pointer, split_pointer
from schedules import SCHEDULES, Schedule
from schedules.core.json_schema import build_json_schema
from schedules.core.registry import find

__all__ = [
    "ABSENT",
    "OPTIMIZERS",
    "SCHEMA",
    "SECTION",
    "Member",
    "add_defaults",
    "add_optimizer_defaults",
    "get_default",
    "get_member_schema",
    "is_ignored",
    "is_import_path",
    "means_default",
    "optimizer_name",
    "optimizer_schema",
    "resolve_reference",
    "schedule_schema",
    "to_nested_dict",
    "walk",
]

SCHEMA = "ds_config.schema.json"
IGNORED_PREFIXES = ("x-", "//", "_")
"""Prefixes of ignored keys. Such keys hold comments or disabled settings."""
OPTIMIZERS: Mapping[str, dict[str, Any]] = schemas.read("optimizers.json")["$defs"]

_ZERO = "/zero_optimization"
_WITH_AUTO = {_ZERO, f"{_ZERO}/offload_param", f"{_ZERO}/offload_optimizer"}
"""Sections in which DeepSpeed reads "auto" as the default."""
ABSENT: Any = object()
"""Placeholder for the value of an absent key that has no default."""
SECTION: Mapping[str, Any] = {}
"""Placeholder for the value of an absent section whose keys have defaults."""


def is_ignored(key: str) -> bool:
    """Return whether a key is ignored because it starts with "x-", "//" or "_".

    >>> is_ignored("_comment"), is_ignored("fp16")
    (True, False)
    """
    return key.startswith(IGNORED_PREFIXES)


def optimizer_name(name: str) -> str | None:
    """Return the canonical spelling of an optimizer name, or None if the name is unknown.

    The name is matched case-insensitively. The import path of a custom optimizer, such as
    ``"my_module:MyOptimizer"``, is its canonical name.

    >>> optimizer_name("adamw"), optimizer_name("my_module:MyOptimizer"), optimizer_name("Adan")
    ('AdamW', 'my_module:MyOptimizer', None)
    """
    if is_import_path(name):
        return name
    return {known.lower(): known for known in OPTIMIZERS}.get(name.lower())


def is_import_path(name: str) -> bool:
    """Return whether a name is the import path of a custom class, such as ``module:Class``."""
    return ":" in name


def optimizer_schema(name: str) -> Mapping[str, Any]:
    """Return the JSON schema of an optimizer's ``params``, given the optimizer's canonical name.

    The schema of a custom optimizer accepts all params.
    """
    return {"properties": {}} if is_import_path(name) else OPTIMIZERS[name]


def schedule_schema(cls: type[Schedule[Any]]) -> dict[str, Any]:
    """Return the JSON schema of a schedule's ``params``.

    The schema of a built-in schedule is read from a file. The schema of a custom schedule is
    generated from the fields of its class.
    """
    if SCHEDULES.get(cls.type_name) is cls:
        with contextlib.suppress(FileNotFoundError):
            return schemas.read(f"schedulers/{cls.type_name}.json")
    return build_json_schema(cls)


def resolve_reference(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a schema merged with the schema file that its ``$ref`` names.

    Keywords of the given schema take precedence. A schema without ``$ref`` is returned unchanged.
    """
    reference = schema.get("$ref")
    return {**schemas.read(reference), **schema} if reference else schema


class Member(NamedTuple):
    """A key of a config, with its value and the JSON schema of the value."""

    pointer: str
    value: Any
    schema: Mapping[str, Any]
    """JSON schema of the value; empty for an unknown key."""
    is_given: bool = True
    """Whether the config contains the key. If false, `walk` filled in the value."""

    @property
    def is_section(self) -> bool:
        """Whether the value is a section: an object that `walk` descends into."""
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
    """Yield the keys of an object and of its nested sections, each section before its keys.

    In an optimizer or scheduler block, the schema of ``params`` depends on ``type``. Ignored keys
    (see `is_ignored`) are skipped.

    Args:
        value: object to iterate over. If it is not an object, nothing is yielded.
        schema: JSON schema of the object.
        pointer: JSON pointer of the object.
        fill: function that takes the schema of an absent key and returns the value to fill in. It
            returns `SECTION` to fill in a section key by key, or `ABSENT` to skip the key. By
            default, all absent keys are skipped.

    >>> [member.pointer for member in walk({"fp16": {"enabled": True}}, schemas.read(SCHEMA))]
    ['/fp16', '/fp16/enabled']
    """
    if not isinstance(value, Mapping):
        return
    properties = schema.get("properties", {})
    replaced = _find_replaced_keys(value, properties) if fill else ()
    for key in {**properties, **value} if fill else value:
        is_given = key in value
        if is_ignored(key) or (key in replaced and not is_given):
            continue
        below = join_pointer(pointer, key)
        schema_of_key = get_member_schema(properties.get(key, {}), below, value)
        filled = value[key] if is_given else fill(schema_of_key) if fill else ABSENT
        if filled is ABSENT:
            continue
        member = Member(below, filled, schema_of_key, is_given)
        yield member
        if member.is_section:
            yield from walk(filled, schema_of_key, below, fill=fill)


def _find_replaced_keys(value: Mapping[str, Any], properties: Mapping[str, Any]) -> set[str | None]:
    """Return the current names of the keys that an object sets under an alias or deprecated name.

    The set can also contain None and sentences such as "Remove the key.", which are not keys.
    """
    given = [properties[key] for key in value if key in properties]
    return {schema.get(word) for schema in given for word in ("x-alias-of", "x-instead")}


def get_member_schema(
    schema: Mapping[str, Any], pointer: str, around: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Return the schema of a key, with references resolved.

    The schema of ``params`` in an optimizer or scheduler block depends on the block's ``type``. For
    ``optimizer.type``, the schema of the configured optimizer is returned, because it contains
    annotations such as ``x-backend``.

    Args:
        schema: schema of the key, as given in the schema of the enclosing object.
        pointer: JSON pointer of the key.
        around: config object that contains the key.
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


def means_default(pointer: str, value: Any) -> bool:
    """Return whether a value is "auto" and stands for the key's default.

    In DeepSpeed, "auto" stands for the default in every key of ``zero_optimization`` and of its
    offload sections. This function makes an exception for ``stage``, because the default would
    disable ZeRO.

    >>> means_default("/zero_optimization/reduce_bucket_size", "auto")
    True
    """
    is_in_zero = get_parent(pointer) in _WITH_AUTO
    return value == "auto" and is_in_zero and pointer != "/zero_optimization/stage"


def get_default(schema: Mapping[str, Any], backend: str) -> Any:
    """Return the default value of a key on the given backend.

    Args:
        schema: JSON schema of the key.
        backend: "torch" or "deepspeed".

    Returns:
        The default value. `SECTION` stands for a section with defaults for its keys. `ABSENT` means
        that the key lacks a default, is deprecated or removed, or is not supported by the backend.

    >>> get_default({"default": 2}, "torch")
    2
    """
    is_old = bool(schema.get("deprecated")) or "x-alias-of" in schema or "x-removed" in schema
    if is_old or (backend != "deepspeed" and schema.get("x-backend") == "deepspeed"):
        return ABSENT
    if "x-defaults" in schema:
        return schema["x-defaults"][backend]
    is_section = "properties" in schema and "required" not in schema
    return schema.get("default", SECTION if is_section else ABSENT)


def to_nested_dict(members: Iterable[Member], pointer: str = "") -> dict[str, Any]:
    """Build a nested dict from the keys and values of a config.

    Args:
        members: keys with their values, in the order in which `walk` yields them.
        pointer: JSON pointer of the object to build.

    >>> to_nested_dict([Member("/fp16/enabled", False, {})])
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


def add_defaults(value: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of an object with default values added and ignored keys removed.

    Defaults of keys that only DeepSpeed supports are not added. DeepSpeed adds these defaults
    itself.

    >>> add_defaults({"enabled": True, "x-note": 1}, schemas.read("sections/bf16.json"))["enabled"]
    True
    """
    return to_nested_dict(walk(value, schema, fill=partial(get_default, backend="torch")))


def add_optimizer_defaults(
    name: str, params: Mapping[str, Any], backend: str = "torch"
) -> dict[str, Any]:
    """Return an optimizer's params with default values added for missing params.

    A default can depend on the backend and on other params. Custom optimizers get no defaults.

    >>> add_optimizer_defaults("Adam", {"torch_adam": True})["weight_decay"]
    0.01
    """
    schema = optimizer_schema(name)
    filled = add_defaults(params, schema)
    for key, each in schema["properties"].items():
        if "x-defaults" in each and key not in params:
            filled[key] = get_default(each, backend)
    is_torch_adam_w = filled.get("torch_adam") and filled.get("adam_w_mode", True)
    if is_torch_adam_w and "weight_decay" not in params:
        filled["weight_decay"] = 0.01  # the default of torch's AdamW, as in DeepSpeed
    return filled
