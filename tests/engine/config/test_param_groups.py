"""Validate the param groups of a config: their patterns, hyperparameters and schedules."""

import json
import time

import pytest
import torch

from engine.backends.deepspeed_config import build_deepspeed_config
from engine.config import ConfigError, load_config
from engine.config.param_groups import build_group_schema
from engine.config.parser import parse
from engine.config.schema import OPTIMIZERS
from engine.config.validate import check

ADAMW = {"type": "AdamW", "params": {"lr": 0.1, "weight_decay": 0.1}}
STEP = {"type": "StepLR", "params": {"step_size": 5}}
CYCLE = {
    "type": "OneCycle",
    "params": {"cycle_min_lr": 0.1, "cycle_max_lr": 0.5, "cycle_first_step_size": 2},
}


def find_problems(*entries, scheduler=None, kind="AdamW", **keys):
    params = {"lr": 0.1} if kind == "Rprop" else ADAMW["params"]
    optimizer = {"type": kind, "params": params, "param_groups": list(entries), **keys}
    config = {"train_batch_size": 8, "optimizer": optimizer}
    if scheduler is not None:
        config["scheduler"] = scheduler
    problems = check(parse(json.dumps(config, indent=1), "f"), 1)
    return {each.pointer.removeprefix("/optimizer"): each for each in problems}


def test_valid_groups_have_no_problems():
    entries = [
        {"params": "head", "lr": 0.2, "betas": [0, 0.9], "name": "head", "//": "a comment"},
        {"params": ["a", "^b\\.\\d+"], "no_decay": False, "scheduler": STEP},
        {"params": "c", "scheduler": CYCLE, "eps": 1},
    ]
    problems = find_problems(*entries, scheduler=STEP, no_decay=True, layer_decay=0.9)
    assert problems == {}


@pytest.mark.parametrize(
    ("entry", "pointer", "message"),
    [
        ({"params": "*.bias"}, "/params", 'Write ".*\\\\.bias"'),
        ({"params": ["a", "(b"]}, "/params", 'regular expression, got "(b"'),
        ({"params": "a{99999999999}"}, "/params", "must be a valid regular expression"),
        ({"params": "a" * 501}, "/params", "longer than 500 characters"),
        ({"params": []}, "/params", "a list, got []"),
        ({"params": 3}, "/params", "must be a string or a list, got 3"),
        ({"lr": 0.1}, "", "Missing key `params`"),
        ({"params": "a", "wieght_decay": 0}, "/wieght_decay", "Did you mean `weight_decay`?"),
        ({"params": "a", "momentum": 0.9}, "/momentum", "Unknown key `momentum`"),
        ({"params": "a", "lr": -1}, "/lr", "must be a number, at least 0, got -1"),
        ({"params": "a", "lr": "auto"}, "/lr", "must be a number, at least 0"),
        ({"params": "a", "scheduler": "StepLR"}, "/scheduler", "must be an object"),
        ({"params": "a", "scheduler": {"type": "StepRL"}}, "/scheduler/type", "mean `StepLR`?"),
        (
            {"params": "a", "scheduler": {"type": "StepLR", "params": {"step_sise": 3}}},
            "/scheduler/params/step_sise",
            "Did you mean `step_size`?",
        ),
        (
            {"params": "a", "scheduler": {"type": "Phases", "params": {}}},
            "/scheduler/params",
            "`lr`, `momentum` or `weight_decay` must be set",
        ),
        (
            {"params": "a", "scheduler": {"type": "ReduceLROnPlateau"}},
            "/scheduler",
            "depends on the metric",
        ),
    ],
)
def test_invalid_group_is_reported_at_its_key(entry, pointer, message):
    problem = find_problems({"params": "b"}, entry)[f"/param_groups/1{pointer}"]
    assert problem.severity == "error"
    assert message in f"{problem.message} {problem.hint}"
    assert problem.line > 1


def test_all_problems_of_groups_are_reported_at_once():
    entries = [{"params": "*", "lr": -1, "x": 1}, {"scheduler": {"type": 3}}, 5]
    assert set(find_problems(*entries)) == {
        "/param_groups/0/params",
        "/param_groups/0/lr",
        "/param_groups/0/x",
        "/param_groups/1",
        "/param_groups/1/scheduler/type",
        "/param_groups/2",
    }


