"""Hypothesis strategies that draw valid instances of any schedule, from its fields alone."""

from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from schedules import Schedule, ScheduleError
from schedules.fields import Field, fields_of


def _number(field: Field, most: float) -> st.SearchStrategy[float]:
    schema = field.schema
    low = schema.get("minimum", 0.0)
    high = schema.get("maximum", schema.get("exclusiveMaximum", most))
    return st.floats(
        low, high, exclude_max="exclusiveMaximum" in schema, allow_subnormal=False
    ).map(lambda x: round(x, 6) if round(x, 6) < high else x)


def _value(field: Field) -> st.SearchStrategy[Any]:
    schema = field.schema
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kinds = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    strategies = {
        "boolean": st.booleans(),
        "null": st.none(),
        "integer": st.integers(schema.get("minimum", 0), 60),
        "number": _number(field, most=2.0),
    }
    return st.one_of(*(strategies[kind] for kind in kinds if kind in strategies))


@st.composite
def instances(draw: st.DrawFn, cls: type[Schedule[Any]]) -> Schedule[Any]:
    """Draw a schedule whose every field has a value that its schema takes."""
    params = {
        name: draw(_value(field))
        for name, field in fields_of(cls).items()
        if field.required or draw(st.booleans())
    }
    for low, high in (("cycle_min_lr", "cycle_max_lr"), ("cycle_min_mom", "cycle_max_mom")):
        if low in params and high in params:
            params[low], params[high] = sorted((params[low], params[high]))
    try:
        return cls(**params)
    except ScheduleError:
        assume(False)
        raise
