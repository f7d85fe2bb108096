"""Hypothesis strategies that draw valid instances of any schedule, based on its fields."""

from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from schedules import Horizon, Schedule, ScheduleError
from schedules.core.durations import convert_to_steps
from schedules.core.fields import Field, read_fields
from schedules.families.general import SHAPES
from schedules.families.megatron import OptimizerParamScheduler
from schedules.families.pytorch import OneCycleLR

TUTORIAL = {
    "type": "OneCycle",
    "params": {
        "cycle_first_step_size": 1000,
        "cycle_first_stair_count": 500,
        "cycle_second_step_size": 1000,
        "cycle_second_stair_count": 500,
        "decay_step_size": 1000,
        "cycle_min_lr": 0.0001,
        "cycle_max_lr": 0.0010,
        "decay_lr_rate": 0.001,
        "cycle_min_mom": 0.85,
        "cycle_max_mom": 0.99,
        "decay_mom_rate": 0.0,
    },
}
"""The scheduler block of DeepSpeed's 1Cycle tutorial."""

HORIZON = Horizon(total_steps=100, steps_per_epoch=10, samples_per_step=4)
ORDERED = (
    ("cycle_min_lr", "cycle_max_lr"),
    ("cycle_min_mom", "cycle_max_mom"),
    ("t_warmup", "t_max"),
    ("warmup_steps", "max_steps"),
    ("warmup_steps", "max_update"),
    ("warmup_num_steps", "total_num_steps"),
    ("lr_warmup_steps", "lr_decay_steps"),
    ("init_lr", "max_lr"),
    ("min_lr", "max_lr"),
    ("start_wd", "end_wd"),
)


def _number(field: Field, most: float) -> st.SearchStrategy[float]:
    schema = field.schema
    low = schema.get("minimum", 0.0)
    high = schema.get("maximum", schema.get("exclusiveMaximum", most))
    return st.floats(
        low, high, exclude_max="exclusiveMaximum" in schema, allow_subnormal=False
    ).map(lambda x: round(x, 6) if round(x, 6) < high else x)


def _value(field: Field, multiple: int) -> st.SearchStrategy[Any]:
    schema = field.schema
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kinds = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    low = schema.get("minimum", 0)
    whole = st.integers(low, 60)
    if field.duration is not None:
        whole = st.integers(-(-low // multiple), 30).map(lambda count: multiple * count)
        whole = st.one_of(whole, st.sampled_from(["1dur", "0.5dur", "4ep", "20ba", "80sp"]))
    strategies = {
        "boolean": st.booleans(),
        "null": st.none(),
        "integer": whole,
        "number": _number(field, most=2.0),
    }
    if "array" in kinds and schema["items"]["type"] != "number":
        objects = schema["items"]["type"] == "object"
        kind = _block if "type" in schema["items"].get("properties", {}) else _phase
        items = kind(multiple) if objects else st.integers(1, 20).map(lambda n: multiple * n)
        lists = st.lists(items, min_size=1, max_size=4)
        strategies["array"] = lists if objects else lists.map(lambda found: sorted(set(found)))
    return st.one_of(*(strategies[kind] for kind in kinds if kind in strategies))


def _phase(multiple: int) -> st.SearchStrategy[Any]:
    level = st.floats(0.01, 0.9).map(lambda x: round(x, 4))
    return st.fixed_dictionaries(
        {"duration": st.integers(1, 20).map(lambda count: multiple * count), "from": level},
        optional={"to": level, "shape": st.sampled_from(sorted(SHAPES))},
    )


def _block(multiple: int) -> st.SearchStrategy[Any]:
    steps = st.integers(1, 20).map(lambda count: multiple * count)
    rate = st.floats(0.1, 1.0).map(lambda x: round(x, 4))
    return st.one_of(
        st.fixed_dictionaries({"T_max": steps}).map(lambda p: block("CosineAnnealingLR", p)),
        st.fixed_dictionaries({"gamma": rate}).map(lambda p: block("ExponentialLR", p)),
        st.fixed_dictionaries({"total_num_steps": st.just("1dur"), "warmup_num_steps": steps}).map(
            lambda p: block("WarmupDecayLR", p | {"warmup_type": "linear"})
        ),
    )


def block(type_name: str, params: dict[str, Any]) -> dict[str, Any]:
    return {"type": type_name, "params": params}


def _count_steps(value: float | str) -> float:
    return convert_to_steps(value, HORIZON, scaled=False) if isinstance(value, str) else value


@st.composite
def instances(draw: st.DrawFn, cls: type[Schedule[Any]], multiple: int = 1) -> Schedule[Any]:
    """Draw a schedule with valid fields; durations in steps are multiples of ``multiple``."""
    params = {
        name: draw(_value(field, multiple))
        for name, field in read_fields(cls).items()
        if name != "last_batch_iteration"
        and (field.required or field.duration is not None or draw(st.booleans()))
    }
    if cls is OneCycleLR:
        params = {"total_steps": params.get("total_steps") or 60} | params
        params = {name: params[name] for name in params if "epoch" not in name}
    if cls is OptimizerParamScheduler:  # without these, most draws would be invalid
        if params.get("lr_decay_style") != "WSD":
            params.pop("wsd_decay_steps", None)
        if params.get("start_wd") is None and params.get("end_wd") is None:
            params.pop("wd_incr_steps", None)
    for low, high in ORDERED:
        ends = [params[name] for name in (low, high) if params.get(name) is not None]
        if len(ends) == 2 and all(isinstance(end, int | float | str) for end in ends):
            params[low], params[high] = sorted(ends, key=_count_steps)
    try:
        schedule = cls(**params)
        schedule.resolve(HORIZON)
    except ScheduleError:
        assume(False)
        raise
    return schedule
