"""Fields of schedules: each range and unit said once, for the constructor and for the JSON schema.

A schedule annotates its fields with the types of this file. `fields_of` reads them back as
JSON schemas, which the constructor checks and which are written to ``schemas/schedulers``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import operator
import re
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from schedules.core.durations import PATTERN, FractionalSteps, Horizon, steps_of

__all__ = [
    "AnyValue",
    "Duration",
    "Factor",
    "Field",
    "FilledIn",
    "Items",
    "LearningRate",
    "LearningRateEach",
    "Milestones",
    "Momentum",
    "OnePerGroup",
    "PerGroup",
    "Power",
    "Range",
    "Rate",
    "Ratio",
    "StairCount",
    "Steps",
    "StepsOrZero",
    "WarmupSteps",
    "WarmupStepsOrZero",
    "WeightDecay",
    "accepts",
    "fields_of",
    "wanted",
]


class Range(NamedTuple):
    """The numbers that a field takes; for a list, what each of its items takes."""

    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    at_most: float | None = None

    def json_schema(self) -> dict[str, float]:
        """Return the range in JSON Schema's keywords."""
        keywords = {
            "minimum": self.at_least,
            "exclusiveMinimum": self.above,
            "exclusiveMaximum": self.below,
            "maximum": self.at_most,
        }
        return {word: limit for word, limit in keywords.items() if limit is not None}


class Duration(NamedTuple):
    """Marks a field as a length of time, which may be a time string and which scaling dilates."""

    warmup: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Items:
    """What each item of a list takes, as a JSON schema."""

    schema: Mapping[str, Any]


class OnePerGroup(NamedTuple):
    """Marks a field as a number for all param groups, or a list with one for each."""


class FilledIn(NamedTuple):
    """Marks a field that a config may leave to an integration, by the value "auto"."""

    by: str


class AnyValue(NamedTuple):
    """Marks a field that takes any JSON value, whose meaning another class's constructor knows."""


PerGroup = float | tuple[float, ...]

# Statically Any: a number or a list, until `Schedule.per_group` takes the list apart.
LearningRateEach = Annotated[
    Any, OnePerGroup(), Range(at_least=0), "per step; a list gives one to each group"
]
LearningRate = Annotated[PerGroup, Range(at_least=0), "per step; a list gives one to each group"]
Momentum = Annotated[
    PerGroup, Range(at_least=0, below=1), "momentum or betas[0]; a list gives one to each group"
]
Rate = Annotated[float, Range(at_least=0)]
Ratio = Annotated[float, Range(at_least=0, at_most=1), "share of the group's own learning rate"]
_TIME = 'optimizer updates, or a string as "10ep", "500ba", "4096sp", "0.1dur"'
# Statically Any: a time string until the schedule is resolved, a number of updates from then on.
Steps = Annotated[Any, Duration(), Range(at_least=1), _TIME]
WarmupSteps = Annotated[Any, Duration(warmup=True), Range(at_least=1), _TIME]
StepsOrZero = Annotated[Any, Duration(), Range(at_least=0), _TIME]
WarmupStepsOrZero = Annotated[Any, Duration(warmup=True), Range(at_least=0), _TIME]
Milestones = Annotated[tuple[Any, ...], Duration(), Range(at_least=1), _TIME]
Factor = Annotated[float, Range(at_least=0), "share of the group's own learning rate"]
WeightDecay = Annotated[Any, OnePerGroup(), Range(at_least=0), "a list gives one to each group"]
Power = Annotated[float, Range(above=0)]
StairCount = Annotated[int, Range(at_least=0), "stairs"]

_JSON_TYPES = {
    float: "number",
    int: "integer",
    bool: "boolean",
    str: "string",
    tuple: "array",
    types.NoneType: "null",
}
_WORDS = {
    "number": "a number",
    "integer": "a whole number",
    "boolean": "true or false",
    "string": "a string",
    "array": "a list",
    "object": "an object",
    "null": "null",
}
_LIMITS = {
    "minimum": ("at least", operator.ge),
    "exclusiveMinimum": ("more than", operator.gt),
    "maximum": ("at most", operator.le),
    "exclusiveMaximum": ("less than", operator.lt),
}


def wanted(schema: Mapping[str, Any]) -> str:
    """Return in words what a JSON schema takes, as an error message says it.

    >>> wanted({"type": ["integer", "null"], "minimum": 1})
    'a whole number or null, at least 1'
    >>> wanted({"type": "string", "enum": ["log", "linear"]})
    'one of "log", "linear"'
    """
    if "enum" in schema:
        return "one of " + ", ".join(json.dumps(choice) for choice in schema["enum"])
    if "type" not in schema:
        return "any value"
    names = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    kinds = " or ".join(_WORDS[name] for name in names)
    if "^auto$" in schema.get("pattern", ""):
        kinds = kinds.replace(_WORDS["string"], '"auto"')
    elif "pattern" in schema:
        kinds = kinds.replace(_WORDS["string"], 'a time as "10ep" or "0.1dur"')
    limits = [f"{word} {schema[key]:g}" for key, (word, _) in _LIMITS.items() if key in schema]
    return f"{kinds}, {' and '.join(limits)}" if limits else kinds


