"""Test the command-line arguments that override the config file."""

import argparse
import json

import pytest
import torch

import engine
from engine.config import load_config

COSINE = {"type": "cosine_schedule_with_warmup", "params": {"warmup_steps": 2, "max_steps": 10}}
CONFIG = {
    "train_batch_size": 4,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "scheduler": COSINE,
}


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "ds_config.json"
    file.write_text(json.dumps(CONFIG, indent=2))
    return file


def parse(*arguments):
    parser = engine.add_config_arguments(argparse.ArgumentParser())
    return engine.add_schedule_arguments(parser).parse_args(list(arguments))


def test_load_config_arguments_override_the_file_and_report_both_values(path):
    args = parse("--learning_rate", "0.5", "--max_steps", "20", "--end_lr_ratio", "0.2")
    config = load_config(path, args=args)
    assert config.optimizer.params["lr"] == 0.5
    assert (config.schedule.max_steps, config.schedule.end_lr_ratio) == (20, 0.2)
    assert config.horizon(None).total_steps == 20
    assert [str(override) for override in config.overrides] == [
        f"`optimizer.params.lr` is set to 0.5 by --learning_rate, overriding 0.1 at {path}:6:13",
        "`engine.max_duration` is set to 20 by --max_steps",
        f"`scheduler.params.max_steps` is set to 20 by --max_steps, overriding 10 at {path}:13:20",
        "`scheduler.params.end_lr_ratio` is set to 0.2 by --end_lr_ratio",
    ]


def test_load_config_no_arguments_changes_nothing(path):
    assert load_config(path, args=parse()) == load_config(path)
    assert json.loads(path.read_text()) == CONFIG


def test_lr_schedule_argument_drops_params_of_the_old_schedule(path):
    args = parse("--lr_schedule", "OneCycle", "--cycle_min_lr", "0.1", "--cycle_max_lr", "[0.5]")
    schedule = load_config(path, args=args).schedule
    assert (type(schedule).__name__, schedule.cycle_max_lr) == ("OneCycle", (0.5,))


def test_boolean_argument_without_value_is_true(path):
    arguments = ("--lr_schedule", "LRRangeTest", "--lr_range_test_staircase")
    assert load_config(path, args=parse(*arguments)).schedule.lr_range_test_staircase is True
    arguments = (*arguments, "false")
    assert load_config(path, args=parse(*arguments)).schedule.lr_range_test_staircase is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rate", "-1"], "-1.0. The value was set by --learning_rate."),
        (
            ["--lr_schedule", "OneCicle"],
            "Did you mean `OneCycle`? The value was set by --lr_schedule.",
        ),
        (["--warmup_steps", "20"], "`warmup_steps` must be"),
        (["--cycle_min_lr", "0.1"], "Unknown key `cycle_min_lr`"),
        (["--learning_rate", "nan"], "must be a finite number"),
        (["--steps_this_run", "0"], "set by --steps_this_run."),
    ],
)
def test_invalid_argument_is_named_in_the_error(path, arguments, message):
    with pytest.raises(engine.ConfigError) as raised:
        load_config(path, args=parse(*arguments))
    assert message in str(raised.value)


def test_assignments_override_the_file_and_the_arguments(path):
    assignments = [
        *("optimizer.params.lr=0.3", "/scheduler/params/max_steps=30", "bf16.enabled=true"),
        'optimizer.param_groups=[{"params": "bias$", "lr": 1}]',
        "optimizer.param_groups.0.lr=0.2",
        "engine.max_duration=30ba",
    ]
    args = parse("--learning_rate", "0.5")
    config = load_config(path, args=args, assignments=assignments)
    assert config.optimizer.params["lr"] == 0.3
    assert config.schedule.max_steps == 30
    assert config.precision == "bf16"
    assert config.raw["optimizer"]["param_groups"] == [{"params": "bias$", "lr": 0.2}]
    lines = [str(override) for override in config.overrides]
    assert lines[:2] == [
        f"`optimizer.params.lr` is set to 0.5 by --learning_rate, overriding 0.1 at {path}:6:13",
        "`optimizer.params.lr` is set to 0.3 by --set, overriding 0.5 from --learning_rate",
    ]
    assert json.loads(path.read_text()) == CONFIG


def test_assignment_that_is_not_finite_is_an_error(path):
    with pytest.raises(engine.ConfigError, match="must be a finite number"):
        load_config(path, assignments=["optimizer.params.lr=NaN"])


def test_initialize_applies_the_assignments_of_the_environment(path, monkeypatch, caplog):
    monkeypatch.setenv("ONECYCLE_SET", json.dumps(["optimizer.params.lr=0.25"]))
    with caplog.at_level("INFO", logger="onecycle"):
        trainer, *_ = engine.initialize(config=path, model=torch.nn.Linear(2, 1))
    assert trainer.optimizer.param_groups[0]["initial_lr"] == 0.25
    assert "`optimizer.params.lr` is set to 0.25 by --set" in caplog.text


def test_add_config_arguments_adds_only_deepspeeds_flags():
    args = engine.add_config_arguments(argparse.ArgumentParser()).parse_args([])
    assert vars(args) == {"deepspeed": False, "deepspeed_config": None}


def add_own_arguments(parser):
    parser.add_argument("--deepspeed_config", default="own.json")
    parser.add_argument("-n", "--max_steps", type=int, default=5)
    parser.add_argument_group("mine").add_argument("--learning_rate", type=float, default=7.0)
    parser.add_argument("--warmup", dest="warmup_steps", type=int)
    return parser


@pytest.mark.parametrize("is_first", [True, False], ids=["before", "after"])
def test_arguments_of_the_script_replace_ours_and_override_nothing(path, is_first):
    parser = argparse.ArgumentParser()
    if is_first:
        add_own_arguments(parser)
    engine.add_config_arguments(parser)
    engine.add_schedule_arguments(parser)
    if not is_first:
        add_own_arguments(parser)
    args = parser.parse_args([])
    assert (args.deepspeed_config, args.max_steps, args.learning_rate) == ("own.json", 5, 7.0)
    assert load_config(path, args=args) == load_config(path)
    own = ["-n", "9", "--max_steps", "8", "--learning_rate", "3", "--warmup", "1"]
    args = parser.parse_args([*own, "--end_lr_ratio", "0.2"])
    assert (args.max_steps, args.learning_rate, args.warmup_steps) == (8, 3.0, 1)
    overrides = load_config(path, args=args).overrides
    assert [override.argument for override in overrides] == ["--end_lr_ratio"]


def test_help_lists_every_group_of_arguments(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    for name in ("--deepspeed_config", "--steps_this_run", "--cycle_max_lr", "--warmup_type"):
        assert name in text


def test_steps_this_run_ends_the_run_without_changing_the_schedule(path):
    model = torch.nn.Linear(2, 1)
    data = [torch.ones(2) for _ in range(12)]
    args = parse("--deepspeed_config", str(path), "--steps_this_run", "5")
    trainer, _, loader, _ = engine.initialize(args, model, training_data=data)
    lrs = []
    for _ in range(4):
        for batch in loader:
            lrs.append(trainer.get_lr()[0])
            trainer.backward(trainer(batch).mean())
            trainer.step()
    whole, *_ = engine.initialize(model=torch.nn.Linear(2, 1), config=path)
    expected = [whole.lr_scheduler.schedule.curves({"lr": (0.1,)})["lr"][0](k) for k in range(5)]
    assert lrs == expected
    assert trainer.run_is_over
    trainer.backward(trainer(torch.ones(4, 2)).mean())
    with pytest.raises(RuntimeError, match="run_is_over"):
        trainer.step()
