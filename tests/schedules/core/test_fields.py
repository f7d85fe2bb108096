"""Every parameter has an effect, and the generated schemas match the dataclasses."""

import dataclasses
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

import schedules
from schedules import SCHEDULES, Horizon, Schedule, register, trace
from schedules.core.fields import read_fields
from schedules.core.json_schema import build_json_schema

ROOT = Path(__file__).parents[3]

HORIZON = Horizon(total_steps=100, steps_per_epoch=10, samples_per_step=32)
BASE = {"lr": (0.1,), "momentum": (0.9,), "weight_decay": (0.01,)}
# Parameters that have an effect only in combination with others.
REQUIRED_PARAMS = {
    ("AutoWU", "decay_phase_factor"): {"test": "robust"},
    ("AutoWU", "decay_phase_stat"): {
        "steps_per_epoch": 2,
        "total_epochs": 50,
        "decay_phase_factor": 0.5,
    },
    ("ReduceLROnPlateau", "threshold_mode"): {"threshold": 0.06, "patience": 0},
    ("ConstantScheduler", "t_max"): {"alpha": 0.5},
    ("CyclicLR", "gamma"): {"mode": "exp_range"},
    ("FactorScheduler", "step"): {"factor": 0.5},
    ("OneCycle", "decay_mom_rate"): {"decay_step_size": 4},
    ("OneCycle", "post_cycle_decay_step_size"): {"decay_step_size": None, "decay_lr_rate": 1.0},
    ("OneCycleLR", "epochs"): {"total_steps": None, "epochs": 4, "steps_per_epoch": 10},
    ("SequentialLR", "from_previous"): {"milestones": [10, 70]},
    ("OneCycleLR", "steps_per_epoch"): {"total_steps": None, "epochs": 4, "steps_per_epoch": 10},
    ("OptimizerParamScheduler", "lr_wsd_decay_style"): {
        "lr_decay_style": "WSD",
        "wsd_decay_steps": 20,
    },
    ("OptimizerParamScheduler", "wsd_decay_steps"): {
        "lr_decay_style": "WSD",
        "wsd_decay_steps": 20,
    },
    ("OptimizerParamScheduler", "lr_decay_style"): {"lr_decay_style": "linear"},
    ("OptimizerParamScheduler", "wd_incr_style"): {"wd_incr_steps": 30},
    ("OptimizerParamScheduler", "wd_incr_steps"): {"wd_incr_steps": 30},
    ("ReduceLROnPlateau", "one_based_warmup"): {"warmup_steps": 8},
    ("WarmupLR", "relative"): {"warmup_max_lr": 0.5},
    ("WarmupDecayLR", "relative"): {"warmup_max_lr": 0.5},
}
WITH_WARMUP = {"warmup_steps": 8}
PHASE = [{"from": 0.2, "to": 0.7, "duration": 10}]


def alternatives(name, field):
    """Return other values to try for a field."""
    if name == "Phases":
        return [PHASE, True]
    schema = field.schema
    if "enum" in schema:
        return schema["enum"]
    if field.name == "schedulers":
        block = {"type": "ExponentialLR", "params": {"gamma": 0.5}}
        return [[block] * len(SCHEDULES[name].example["schedulers"]), [block]]
    if schema["type"] == "array":
        return [[4, 9]]
    return [True, False, 3, 7, 15, 0.02, 0.3, 0.5, 0.95, 2.0, 40]


def values(name, params, ratio):
    horizon = Horizon(**vars(HORIZON) | {"scale_ratio": ratio})
    return trace({"type": name, "params": params}, 120, base=BASE, horizon=horizon)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        (name, key)
        for name, cls in SCHEDULES.items()
        for key in read_fields(cls)
        if key != "rollback"  # restores weights; it does not affect the schedule's values
    ],
)
def test_schedule_parameter_has_an_effect(name, key):
    params = dict(SCHEDULES[name].example) | REQUIRED_PARAMS.get((name, key), {})
    if key in {"warmup_begin_lr", "warmup_mode"}:
        params |= WITH_WARMUP
    ratio = 1.0
    if key == "scale_warmup":
        ratio, params = 0.5, params | {"t_warmup": 12}
    before = values(name, params, ratio)
    for value in alternatives(name, read_fields(SCHEDULES[name])[key]):
        try:
            after = values(name, params | {key: value}, ratio)
        except ValueError:
            continue
        if before.keys() != after.keys() or any(
            not np.array_equal(before[driven], after[driven]) for driven in before
        ):
            return
    pytest.fail(f"no other value of {key} has an effect")


@pytest.mark.parametrize("name", SCHEDULES)
def test_json_schema_accepts_the_example(name):
    schema = build_json_schema(SCHEDULES[name])
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(dict(SCHEDULES[name].example), schema)
    assert schema["description"]


@pytest.mark.parametrize(
    ("name", "key", "ending"),
    [
        ("WarmupLR", "warmup_min_lr", "first step. A list sets one value per param group."),
        ("WarmupLR", "warmup_type", "in the first steps."),
        ("WarmupCosineLR", "warmup_min_ratio", "initial learning rate."),
        ("WarmupLR", "warmup_num_steps", '"0.1dur" (fraction of the run).'),
    ],
)
def test_json_schema_description_ends_with_the_accepted_forms(name, key, ending):
    description = build_json_schema(SCHEDULES[name])["properties"][key]["description"]
    assert description.endswith(ending)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Undescribed(Schedule):
    x: float = 1.0


def _schedule_class(**namespace: Any) -> type:
    return type(
        "Mine", (Schedule,), {"hyperparameters": ("lr",), "span": 1, "curves": None, **namespace}
    )


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (type("OneCycle", (Schedule,), {}), "named `OneCycle` already exists"),
        (_schedule_class(), "must be a frozen, keyword-only dataclass"),
        (Undescribed, "docstring below it. Add a docstring to: x"),
    ],
)
def test_register_invalid_class_is_rejected(cls, message):
    with pytest.raises(ValueError, match=message):
        register(cls)
    assert "Mine" not in schedules.SCHEDULES


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"type": "OneCylce"}, "got 'OneCylce'. Did you mean `OneCycle`?"),
        ({"type": "onecycle"}, "Did you mean `OneCycle`?"),
        ({"type": "math"}, "Run `onecycle schedules`"),
        ({"params": {}}, "must be `type` and, optionally, `params`, got params"),
        ({"type": "WarmupLR", "parms": {}}, "got parms, type"),
        ({"type": "WarmupLR", "params": {"warmup_steps": 1}}, "Did you mean `warmup_num_steps`?"),
        ({"type": "WarmupLR", "params": {"cos_min_ratio": 1}}, "parameter of WarmupCosineLR."),
        ({"type": "WarmupDecayLR"}, "`total_num_steps` is required."),
    ],
)
def test_from_config_invalid_block_is_rejected(block, message):
    with pytest.raises(ValueError) as error:
        schedules.from_config(block)
    assert message in str(error.value)