def test_own_schedule_that_does_not_fit_the_optimizer_is_an_error():
    problems = find_problems({"params": "a", "scheduler": CYCLE}, kind="Rprop")
    assert "changes momentum, but Rprop has none" in problems["/param_groups/0/scheduler"].message
    wd = {"type": "Phases", "params": {"weight_decay": [{"to": 0.1, "duration": 5}]}}
    problems = find_problems({"params": "a", "scheduler": wd}, kind="Rprop")
    assert "weight_decay, but Rprop" in problems["/param_groups/0/scheduler"].message


def test_own_schedule_besides_a_feedback_schedule_is_an_error():
    plateau = {"type": "ReduceLROnPlateau"}
    problems = find_problems({"params": "a", "scheduler": STEP}, scheduler=plateau)
    assert "no group can have its own" in problems["/param_groups/0/scheduler"].message


@pytest.mark.parametrize(
    ("entries", "keys"),
    [
        ([{"params": "a", "lr": 0.5}, {"params": "b"}], {}),
        ([], {"layer_decay": 0.5}),
        ([{"params": "a"}], {"layer_decay": 0.5}),
    ],
)
def test_one_learning_rate_for_different_groups_is_an_error_before_launch(entries, keys):
    problems = find_problems(*entries, scheduler=CYCLE, **keys)
    assert "`cycle_min_lr` must be a list" in problems["/scheduler/params"].message
    relative = {**CYCLE, "params": {**CYCLE["params"], "cycle_max_lr": 1, "relative": True}}
    assert "/scheduler/params" not in find_problems(*entries, scheduler=relative, **keys)


def test_different_groups_with_own_schedules_need_no_lists():
    entries = [{"params": "a", "lr": 0.5, "scheduler": CYCLE}, {"params": "b"}]
    assert "/scheduler/params" not in find_problems(*entries, scheduler=CYCLE)


def test_no_decay_without_weight_decay_is_reported():
    assert find_problems(kind="Rprop", no_decay=True)["/no_decay"].severity == "error"
    optimizer = {"type": "AdamW", "no_decay": True}
    (note,) = check(parse(json.dumps({"train_batch_size": 8, "optimizer": optimizer}), "f"), 1)
    assert (note.rule, note.severity, note.pointer) == ("no-effect", "note", "/optimizer/no_decay")


def test_groups_of_muon_are_rejected():
    problem = find_problems({"params": "a"}, kind="Muon")["/param_groups"]
    assert "DeepSpeed" in problem.hint


def test_many_groups_are_rejected_quickly():
    start = time.perf_counter()
    problems = find_problems(*[{"params": "*"}] * 20_000)
    assert "at most 200 entries, got 20,000" in problems["/param_groups"].message
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("kind", [k for k, v in OPTIMIZERS.items() if "x-removed" not in v])
def test_every_hyperparameter_of_a_group_is_read_per_group(kind):
    """PyTorch's optimizers read a value per group only if it is among their defaults."""
    keys = build_group_schema(kind)["items"]["properties"].keys()
    own = keys - {"params", "name", "no_decay", "scheduler"}
    assert {"lr"} <= own
    is_divided_by_deepspeed = kind == "Muon"  # its param groups are an error
    if (
        hasattr(torch.optim, kind)
        and not is_divided_by_deepspeed
        and "x-backend" not in OPTIMIZERS[kind]
    ):
        optimizer = getattr(torch.optim, kind)([torch.nn.Parameter(torch.ones(1, 1))])
        assert own <= optimizer.defaults.keys() - {"initial_accumulator_value"}


def test_a_schedule_of_a_group_may_name_code_which_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "named_by_a_group.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    block = {"type": "named_by_a_group:f"}
    problem = find_problems({"params": "a", "scheduler": block})["/param_groups/0/scheduler/type"]
    assert (problem.rule, problem.severity) == ("named-code", "note")
    optimizer = ADAMW | {"param_groups": [{"params": "a", "scheduler": block}]}
    with pytest.raises(ConfigError, match="imported"):
        load_config({"train_batch_size": 8, "optimizer": optimizer})


def test_deepspeed_does_not_get_the_keys_of_groups():
    keys = {"no_decay": True, "layer_decay": 0.5, "param_groups": [{"params": "a"}]}
    config = load_config({"train_batch_size": 8, "optimizer": ADAMW | keys})
    passed = build_deepspeed_config(config, builds_optimizer=True)
    assert passed["optimizer"] == ADAMW
