"""Test validation: every kind of mistake, its position, and its fix."""

import copy
import json
import types
from pathlib import Path

import pytest

import engine
from engine import ConfigError, load_config
from engine.config import load_document
from engine.config.edits import replace_scheduler
from engine.config.parser import parse
from engine.config.validate import check

GOOD = {
    "train_batch_size": 8,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.001, "betas": [0.9, 0.95]}},
    "scheduler": {
        "type": "OneCycle",
        "params": {"cycle_min_lr": 0.1, "cycle_max_lr": 0.5, "cycle_first_step_size": 10},
    },
    "fp16": {"enabled": True, "initial_scale_power": 8},
    "gradient_clipping": 0.5,
    "x-note": "parked",
    "//": "parked too",
}


def validate(config, world_size=None, *, reject_auto=False):
    """Return the errors and warnings of a config, without notes."""
    problems = check(load_document(config), world_size, reject_auto=reject_auto)
    return [problem for problem in problems if problem.severity != "note"]


def config_with(pointer, value):
    """Return the valid config with one value set, or removed if the value is Ellipsis."""
    config = copy.deepcopy(GOOD)
    *path, key = pointer.split("/")[1:]
    block = config
    for part in path:
        block = block.setdefault(part, {})
    if value is ...:
        del block[key]
    else:
        block[key] = value
    return config


def test_validate_valid_config_has_no_problems():
    assert validate(GOOD, world_size=4) == []
    assert validate({"train_micro_batch_size_per_gpu": 1}) == []


MISTAKES = [
    (
        "/gradient_cliping",
        1,
        "unknown-key",
        "/gradient_cliping",
        "`gradient_clipping`",
    ),
    ("/zzz", 1, "unknown-key", "/zzz", 'start the key with "//" or "x-"'),
    ("/fp16/los_scale", 1, "unknown-key", "/fp16/los_scale", "Did you mean `loss_scale`?"),
    ("/optimizer/param", {}, "unknown-key", "/optimizer/param", "`params`"),
    ("/optimizer/params/momentum", 0.9, "unknown-key", None, "Unknown key `momentum`"),
    (
        "/scheduler/params/warmup_num_steps",
        5,
        "unknown-key",
        "/scheduler/params/warmup_num_steps",
        "It is a parameter of WarmupCosineLR, WarmupDecayLR, WarmupLR.",
    ),
    ("/optimizer/type", "Adamm", "unknown-optimizer", None, "Did you mean `Adam`?"),
    ("/optimizer/type", ..., "missing-key", "/optimizer", "Missing key `type` in optimizer"),
    ("/scheduler/type", "OneCycl", "unknown-scheduler", None, "Did you mean `OneCycle`?"),
    ("/scheduler/type", "math", "unknown-scheduler", None, "`onecycle schedules`"),
    ("/scheduler/type", 3, "wrong-type", None, "must be a string, got 3."),
    ("/scheduler/params", [], "wrong-type", None, "must be an object, got []."),
    (
        "/scheduler/params/cycle_max_lr",
        ...,
        "missing-key",
        "/scheduler/params",
        "Missing key `cycle_max_lr`",
    ),
    (
        "/scheduler/params/cycle_min_lr",
        0.9,
        "schedule",
        "/scheduler/params/cycle_max_lr",
        "`cycle_min_lr`",
    ),
    (
        "/scheduler/params/cycle_first_stair_count",
        11,
        "schedule",
        None,
        "`cycle_first_stair_count`",
    ),
    (
        "/scheduler/params/cycle_first_step_size",
        -10,
        "out-of-range",
        None,
        "got -10",
    ),
    (
        "/scheduler/params/cycle_max_mom",
        1,
        "out-of-range",
        None,
        "got 1.",
    ),
    (
        "/train_batch_size",
        "8",
        "wrong-type",
        None,
        'got "8". Write 8 without quotes.',
    ),
    ("/train_batch_size", True, "wrong-type", None, "got true."),
    ("/train_batch_size", 0, "out-of-range", None, "got 0."),
    ("/train_batch_size", ..., "batch-sizes", "", '"train_batch_size": 32.'),
    (
        "/train_micro_batch_size_per_gpu",
        3,
        "batch-sizes",
        "/train_batch_size",
        "Set `train_batch_size` to 6 or 9.",
    ),
    ("/gradient_clipping", "auto", "unresolved-auto", None, "only transformers or accelerate"),
    (
        "/steps_per_print",
        "auto",
        "unsupported-auto",
        None,
        "which neither Transformers nor Accelerate replaces",
    ),
    ("/gradient_clipping", -1, "out-of-range", None, "got -1."),
    ("/gradient_clipping", float("nan"), "not-finite", None, "got nan."),
    ("/optimizer/params/lr", float("inf"), "not-finite", None, "got inf."),
    ("/optimizer/params/betas", [0.9], "out-of-range", None, "got [0.9]."),
    ("/optimizer/params/betas", [0.9, 1.5], "out-of-range", "/optimizer/params/betas/1", "1.5"),
    ("/optimizer/params/lr", object, "wrong-type", None, "must be a JSON value"),
    (
        "/bf16",
        {"enabled": True},
        "precision",
        "/fp16/enabled",
        "Set all but one of these keys to false.",
    ),
    (
        "/engine",
        {"scale_schedule_ratio": 0},
        "out-of-range",
        "/engine/scale_schedule_ratio",
        "got 0.",
    ),
    ("/engine", {"max_duration": "1dur"}, "out-of-range", "/engine/max_duration", '"1dur"'),
    ("/engine", {"sed": 1}, "unknown-key", "/engine/sed", "Did you mean `seed`?"),
]


