"""Test that 0, 1 and null are read as in DeepSpeed where it accepts them, and only there."""

import pytest

from engine.config import load_config, load_document
from engine.config.edits import apply_fixes
from engine.config.parser import parse
from engine.config.validate import check

NOTE, ERROR = ("number-as-boolean", "note"), ("wrong-type", "error")
PHASES = [{"from": 0.1, "to": 0.2, "duration": 5}]


def find_problems(config):
    problems = check(load_document({"train_batch_size": 8, **config}), None)
    return [(each.rule, each.severity, each.pointer) for each in problems]


@pytest.mark.parametrize("value", [0, 1, 1.0])
@pytest.mark.parametrize(
    ("section", "key"), [("bf16", "enabled"), ("tensorboard", "enabled"), ("", "dump_state")]
)
def test_number_in_boolean_key_is_a_note(section, key, value):
    config = {section: {key: value}} if section else {key: value}
    pointer = f"/{section}/{key}" if section else f"/{key}"
    assert find_problems(config) == [("number-as-boolean", "note", pointer)]
    resolved = load_config({"train_batch_size": 8, **config})
    found = resolved.raw[section][key] if section else resolved.raw[key]
    assert found is bool(value)


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        ({"bf16": {"enabled": 2}}, "wrong-type"),
        ({"bf16": {"enabled": "true"}}, "wrong-type"),
        ({"engine": {"progress_bar": 1}}, "wrong-type"),
        ({"fp16": {"loss_scale": True}}, "wrong-type"),
    ],
)
def test_other_value_in_boolean_key_is_an_error(config, rule):
    assert [(each[0], each[1]) for each in find_problems(config)] == [(rule, "error")]


@pytest.mark.parametrize(
    ("name", "params", "pointer", "rule"),
    [
        ("OneCycle", {"cycle_momentum": 0}, "/scheduler/params/cycle_momentum", NOTE),
        ("OneCycle", {"relative": 0}, "/scheduler/params/relative", ERROR),
        ("Phases", {"relative": 1, "lr": PHASES}, "/scheduler/params/relative", ERROR),
    ],
)
def test_number_in_boolean_parameter_is_a_note_only_if_deepspeed_reads_it(
    name, params, pointer, rule
):
    limits = {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2} if name == "OneCycle" else {}
    config = {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}}
    problems = find_problems(config | {"scheduler": {"type": name, "params": limits | params}})
    assert [each for each in problems if each[2] == pointer] == [(*rule, pointer)]


def test_enabled_section_with_a_number_has_the_effect_of_true():
    assert load_config({"train_batch_size": 8, "bf16": {"enabled": 1}}).precision == "bf16"


def test_fix_replaces_the_number():
    document = parse('{"train_batch_size": 8, "bf16": {"enabled": 1, "x-note": 1}}', "f")
    text = apply_fixes(document, check(document, None), accept=lambda _: False)
    assert text == '{"train_batch_size": 8, "bf16": {"enabled": true, "x-note": 1}}'


def test_null_in_a_key_that_deepspeed_treats_as_absent_is_a_note():
    config = {
        "gradient_accumulation_steps": None,
        "bf16": None,
        "optimizer": {"type": "AdamW", "params": None},
        "scheduler": {"type": None},
    }
    pointers = ["/bf16", "/gradient_accumulation_steps", "/optimizer/params", "/scheduler/type"]
    found = find_problems(config)
    assert sorted(found) == [("null-as-absent", "note", pointer) for pointer in pointers]
    resolved = load_config({"train_batch_size": 8, **config})
    assert resolved.batch.accumulation == 1
    assert resolved.schedule is None
    assert resolved.raw == {"train_batch_size": 8, "optimizer": {"type": "AdamW"}}


@pytest.mark.parametrize("config", [{"fp16": None}, {"optimizer": None}, {"engine": None}])
def test_null_in_another_key_is_an_error(config):
    assert [each[:2] for each in find_problems(config)] == [ERROR]


def test_number_in_zero_optimization_is_an_error():
    assert [each[:2] for each in find_problems({"zero_optimization": 1})] == [ERROR]
