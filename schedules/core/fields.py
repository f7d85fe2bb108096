"""Annotated types that define the valid range and the unit of a schedule's fields.

`read_fields` converts the annotations of a schedule to JSON schemas. The constructor of the
schedule validates its arguments against these schemas, and ``make generate`` writes the schemas to
``schemas/schedulers``.
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
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from schedules.core.durations import MAX_STEPS, PATTERN, FractionalSteps, Horizon, convert_to_steps

__all__ = [
    "AnyValue",
    "AutoValue",
    "Duration",
    "Factor",
    "Field",
    "Items",
    "LearningRate",
    "Milestones",
    "Momentum",
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
    "as_number",
    "as_tuple",
    "describe_schema",
    "read_fields",
]


class Range(NamedTuple):
    """The valid range of a number, or of each number in a list."""

    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    at_most: float | None = None

    def json_schema(self) -> dict[str, float]:
        """Return the range as JSON Schema keywords."""
        keywords = {
            "minimum": self.at_least,
            "exclusiveMinimum": self.above,
            "exclusiveMaximum": self.below,
            "maximum": self.at_most,
        }
        return {word: limit for word, limit in keywords.items() if limit is not None}


class Duration(NamedTuple):
    """Marker for a field that is a duration: a number of steps or a time string.

    Durations are multiplied by `Horizon.scale_ratio`. The duration of a warmup is multiplied only
    if it is a fraction of the run or if ``scale_warmup`` is true.
    """

    warmup: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Items:
    """Marker that defines the JSON schema of each item of a list field."""

    schema: Mapping[str, Any]


class AutoValue(NamedTuple):
    """Marker for a field that accepts "auto", which an integration replaces with a value."""

    integrations: str
    """Comma-separated names of the integrations that replace "auto"."""


class AnyValue(NamedTuple):
    """Marker for a field that accepts any value and therefore has an empty JSON schema."""


PerGroup = float | Sequence[float]
"""A number for all param groups, or a list with one number per group."""

LearningRate = Annotated[PerGroup, Range(at_least=0)]
Momentum = Annotated[PerGroup, Range(at_least=0, below=1)]
WeightDecay = Annotated[PerGroup, Range(at_least=0)]
Rate = Annotated[float, Range(at_least=0)]
Ratio = Annotated[float, Range(at_least=0, at_most=1)]
Factor = Annotated[float, Range(at_least=0)]
Steps = Annotated[int | str, Duration(), Range(at_least=1)]
WarmupSteps = Annotated[int | str, Duration(warmup=True), Range(at_least=1)]
StepsOrZero = Annotated[int | str, Duration(), Range(at_least=0)]
WarmupStepsOrZero = Annotated[int | str, Duration(warmup=True), Range(at_least=0)]
Milestones = Annotated[Sequence[int | str], Duration(), Range(at_least=0)]
Power = Annotated[float, Range(above=0)]
StairCount = Annotated[int, Range(at_least=0)]

_JSON_TYPES = {
    float: "number",
    int: "integer",
    bool: "boolean",
    str: "string",
    tuple: "array",
    Sequence: "array",
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


def describe_schema(schema: Mapping[str, Any]) -> str:
    """Describe the values that a JSON schema accepts, for an error message.

    >>> describe_schema({"type": ["integer", "null"], "minimum": 1})
    'a whole number or null, at least 1'
    >>> describe_schema({"type": "string", "enum": ["log", "linear"]})
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
        times = [f'"{each}"' for each in ("10ep", "0.1dur") if re.search(schema["pattern"], each)]
        kinds = kinds.replace(_WORDS["string"], f"a time such as {' or '.join(times)}")
    count = schema.get("minItems")
    if count is not None and count == schema.get("maxItems"):
        kinds = kinds.replace(_WORDS["array"], f"a list of {count} values")
    limits = [f"{word} {schema[key]:g}" for key, (word, _) in _LIMITS.items() if key in schema]
    return f"{kinds}, {' and '.join(limits)}" if limits else kinds


