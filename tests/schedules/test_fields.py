"""Each key changes something, and the checked-in schemas say what the dataclasses say."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import schedules
from schedules import SCHEDULES, Schedule, register, trace
from schedules.fields import fields_of

ROOT = Path(__file__).parent.parent.parent

# For each schedule a starting point, and for each of its parameters another value: changing any
# one of them must change a value somewhere, or the parameter would be ignored in silence.
CYCLE = {
    "cycle_min_lr": 0.1,
    "cycle_max_lr": 0.5,
    "cycle_first_step_size": 8,
    "decay_step_size": 4,
    "decay_lr_rate": 1.0,
    "decay_mom_rate": 0.5,
}
TEST = {"lr_range_test_step_size": 4}
WARMUP = {"warmup_num_steps": 8}
RUN = WARMUP | {"total_num_steps": 20}
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "OneCycle": (
        CYCLE,
        {
            "last_batch_iteration": 2,
            "cycle_min_lr": 0.2,
            "cycle_max_lr": 0.6,
            "decay_lr_rate": 2.0,
            "cycle_first_step_size": 6,
            "cycle_second_step_size": 5,
            "cycle_first_stair_count": 4,
            "cycle_second_stair_count": 2,
            "decay_step_size": 8,
            "post_cycle_decay_step_size": 8,
            "cycle_momentum": False,
            "cycle_min_mom": 0.5,
            "cycle_max_mom": 0.95,
            "decay_mom_rate": 1.0,
        },
    ),
    "LRRangeTest": (
        TEST,
        {
            "last_batch_iteration": 2,
            "lr_range_test_min_lr": 0.2,
            "lr_range_test_step_size": 5,
            "lr_range_test_step_rate": 2.0,
            "lr_range_test_staircase": True,
        },
    ),
    "WarmupLR": (
        WARMUP,
        {
            "last_batch_iteration": 2,
            "warmup_min_lr": 0.01,
            "warmup_max_lr": 0.3,
            "warmup_num_steps": 9,
            "warmup_type": "linear",
        },
    ),
    "WarmupDecayLR": (
        RUN,
        {
            "last_batch_iteration": 2,
            "warmup_min_lr": 0.01,
            "warmup_max_lr": 0.3,
            "warmup_num_steps": 9,
            "warmup_type": "linear",
            "total_num_steps": 21,
        },
    ),
    "WarmupCosineLR": (
        RUN,
        {
            "last_batch_iteration": 2,
            "warmup_min_ratio": 0.1,
            "cos_min_ratio": 0.1,
            "warmup_num_steps": 9,
            "warmup_type": "linear",
            "total_num_steps": 21,
        },
    ),
}


def test_the_table_names_every_parameter_of_every_schedule():
    assert {name: set(changes) for name, (_, changes) in CHANGES.items()} == {
        name: set(fields_of(cls)) for name, cls in SCHEDULES.items()
    }


@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name, (_, changes) in CHANGES.items() for key in changes]
)
def test_every_parameter_changes_something(name, key):
    params, changes = CHANGES[name]
    changed = params | {key: changes[key]}
    if key == "post_cycle_decay_step_size":
        del changed["decay_step_size"]
    before, after = (trace({"type": name, "params": p}, 40) for p in (params, changed))
    assert before.keys() != after.keys() or any(
        not np.array_equal(before[driven], after[driven]) for driven in before
    )


def test_generated_files_are_up_to_date():
    command = [sys.executable, "tools/generate.py", "--check"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def _schedule_class(**namespace: Any) -> type:
    return type("Mine", (Schedule,), {"drives": ("lr",), "span": 1, "curves": None, **namespace})


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (type("OneCycle", (Schedule,), {}), "a schedule has it already"),
        (_schedule_class(), "must be a dataclass\\(frozen=True, kw_only=True\\)"),
        (
            dataclasses.dataclass(frozen=True, kw_only=True)(
                _schedule_class(__annotations__={"x": float}, __module__=__name__)
            ),
            "missing under x",
        ),
    ],
)
def test_a_class_that_is_no_schedule_is_not_registered(cls, message):
    with pytest.raises(ValueError, match=message):
        register(cls)
    assert "Mine" not in schedules.SCHEDULES


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"type": "OneCylce"}, "'OneCylce' instead. Did you mean `OneCycle`?"),
        ({"type": "onecycle"}, "Did you mean `OneCycle`?"),
        ({"type": "math"}, "Known are LRRangeTest, OneCycle,"),
        ({"params": {}}, "must hold `type` and `params` alone, but holds params instead"),
        ({"type": "WarmupLR", "parms": {}}, "but holds parms, type instead"),
        ({"type": "WarmupLR", "params": {"warmup_steps": 1}}, "Did you mean `warmup_num_steps`?"),
        ({"type": "WarmupLR", "params": {"cos_min_ratio": 1}}, "It is one of WarmupCosineLR."),
        ({"type": "WarmupDecayLR"}, "`total_num_steps` must be given, but is missing."),
    ],
)
def test_a_block_that_names_no_schedule_is_refused(block, message):
    with pytest.raises(ValueError) as error:
        schedules.from_config(block)
    assert message in str(error.value)