@pytest.mark.parametrize(("pointer", "value", "rule", "place", "message"), MISTAKES)
def test_validate_one_mistake_is_reported_once(pointer, value, rule, place, message):
    config = config_with(pointer, value)
    (problem,) = validate(config, world_size=1, reject_auto=True)
    assert (problem.rule, problem.severity) == (rule, "error")
    assert problem.pointer == (pointer if place is None else place)
    assert message in str(problem)
    with pytest.raises(ConfigError) as error:
        load_config(config)
    assert error.value.problems == (problem,)


@pytest.mark.parametrize(
    ("scheduler", "run", "message"),
    [
        (("CosineAnnealingScheduler", {}), {}, "length of the run"),
        (
            ("StepScheduler", {"step_size": "9tok"}),
            {},
            "'9tok' requires the number of tokens per sample",
        ),
        (
            ("LinearWithWarmupScheduler", {"t_warmup": "60ba"}),
            {"max_duration": 50},
            "`t_warmup` must be",
        ),
        (
            ("StepScheduler", {"step_size": 4}),
            {"scale_schedule_ratio": 0.1},
            "`step_size`",
        ),
    ],
)
def test_validate_durations_must_fit_the_run(scheduler, run, message):
    type_name, params = scheduler
    config = {"train_batch_size": 8, "scheduler": {"type": type_name, "params": params}}
    (problem,) = validate(config | {"engine": run})
    assert message in str(problem)
    assert problem.pointer.startswith("/scheduler/params")


@pytest.mark.parametrize(
    ("phase", "place", "message"),
    [
        ({"to": 0.1}, "/scheduler/params/lr/0", "`duration`"),
        ({"to": -1, "duration": 5}, "/scheduler/params/lr/0/to", "-1"),
        ({"duration": 5, "shap": "linear"}, "/scheduler/params/lr/0/shap", "Did you mean `shape`?"),
        ({"duration": 5, "shape": "sine"}, "/scheduler/params/lr/0/shape", "one of"),
    ],
)
def test_validate_invalid_phase_is_located(phase, place, message):
    scheduler = {"type": "Phases", "params": {"lr": [phase]}}
    (problem,) = validate({"train_batch_size": 8, "scheduler": scheduler})
    assert problem.pointer == place
    assert message in str(problem)


@pytest.mark.parametrize(
    "scheduler",
    [
        {"type": "StepScheduler", "params": {"step_size": "2ep"}},
        {"type": "ExponentialScheduler", "params": {"gamma": 0.5}},  # its period is "1ep"
    ],
)
def test_validate_durations_in_epochs_are_accepted(scheduler):
    assert validate({"train_batch_size": 8, "scheduler": scheduler}) == []


def test_validate_momentum_schedule_requires_an_optimizer_with_momentum():
    config = config_with("/optimizer", {"type": "adagrad"})
    (problem,) = validate(config)
    assert problem.rule == "no-momentum"
    assert "Adagrad" in problem.message
    assert '"cycle_momentum": false' in problem.hint
    config["scheduler"]["params"]["cycle_momentum"] = False
    assert validate(config) == []


def test_validate_file_reports_every_mistake_sorted_by_position(tmp_path):
    path = tmp_path / "ds_config.json"
    path.write_text(
        '{\n  "train_batch_size": 7,\n  "train_micro_batch_size_per_gpu": 2,\n'
        '  "gradient_cliping": 1,\n  "fp16": {"enabled": "yes"},\n'
        '  "optimizer": {"type": "SGD", "params": {"lr": -1}},\n'
        '  "scheduler": {"type": "OneCycel"}\n}\n'
    )
    assert [(p.rule, p.line, p.column) for p in validate(path)] == [
        ("batch-sizes", 2, 23),
        ("unknown-key", 4, 3),
        ("wrong-type", 5, 23),
        ("out-of-range", 6, 49),
        ("unknown-scheduler", 7, 25),
    ]
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert f"{path}:4:3: Unknown key `gradient_cliping`." in str(error.value)


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_validate_batch_sizes_must_fit_the_world_size(world_size):
    config = {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
    }
    assert bool(validate(config, world_size=world_size)) == (world_size != 2)
    assert validate(config) == []


def test_validate_missing_file_suggests_a_similar_name(tmp_path):
    (tmp_path / "ds_config.json").write_text("{}")
    with pytest.raises(ConfigError) as error:
        validate(tmp_path / "ds_confg.json")
    assert f"Did you mean {tmp_path / 'ds_config.json'}?" in str(error.value)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"contains ds_config\.json, other\.json"):
        validate(tmp_path / "train.json")
    with pytest.raises(ConfigError, match=r"there is no directory .*nowhere"):
        validate(tmp_path / "nowhere" / "train.json")