def accepts(schema: Mapping[str, Any], value: Any) -> bool:
    """Return whether a value is valid against a field's JSON schema.

    Lists must be passed as tuples. Only the JSON Schema keywords that fields use are supported.

    >>> accepts({"type": "number", "minimum": 0}, float("nan"))
    False
    """
    if "type" not in schema:
        return True
    names = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    if isinstance(value, tuple):
        items, is_long_enough = schema.get("items", {}), len(value) >= schema.get("minItems", 0)
        return "array" in names and is_long_enough and all(accepts(items, each) for each in value)
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
    if not isinstance(value, int | float) or not _is_finite(value):
        return False
    if "number" not in names and not ("integer" in names and isinstance(value, int)):
        return False
    return all(holds(value, schema[key]) for key, (_, holds) in _LIMITS.items() if key in schema)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int that is too large for a float
        return False


def as_number(value: float | str | Sequence[float]) -> float:
    """Check that the value of a field is a number, and return it.

    Call `Schedule.resolve` first to convert time strings to steps, and `Schedule.per_group` to
    replace each list with the number for one param group.

    Raises:
        ValueError: the value is a time string or a list.

    >>> as_number("0.1dur")
    Traceback (most recent call last):
    ValueError: '0.1dur' is not a number. Call the schedule's `resolve` or `per_group` first.
    """
    if not isinstance(value, int | float):
        raise ValueError(  # noqa: TRY004  # the field accepts values of this type
            f"{value!r} is not a number. Call the schedule's `resolve` or `per_group` first."
        )
    return value


_DURATION = (
    'a number of optimizer steps, or a time string such as "10ep" (epochs), "500ba" (steps), '
    '"4096sp" (samples), "1e9tok" (tokens) or "0.1dur" (fraction of the run)'
)
_SHOWN = 60
_SHORTEST = 1e-6  # steps; shorter periods would exceed the precision of a float
_ANY_RUN = Horizon(total_steps=1, steps_per_epoch=1, samples_per_step=1, tokens_per_sample=1)


@dataclasses.dataclass(frozen=True)
class Field:
    """A parameter of a schedule: its JSON schema, unit and default."""

    name: str
    schema: Mapping[str, Any]
    unit: str | None
    duration: Duration | None
    required: bool
    default: Any
    auto_integrations: str | None = None

    @property
    def per_group(self) -> bool:
        """Whether the field accepts a number or a list with one number per param group."""
        return {"number", "array"} <= set(self.schema.get("type", ()))

    def complete(self, description: str, *, explain_time: bool = True) -> str:
        """Return a description extended with sentences about the accepted values and the unit.

        Args:
            description: sentences about the meaning of the field.
            explain_time: whether to add a sentence about time strings if the field is a duration.
        """
        sentences = [description]
        if self.duration is not None and explain_time:
            subject = "Each entry" if self._item_schema is not self.schema else "The value"
            sentences.append(f"{subject} is {_DURATION}.")
        if self.per_group:
            sentences.append("A list sets one value per param group.")
        if self.unit:
            sentences.append(f"Unit: {self.unit}.")
        return " ".join(sentences)

    def convert(self, value: Any) -> Any:
        """Validate a value from a config, and convert it to the field's type.

        A list becomes a tuple. In an integer field, a float without a fractional part, such as 1e3,
        becomes an int.

        Raises:
            ValueError: the value is invalid for this field.
        """
        if "type" in self.schema:
            value = _to_plain(value)
        elif isinstance(value, list):
            value = tuple(value)
        is_integer = "integer" in self.schema.get("type", ())
        if is_integer and isinstance(value, float) and value.is_integer():
            value = int(value)
        if any(isinstance(each, FractionalSteps) for each in as_tuple(value)):
            if min(as_tuple(value)) < min(_SHORTEST, self._item_schema.get("minimum", 0)):
                raise ValueError(
                    f"`{self.name}` must be at least 1 step, got {value!r} steps. Use a longer "
                    "duration."
                )
            return value
        if isinstance(value, str) and self.duration is not None:
            convert_to_steps(value, _ANY_RUN, scaled=False)  # raises if the time string is invalid
        if not accepts(self.schema, value):
            place, schema, part = _find_invalid(self.name, self.schema, value)
            if part == () and "array" in schema.get("type", ()):
                kinds = describe_schema(schema).replace("a list", "a list with at least one value")
                raise ValueError(f"`{place}` must be {kinds}, got [].")
            shown = repr(part)
            shown = shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 1]}…"
            raise ValueError(f"`{place}` must be {describe_schema(schema)}, got {shown}.")
        numbers = [each for each in as_tuple(value) if isinstance(each, int | float)]
        if "integer" in self._item_schema.get("type", ()) and max(numbers, default=0) > MAX_STEPS:
            raise ValueError(
                f"`{self.name}` must be at most {MAX_STEPS:,} (2**53). Use a smaller value."
            )
        return value

    @property
    def minimum(self) -> float:
        """Smallest valid number or list item; -infinity if the JSON schema has no ``minimum``."""
        least: float = self._item_schema.get("minimum", -math.inf)
        return least

    @property
    def _item_schema(self) -> Mapping[str, Any]:
        schema: Mapping[str, Any] = self.schema.get("items", self.schema)
        return schema


