"""Test suggestions for misspelled names: a config and Python code get the same ones."""

import json
import re

import pytest

from engine.config.parser import parse
from engine.config.validate import check
from schedules import SCHEDULES, ScheduleError, from_config
from schedules.core.fields import read_fields
from schedules.core.registry import _OTHER_NAMES
from schedules.core.spelling import find_abbreviation, find_nearest


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
        ("LinearLR", "total_iterations", "total_iters"),
        ("StepLR", "patience_of_job", ""),
        ("WarmupCosineLR", "warmup_ratio", ""),
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


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("directory", ["dir", "every"], "dir"),
        ("accumulation_steps", ["accum_steps", "accum_dtype"], "accum_steps"),
        ("accum", ["accumulate", "accumulation"], None),
        ("zero_optimization_stage", ["zero_optimization"], None),
        ("b_size", ["batch_size"], None),
    ],
)
def test_find_abbreviation_returns_a_unique_match_or_none(name, known, expected):
    assert find_abbreviation(name, known) == expected


def find_hint(config):
    """Return the pointer and the hint of the only error or warning of a config."""
    problems = check(parse(json.dumps({"train_batch_size": 8, **config}), "f"), None)
    (problem,) = (each for each in problems if each.severity != "note")
    return problem.pointer, problem.hint or problem.message


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("CPUAdam", "Adam"),
        ("FusedAdam", "Adam"),
        ("DeepSpeedCPUAdam", "Adam"),
        ("adamw_torch", "AdamW"),
        ("adamw_torch_fused", "AdamW"),
        ("paged_adamw_8bit", "AdamW"),
        ("FusedLamb", "Lamb"),
        ("torch.optim.AdamW", "AdamW"),
        ("bitsandbytes.optim.Lion8bit", "Lion"),
        ("AdmW", "AdamW"),
    ],
)
def test_unknown_optimizer_suggests_the_one_of_which_it_is_an_implementation(name, meant):
    pointer, hint = find_hint({"optimizer": {"type": name}})
    assert (pointer, hint) == ("/optimizer/type", f"Did you mean `{meant}`?")


@pytest.mark.parametrize(
    ("value", "meant"), [("200 steps", "200"), ("10 epochs", '"10ep"'), ("5 Batches", "5")]
)
def test_duration_with_a_unit_in_words_suggests_the_value(value, meant):
    schedule = {"type": "StepLR", "params": {"step_size": value}}
    for config in ({"engine": {"max_duration": value}}, {"scheduler": schedule}):
        assert find_hint(config)[1] == f"Did you mean {meant}?"
    with pytest.raises(ScheduleError, match=f"Did you mean {meant}"):
        from_config(schedule)


def test_duration_with_an_unknown_unit_lists_the_units():
    schedule = {"type": "StepLR", "params": {"step_size": "2 weeks"}}
    for unit in ("200ba", "10ep", "4096sp", "1e9tok"):
        assert f'"{unit}"' in find_hint({"engine": {"max_duration": "2 weeks"}})[1]
        assert f'"{unit}"' in find_hint({"scheduler": schedule})[1]
    assert "dur" not in find_hint({"engine": {"max_duration": "2 weeks"}})[1].lower()
    assert find_hint({"engine": {"max_duration": "5"}})[1] == "Write 5 without quotes."


def test_unknown_optimizer_without_a_counterpart_has_no_suggestion():
    assert "initialize(optimizer=" in find_hint({"optimizer": {"type": "Shampoo"}})[1]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("cosine", "cosine_schedule_with_warmup"),
        ("WSD", "WarmupStableDecay"),
        ("linear", "LinearWithWarmupScheduler"),
        ("constant", "ConstantScheduler"),
        ("constant_with_warmup", "ConstantWithWarmupScheduler"),
        ("inverse_sqrt", "InverseSquareRoot"),
        ("polynomial", "polynomial_decay_schedule_with_warmup"),
        ("cosine_warmup", "cosine_schedule_with_warmup"),
        ("CosineLR", "CosineAnnealingLR"),
        ("torch.optim.lr_scheduler.StepLR", "StepLR"),
        ("OneCycel", "OneCycle"),
    ],
)
def test_unknown_schedule_suggests_the_counterpart(name, meant):
    pointer, message = find_hint({"scheduler": {"type": name}})
    assert pointer == "/scheduler/type"
    assert message.endswith(f"Did you mean `{meant}`?")
    with pytest.raises(ValueError, match=f"Did you mean `{meant}`"):
        from_config({"type": name})


def test_params_of_another_schedule_are_one_error_that_suggests_it():
    params = {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2, "cycle_first_step_size": 30}
    for name in ("OneCycleLR", "WarmupLR"):
        pointer, hint = find_hint({"scheduler": {"type": name, "params": params}})
        assert pointer == "/scheduler/type"
        assert hint.endswith("Did you mean `OneCycle`?")
    pointer, _ = find_hint(
        {"scheduler": {"type": "StepLR", "params": {"step_size": 5, "T_max": 9}}}
    )
    assert pointer == "/scheduler/params/T_max"


