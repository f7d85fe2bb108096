"""Every kind of mistake in a config: found at its place, all at once, with the cure."""

import copy
import json
import types

import pytest

import engine
from engine import ConfigError, load_config
from engine.config import load_document
from engine.config.edits import with_scheduler
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


def validate(config, world_size=None, *, runs=False):
    """What is wrong with a config; notes are another matter."""
    problems = check(load_document(config), world_size, runs=runs)
    return [problem for problem in problems if problem.severity != "note"]


def changed(pointer, value):
    """The good config with one thing put in place, or taken out where the value is Ellipsis."""
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


def test_a_right_config_has_no_problems():
    assert validate(GOOD, world_size=4) == []
    assert validate({"train_micro_batch_size_per_gpu": 1}) == []


MISTAKES = [
    (
        "/gradient_cliping",
        1,
        "unknown-key",
        "/gradient_cliping",
        "Did you mean `gradient_clipping`",
    ),
    ("/zzz", 1, "unknown-key", "/zzz", 'let it begin with "//" or "x-".'),
    ("/fp16/los_scale", 1, "unknown-key", "/fp16/los_scale", "Did you mean `loss_scale`?"),
    ("/optimizer/param", {}, "unknown-key", "/optimizer/param", "Did you mean `params`"),
    ("/optimizer/params/momentum", 0.9, "unknown-key", None, "no key that anything here reads"),
    (
        "/scheduler/params/warmup_num_steps",
        5,
        "unknown-key",
        "/scheduler/params/warmup_num_steps",
        "It is a parameter of WarmupCosineLR and WarmupDecayLR and WarmupLR.",
    ),
    ("/optimizer/type", "Adamm", "unknown-optimizer", None, "Did you mean `Adam`?"),
    ("/optimizer/type", ..., "missing-key", "/optimizer", "`type` must be given in optimizer"),
    ("/scheduler/type", "OneCycl", "unknown-scheduler", None, "Did you mean `OneCycle`?"),
    ("/scheduler/type", "math", "unknown-scheduler", None, "`onecycle schedules` lists them."),
    ("/scheduler/type", 3, "wrong-type", None, "must be a string, but is 3 instead."),
    ("/scheduler/params", [], "wrong-type", None, "must be an object, but is [] instead."),
    (
        "/scheduler/params/cycle_max_lr",
        ...,
        "missing-key",
        "/scheduler/params",
        "`cycle_max_lr` must be given",
    ),
    (
        "/scheduler/params/cycle_min_lr",
        0.9,
        "schedule",
        "/scheduler/params/cycle_max_lr",
        "must be at least `cycle_min_lr` (0.9)",
    ),
    (
        "/scheduler/params/cycle_first_stair_count",
        11,
        "schedule",
        None,
        "0 makes the half continuous",
    ),
    (
        "/scheduler/params/cycle_first_step_size",
        -10,
        "out-of-range",
        None,
        "at least 1, but is -10",
    ),
    (
        "/scheduler/params/cycle_max_mom",
        1,
        "out-of-range",
        None,
        "at least 0 and less than 1, but is 1",
    ),
    (
        "/train_batch_size",
        "8",
        "wrong-type",
        None,
        '`train_batch_size` must be a whole number or "auto", at least 1, but is "8"',
    ),
    ("/train_batch_size", True, "wrong-type", None, "but is true instead."),
    ("/train_batch_size", 0, "out-of-range", None, "at least 1, but is 0 instead."),
    ("/train_batch_size", ..., "batch-sizes", "", 'Add "train_batch_size": 32.'),
    (
        "/train_micro_batch_size_per_gpu",
        3,
        "batch-sizes",
        "/train_batch_size",
        "The nearest are 6 and 9.",
    ),
    ("/gradient_clipping", "auto", "unresolved-auto", None, "transformers and accelerate"),
    ("/steps_per_print", "auto", "auto-nobody-fills", None, "which nobody fills in here"),
    ("/gradient_clipping", -1, "out-of-range", None, "at least 0, but is -1 instead."),
    ("/gradient_clipping", float("nan"), "not-finite", None, "but is nan instead."),
    ("/optimizer/params/lr", float("inf"), "not-finite", None, "but is inf instead."),
    ("/optimizer/params/betas", [0.9], "out-of-range", None, "but is [0.9] instead."),
    ("/optimizer/params/betas", [0.9, 1.5], "out-of-range", "/optimizer/params/betas/1", "1.5"),
    ("/optimizer/params/lr", object, "wrong-type", None, "must be a value that JSON has"),
    ("/bf16", {"enabled": True}, "precision", "/fp16/enabled", "Set all but one of them to false."),
    (
        "/engine",
        {"scale_schedule_ratio": 0},
        "out-of-range",
        "/engine/scale_schedule_ratio",
        "more than 0",
    ),
    ("/engine", {"max_duration": "1dur"}, "out-of-range", "/engine/max_duration", "a time such as"),
    ("/engine", {"sed": 1}, "unknown-key", "/engine/sed", "Did you mean `seed`?"),
]


@pytest.mark.parametrize(("pointer", "value", "rule", "place", "message"), MISTAKES)
def test_one_mistake_is_one_problem(pointer, value, rule, place, message):
    config = changed(pointer, value)
    (problem,) = validate(config, world_size=1, runs=True)
    assert (problem.rule, problem.severity) == (rule, "error")
    assert problem.pointer == (pointer if place is None else place)
    assert message in str(problem)
    with pytest.raises(ConfigError) as error:
        load_config(config)
    assert error.value.problems == (problem,)


