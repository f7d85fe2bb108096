"""Test suggestions for misspelled names: a config and Python code get the same ones."""

import json
import re

import pytest

from engine.config.parser import parse
from engine.config.validate import check
from schedules import SCHEDULES, ScheduleError, from_config
from schedules.core.fields import read_fields
from schedules.core.spelling import find_nearest


def suggest_in_validate(name, key, value):
    """Return the parameter that `validate` suggests for an unknown one."""
    scheduler = {"type": name, "params": {key: value}}
    document = parse(json.dumps({"train_batch_size": 8, "scheduler": scheduler}), "f")
    (problem,) = (p for p in check(document, None) if p.rule == "unknown-key")
    return problem.suggestion


def suggest_in_constructor(name, key, value):
    """Return the parameter that `from_config` suggests for an unknown one."""
    with pytest.raises(ScheduleError) as error:
        from_config({"type": name, "params": {key: value}})
    message = next(f.message for f in error.value.problems if f"`{key}`" in f.message)
    found = re.search(r"Did you mean `(\w+)`", message)
    return found[1] if found else ""


@pytest.mark.parametrize(
    ("name", "key", "meant"),
    [
        ("WarmupLR", "num_steps", "warmup_num_steps"),
        ("WarmupLR", "warmup_steps", "warmup_num_steps"),
        ("OneCycle", "max_lr", "cycle_max_lr"),
        ("OneCycle", "cycle_mx_lr", "cycle_max_lr"),
        ("StepLR", "gama", "gamma"),
        ("StepLR", "patience_of_job", ""),
    ],
)
def test_suggestion_is_the_same_in_validate_and_from_config(name, key, meant):
    assert suggest_in_validate(name, key, 100) == meant
    assert suggest_in_constructor(name, key, 100) == meant


def test_suggestion_for_every_truncated_parameter_is_the_same():
    compared = 0
    for name, cls in SCHEDULES.items():
        for key, field in read_fields(cls).items():
            value = cls.example.get(key, None if field.required else field.default)
            if key[:-1] and key[:-1] not in read_fields(cls) and value is not None:
                theirs = suggest_in_validate(name, key[:-1], value)
                assert theirs == suggest_in_constructor(name, key[:-1], value), (name, key)
                compared += 1
    assert compared > 150


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("num_steps", ["warmup_num_steps", "warmup_type"], "warmup_num_steps"),
        ("num_steps", ["warmup_num_steps", "total_num_steps"], None),
        ("steps", ["warmup_num_steps"], None),
        ("LR", ["lr", "betas"], "lr"),
        ("wramup", ["warmup", "cooldown"], "warmup"),
    ],
)
def test_nearest_returns_one_name_or_none(name, known, expected):
    assert find_nearest(name, known) == expected