def test_validate_missing_directory_suggests_the_file_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("ds_config.json")
    path.write_text("{}")
    for missing in ("configs/ds_config.json", tmp_path / "configs" / "ds_config.json"):
        with pytest.raises(ConfigError) as error:
            validate(missing)
        assert str(error.value) == f"{missing}: File not found. Did you mean ds_config.json?"
    Path("configs").mkdir()
    path.rename("configs/ds_config.json")
    with pytest.raises(ConfigError, match=r"Did you mean configs/ds_config\.json"):
        validate("ds_config.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfe{", "must be UTF-8 text"), (None, "Is a directory")],
)
def test_validate_unreadable_file_raises(tmp_path, content, message):
    path = tmp_path
    if content is not None:
        path = tmp_path / "c.json"
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        validate(path)


@pytest.mark.parametrize("value", [[], 3, "x", None])
def test_validate_file_without_an_object_is_reported(tmp_path, value):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(value))
    (problem,) = validate(path)
    assert "must be a JSON object" in problem.message


def test_load_config_does_not_modify_or_share_the_dict():
    config = copy.deepcopy(GOOD)
    resolved = load_config(config)
    assert config == GOOD
    config["optimizer"]["params"]["lr"] = 99
    assert resolved.optimizer.params["lr"] == 0.001


def test_load_config_fills_in_every_default():
    resolved = engine.load_config(config_with("/scheduler", ...), world_size=2)
    assert resolved.schedule is None
    assert (resolved.batch.micro, resolved.batch.data_ranks) == (4, 2)
    assert resolved.precision == "fp16"
    assert resolved.loss_scaling.initial_scale_power == 8
    assert resolved.loss_scaling.hysteresis == 2
    assert dict(resolved.optimizer.params) == {
        "lr": 0.001,
        "betas": [0.9, 0.95],
        "eps": 1e-8,
        "weight_decay": 0.0,
        "amsgrad": False,
        "torch_adam": False,
    }
    assert engine.load_config({"train_batch_size": 1}).gradient_clipping == 1.0


def test_validate_missing_keys_are_reported_once_each():
    config = {"train_batch_size": 8, "scheduler": {"type": "OneCycle", "params": {}}}
    messages = [problem.message for problem in engine.validate(config)]
    assert messages == [
        f"Missing key `{key}` in scheduler.params." for key in ("cycle_min_lr", "cycle_max_lr")
    ]


def test_validate_accepts_any_mapping():
    assert engine.validate(types.MappingProxyType({"train_batch_size": 8})) == []


@pytest.mark.parametrize("value", [10**350, 10**5000], ids=["long", "longer"])
def test_validate_integer_too_large_for_a_float_is_rejected(value):
    (problem,) = engine.validate({"train_batch_size": 8, "gradient_clipping": value})
    assert "must be a finite number" in problem.message


@pytest.mark.parametrize("comment", ["// mine", "/* mine */", "  # mine"])
def test_with_scheduler_keeps_comments_and_notes(comment):
    text = f'{{"// note": "a", "scheduler": {{"type": "A", "params": {{"x": 1{comment}\n}}}}}}'
    new = replace_scheduler(parse(text, "c.json"), {"type": "A", "params": {"x": 2.5}})
    assert new == text.replace('"x": 1', '"x": 2.5')
    without = parse('{"// note": "a"}', "c.json")
    assert parse(replace_scheduler(without, {"type": "A", "params": {}}), "c.json").value == {
        "// note": "a",
        "scheduler": {"type": "A", "params": {}},
    }


@pytest.mark.parametrize(
    ("sections", "rules"),
    [
        (
            {"scheduler": {"type": "NoSuch", "params": 5}},
            {"wrong-type"},
        ),
        (
            {"scheduler": {"type": "no_such_module:f", "params": "auto"}},
            {"unsupported-auto"},
        ),
        (
            {
                "optimizer": {"type": "Adagrad"},
                "scheduler": {
                    "type": "OneCycle",
                    "params": {
                        "cycle_min_lr": 0.01,
                        "cycle_max_lr": 0.1,
                        "cycle_first_step_size": 10,
                        "cycle_first_stair_count": 20,
                    },
                },
            },
            {"schedule", "no-momentum"},
        ),
    ],
    ids=[
        "unknown type with invalid params",
        "missing module with auto",
        "two faults of a schedule",
    ],
)
def test_validate_invalid_scheduler_block_reports_every_error(sections, rules):
    problems = validate({"train_batch_size": 8} | sections)
    assert {problem.rule for problem in problems if problem.severity == "error"} == rules


@pytest.mark.parametrize("world_size", [None, 4])
def test_check_automatic_number_of_pipeline_stages_is_the_default(world_size):
    sizes = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2}
    config = {**sizes, "zero_optimization": {"stage": 1}, "pipeline": {"stages": "auto"}}
    assert validate(config, world_size, reject_auto=True) == []
    assert load_config(config, world_size=4).batch.accumulation == 1