@pytest.mark.parametrize(
    ("scheduler", "run", "message"),
    [
        (("CosineAnnealingScheduler", {}), {}, "needs the length of the run"),
        (("StepScheduler", {"step_size": "9tok"}), {}, "must be a whole number or a time"),
        (
            ("LinearWithWarmupScheduler", {"t_warmup": "60ba"}),
            {"max_duration": 50},
            "`t_warmup` must be at most `t_max` (50 updates), but is 60 updates instead",
        ),
        (
            ("StepScheduler", {"step_size": 4}),
            {"scale_schedule_ratio": 0.1},
            "at least 1, got 0",
        ),
    ],
)
def test_durations_are_proved_against_the_run(scheduler, run, message):
    type_name, params = scheduler
    config = {"train_batch_size": 8, "scheduler": {"type": type_name, "params": params}}
    (problem,) = validate(config | {"engine": run})
    assert message in str(problem)
    assert problem.pointer.startswith("/scheduler/params")


@pytest.mark.parametrize(
    ("phase", "place", "message"),
    [
        ({"to": 0.1}, "/scheduler/params/lr/0", "`duration` must be given"),
        ({"to": -1, "duration": 5}, "/scheduler/params/lr/0/to", "at least 0, but is -1"),
        ({"duration": 5, "shap": "linear"}, "/scheduler/params/lr/0/shap", "Did you mean `shape`?"),
        ({"duration": 5, "shape": "sine"}, "/scheduler/params/lr/0/shape", "one of"),
    ],
)
def test_a_wrong_phase_is_found_at_its_place(phase, place, message):
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
def test_durations_that_only_the_loader_knows_are_left_to_the_run(scheduler):
    assert validate({"train_batch_size": 8, "scheduler": scheduler}) == []


def test_momentum_needs_an_optimizer_that_has_it():
    config = changed("/optimizer", {"type": "adagrad"})
    (problem,) = validate(config)
    assert str(problem) == (
        "OneCycle must drive momentum or betas, but Adagrad has neither. "
        'Set "cycle_momentum": false in scheduler.params, or choose another optimizer.'
    )
    config["scheduler"]["params"]["cycle_momentum"] = False
    assert validate(config) == []


def test_every_mistake_of_a_file_is_reported_in_the_order_of_places(tmp_path):
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
    assert f"{path}:4:3: `gradient_cliping` is no key" in str(error.value)


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_batch_sizes_are_proved_for_the_world_size(world_size):
    config = {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
    }
    assert bool(validate(config, world_size=world_size)) == (world_size != 2)
    assert validate(config) == []


def test_a_missing_file_is_named_with_the_nearest(tmp_path):
    (tmp_path / "ds_config.json").write_text("{}")
    with pytest.raises(ConfigError) as error:
        validate(tmp_path / "ds_confg.json")
    assert f"The nearest is {tmp_path / 'ds_config.json'}." in str(error.value)
    with pytest.raises(ConfigError, match="holds no JSON file"):
        validate(tmp_path / "nowhere" / "ds_config.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfe{", "must be UTF-8 text, but byte 0 is not"), (None, "Is a directory")],
)
def test_what_cannot_be_read(tmp_path, content, message):
    path = tmp_path
    if content is not None:
        path = tmp_path / "c.json"
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        validate(path)


@pytest.mark.parametrize("value", [[], 3, "x", None])
def test_a_file_that_holds_no_object(tmp_path, value):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(value))
    (problem,) = validate(path)
    assert "must be a JSON object" in problem.message


def test_the_users_dict_is_not_changed_and_not_shared():
    config = copy.deepcopy(GOOD)
    resolved = load_config(config)
    assert config == GOOD
    config["optimizer"]["params"]["lr"] = 99
    assert resolved.optimizer.params["lr"] == 0.001


def test_resolving_fills_in_every_default():
    resolved = engine.load_config(changed("/scheduler", ...), world_size=2)
    assert resolved.schedule is None
    assert (resolved.batch.micro, resolved.batch.world_size) == (4, 2)
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


def test_every_key_that_is_missing_is_said_once():
    config = {"train_batch_size": 8, "scheduler": {"type": "OneCycle", "params": {}}}
    messages = [problem.message for problem in engine.validate(config)]
    assert messages == [
        f"`{key}` must be given in scheduler.params, but is missing."
        for key in ("cycle_min_lr", "cycle_max_lr")
    ]


def test_any_mapping_is_a_config():
    assert engine.validate(types.MappingProxyType({"train_batch_size": 8})) == []


@pytest.mark.parametrize("value", [10**350, 10**5000], ids=["long", "longer"])
def test_a_whole_number_that_no_float_holds_is_refused(value):
    (problem,) = engine.validate({"train_batch_size": 8, "gradient_clipping": value})
    assert "must be a finite number" in problem.message


@pytest.mark.parametrize("comment", ["// mine", "/* mine */", "  # mine"])
def test_a_value_is_put_in_beside_a_comment_and_a_note(comment):
    text = f'{{"// note": "a", "scheduler": {{"type": "A", "params": {{"x": 1{comment}\n}}}}}}'
    new = with_scheduler(parse(text, "c.json"), {"type": "A", "params": {"x": 2.5}})
    assert new == text.replace('"x": 1', '"x": 2.5')
    without = parse('{"// note": "a"}', "c.json")
    assert parse(with_scheduler(without, {"type": "A", "params": {}}), "c.json").value == {
        "// note": "a",
        "scheduler": {"type": "A", "params": {}},
    }