def test_names_of_other_libraries_stand_for_known_schedules():
    assert set(_OTHER_NAMES.values()) <= set(SCHEDULES)
    assert not set(_OTHER_NAMES) & {name.lower() for name in SCHEDULES}


@pytest.mark.parametrize(
    ("config", "pointer", "hint"),
    [
        (
            {"optimizer": {"type": "adam", "adam_w_mode": True}},
            "/optimizer/adam_w_mode",
            "Move it to `/optimizer/params`.",
        ),
        (
            {"scheduler": {"type": "StepLR", "params": {"step_size": 9}, "gamma": 0.5}},
            "/scheduler/gamma",
            "Move it to `/scheduler/params`.",
        ),
        (
            {"compile": {"backend": "inductor"}},
            "/compile/backend",
            "Use `/engine/compile` instead.",
        ),
        (
            {"gradient_accumulation_dtype": "fp32"},
            "/gradient_accumulation_dtype",
            "Use `/data_types/grad_accum_dtype` instead.",
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_ratio": 0.03}}},
            "/scheduler/params/warmup_ratio",
            'For a fraction of the run, set "warmup_num_steps": "0.03dur".',
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 0.03}}},
            "/scheduler/params/warmup_num_steps",
            'Write "0.03dur" for a fraction of the run.',
        ),
        (
            {"engine": {"checkpoint": {"directory": "run"}}},
            "/engine/checkpoint/directory",
            "Did you mean `dir`?",
        ),
        ({"bf16": True}, "/bf16", 'Write {"enabled": true}.'),
        (
            {"engine": {"checkpoint": {"dir": "run", "keep_every": "2ep"}}},
            "/engine/checkpoint/keep_every",
            "Write a number; the key does not accept the unit `ep`.",
        ),
        (
            {"engine": {"checkpoint": {"dir": "run", "every": "0.5dur"}}},
            "/engine/checkpoint/every",
            (
                'Write a number of steps, such as 200, or "200ba" (steps), "10ep" (epochs) or '
                '"4096sp" (samples).'
            ),
        ),
        (
            {"engine": {"checkpoint": {"dir": "run", "every": "2 epochs"}}},
            "/engine/checkpoint/every",
            'Did you mean "2ep"?',
        ),
        (
            {"zero_optimization": {"stage": 3, "prefetch_bucket_size": "auto"}},
            "/zero_optimization/prefetch_bucket_size",
            "Set a value, or use `stage3_prefetch_bucket_size`.",
        ),
        (
            {"optimizer": {"type": "Adam", "params": {"betas": [0.9]}}},
            "/optimizer/params/betas",
            '`optimizer.params.betas` must be a list of 2 values or "auto", got [0.9].',
        ),
    ],
)
def test_misplaced_or_foreign_key_is_one_error_with_the_key_to_use(config, pointer, hint):
    assert find_hint(config) == (pointer, hint)


@pytest.mark.parametrize(
    ("config", "hint"),
    [
        ({"mixed_precision": "bf16"}, 'Use "bf16": {"enabled": true} instead.'),
        *(
            ({key: value}, "Enable `bf16` or `fp16` instead; without them, the model is trained")
            for key in ("mixed_precision", "precision")
            for value in ("no", "bf16-mixed", 32, True)
        ),
        ({"half": True}, 'Use "fp16": {"enabled": true} instead.'),
        ({"zero": 2}, 'Use "zero_optimization": {"stage": 2} instead.'),
        ({"optim": "adamw_torch"}, 'Use "optimizer": {"type": "AdamW"} instead.'),
        ({"gradient_checkpointing": True}, "Use `activation_checkpointing` instead."),
        ({"zero_stage": 2}, "Use `/zero_optimization/stage` instead."),
        ({"zero_optimization.stage": 2}, "Move it to `/zero_optimization`, as `stage`."),
        ({"fp16": {"init_scale": 16}}, "Use `initial_scale_power` instead, the exponent"),
        ({"optimizer": {"type": "Adam", "params": {"beta1": 0.8}}}, "Use `betas` instead"),
        ({"optimizer": "AdamW"}, 'Write {"type": "AdamW"}.'),
        ({"scheduler": "WarmupLR"}, 'Write {"type": "WarmupLR"}.'),
        ({"scheduler": "Adam"}, ""),
        ({"zero_optimization": 2}, 'Write {"stage": 2}.'),
        ({"zero_optimization": 7}, ""),
        ({"bf16": True}, 'Write {"enabled": true}.'),
    ],
)
def test_key_whose_value_must_change_gets_a_hint_but_no_fix(config, hint):
    document = parse(json.dumps({"train_batch_size": 8, **config}), "f")
    (problem,) = check(document, None)
    assert problem.hint.startswith(hint)
    assert problem.fix is None