def _to_plain(value: Any) -> Any:
    """Convert lists, ranges, arrays and tensors to tuples, and their items to Python numbers."""
    if isinstance(value, list | tuple | range):
        return tuple(map(_to_plain, value))
    # NumPy and PyTorch are not imported here. Their scalars have no items.
    return _to_plain(value.tolist()) if hasattr(value, "tolist") else value


def _find_invalid(
    place: str, schema: Mapping[str, Any], value: Any
) -> tuple[str, Mapping[str, Any], Any]:
    """Return the path, schema and value of the innermost item that makes a value invalid."""
    parts: list[tuple[str, Mapping[str, Any], Any]] = []
    if isinstance(value, tuple) and "items" in schema:
        parts = [(f"{place}[{index}]", schema["items"], each) for index, each in enumerate(value)]
    elif isinstance(value, Mapping):
        known = schema.get("properties", {})
        parts = [(f"{place}.{key}", known[key], value[key]) for key in value if key in known]
    for part in parts:
        if not accepts(*part[1:]):
            return _find_invalid(*part)
    return place, schema, value


def as_tuple(value: Any) -> tuple[Any, ...]:
    """Return a tuple unchanged, and wrap any other value in a tuple."""
    return value if isinstance(value, tuple) else (value,)


@functools.cache
def read_fields(schedule: type) -> Mapping[str, Field]:
    """Return the fields of a schedule class, keyed by name.

    Raises:
        TypeError: an annotation cannot be expressed in JSON Schema.
    """
    hints = typing.get_type_hints(schedule, include_extras=True)
    return {
        field.name: _build_field(field, hints[field.name]) for field in dataclasses.fields(schedule)
    }


@dataclasses.dataclass
class _Annotation:
    """The types, limits and unit that a field's annotation specifies."""

    name: str
    types: list[str] = dataclasses.field(default_factory=list)
    limits: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    items: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    choices: tuple[Any, ...] = ()
    unit: str | None = None
    duration: Duration | None = None
    auto_integrations: str | None = None
    free: bool = False

    def read(self, hint: Any) -> _Annotation:
        """Read the types, limits and unit from a type hint, and return ``self``."""
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
        elif hint is Any and self.free:
            pass  # The field is marked by `AnyValue`, so it has no type.
        elif (plain := origin or hint) in _JSON_TYPES:
            self.types.append(_JSON_TYPES[plain])
        else:
            raise TypeError(
                f"The annotation of `{self.name}` must be a type that JSON Schema can express, got "
                f"{hint}. Use a type from `schedules.core.fields`."
            )
        return self

    def _read_mark(self, mark: Any) -> None:
        match mark:
            case Range():
                self.limits = mark.json_schema()
            case Duration():
                self.duration = mark
            case Items():
                self.items = mark.schema
            case AutoValue():
                self.auto_integrations = mark.integrations
            case AnyValue():
                self.free = True
            case _:
                self.unit = mark

    @property
    def schema(self) -> dict[str, Any]:
        """JSON schema of the field's valid values."""
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
            schema |= {"items": dict(items), "minItems": 0 if self.duration else 1}
        return schema


def _build_field(field: dataclasses.Field[Any], hint: Any) -> Field:
    annotation = _Annotation(field.name).read(hint)
    required = field.default is dataclasses.MISSING
    return Field(
        field.name,
        annotation.schema,
        annotation.unit,
        annotation.duration,
        required=required,
        default=None if required else field.default,
        auto_integrations=annotation.auto_integrations,
    )