def accepts(schema: Mapping[str, Any], value: Any) -> bool:
    """Return whether a field's JSON schema takes a value; lists may be tuples.

    It knows the keywords that fields use, so that a schedule can be constructed, and refused,
    without a JSON Schema library.

    >>> accepts({"type": "number", "minimum": 0}, float("nan"))
    False
    """
    if "type" not in schema:
        return True
    names = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    if isinstance(value, tuple):
        items = schema.get("items", {})
        return "array" in names and bool(value) and all(accepts(items, item) for item in value)
    if isinstance(value, str) and "pattern" in schema:
        return re.search(schema["pattern"], value) is not None
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return _JSON_TYPES[type(value)] in names and value in schema.get("enum", [value])
    if isinstance(value, Mapping):
        properties = schema.get("properties", {})
        return (
            "object" in names
            and value.keys() >= set(schema.get("required", ()))
            and (schema.get("additionalProperties", True) or value.keys() <= properties.keys())
            and all(accepts(properties.get(key, {}), each) for key, each in value.items())
        )
    if not isinstance(value, int | float) or not math.isfinite(value):
        return False
    if "number" not in names and not ("integer" in names and isinstance(value, int)):
        return False
    return all(holds(value, schema[key]) for key, (_, holds) in _LIMITS.items() if key in schema)


_ANY_RUN = Horizon(total_steps=1, steps_per_epoch=1, samples_per_step=1)


@dataclasses.dataclass(frozen=True)
class Field:
    """One parameter of a schedule: what it takes, and what it is when absent."""

    name: str
    schema: Mapping[str, Any]
    unit: str | None
    duration: Duration | None
    required: bool
    default: Any
    filled_in_by: str | None = None

    @property
    def per_group(self) -> bool:
        """Whether it takes a number for all param groups, or a list with one for each."""
        return {"number", "array"} <= set(self.schema.get("type", ()))

    def convert(self, value: Any) -> Any:
        """Return a value read from JSON as the constructor takes it: lists as tuples, 1e3 as 1000.

        Raises:
            ValueError: the field does not take this value.
        """
        if isinstance(value, list):
            value = tuple(value)
        if (
            "integer" in self.schema.get("type", ())
            and isinstance(value, float)
            and value.is_integer()
        ):
            value = int(value)
        if any(isinstance(each, FractionalSteps) for each in _each(value)):
            return value
        if isinstance(value, str) and self.duration is not None:
            steps_of(value, _ANY_RUN, scaled=False)  # says what is wrong with the string
        if not accepts(self.schema, value):
            raise ValueError(
                f"`{self.name}` must be {wanted(self.schema)}, but is {value!r} instead."
            )
        return value


def _each(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


@functools.cache
def fields_of(schedule: type) -> Mapping[str, Field]:
    """Return the fields of a schedule's dataclass by name, read from its annotations.

    Raises:
        TypeError: an annotation is none that JSON can carry.
    """
    hints = typing.get_type_hints(schedule, include_extras=True)
    return {field.name: _field(field, hints[field.name]) for field in dataclasses.fields(schedule)}


@dataclasses.dataclass
class _Annotation:
    """What the annotation of a field says, read part by part."""

    name: str
    types: list[str] = dataclasses.field(default_factory=list)
    limits: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    items: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    choices: tuple[Any, ...] = ()
    unit: str | None = None
    duration: Duration | None = None
    filled_in_by: str | None = None
    free: bool = False

    def read(self, hint: Any) -> _Annotation:
        """Take in a type, and all that it is made of."""
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin is Annotated:
            for mark in arguments[1:]:
                self._read_mark(mark)
            self.read(arguments[0])
        elif origin in (typing.Union, types.UnionType):
            for each in arguments:
                self.read(each)
        elif origin is Literal:
            self.choices = arguments
            self.types.append("string")
        elif hint is Any and (self.types or self.free):
            pass  # a mark has said it
        elif (plain := origin or hint) in _JSON_TYPES:
            self.types.append(_JSON_TYPES[plain])
        else:
            raise TypeError(f"`{self.name}` has the annotation {hint}, which JSON cannot carry.")
        return self

    def _read_mark(self, mark: Any) -> None:
        match mark:
            case Range():
                self.limits = mark.json_schema()
            case Duration():
                self.duration = mark
                self.types += ["integer", "string"]
            case Items():
                self.items = mark.schema
            case FilledIn():
                self.filled_in_by = mark.by
            case OnePerGroup():
                self.types += ["number", "array"]
            case AnyValue():
                self.free = True
            case _:
                self.unit = mark

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON schema of a value."""
        if self.free:
            return {}
        names = list(self.types)
        items = self.items or {"type": "number", **self.limits}
        limits = dict(self.limits)
        if self.duration is not None:
            limits["pattern"] = PATTERN
            if "array" in names:
                items = {"type": ["integer", "string"], **limits}
                names, limits = ["array"], {}
        schema: dict[str, Any] = {"type": names[0] if len(names) == 1 else names, **limits}
        if self.choices:
            schema["enum"] = [*self.choices, *([None] if "null" in names else [])]
        if "array" in names:
            schema |= {"items": dict(items), "minItems": 1}
        return schema


def _field(field: dataclasses.Field[Any], hint: Any) -> Field:
    said = _Annotation(field.name).read(hint)
    required = field.default is dataclasses.MISSING
    return Field(
        field.name,
        said.schema,
        said.unit,
        said.duration,
        required=required,
        default=None if required else field.default,
        filled_in_by=said.filled_in_by,
    )
