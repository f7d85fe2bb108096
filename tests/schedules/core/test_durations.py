"""Durations: conversion of time strings to steps, scaling, and errors."""

import pytest

from schedules import Horizon, ScheduleError, from_config, trace
from schedules.core.durations import DurationError, convert_to_steps, has_data_durations

RUN = Horizon(total_steps=100, steps_per_epoch=10, samples_per_step=4, tokens_per_sample=8)


@pytest.mark.parametrize(
    ("duration", "ratio", "expected"),
    [
        (30, 1.0, 30),
        (30, 0.5, 15),
        (7, 0.5, 3),
        ("3ep", 1.0, 30),
        ("3ep", 0.25, 7),
        ("20ba", 2.0, 40),
        ("20 BA", 1.0, 20),
        ("40sp", 1.0, 10),
        ("6sp", 1.0, 1.5),
        ("220sp", 0.5, 27.5),
        ("1e3 TOK", 1.0, 31.25),
        ("640tok", 0.5, 10),
        ("0.29dur", 1.0, 28),  # the float 0.29 * 100 is less than 29; truncated like in Composer
        ("0.29dur", 0.5, 14),
        ("1dur", 2.0, 200),
        ("1e2ba", 1.0, 100),
    ],
)
def test_convert_to_steps_duration_returns_scaled_steps(duration, ratio, expected):
    horizon = Horizon(**vars(RUN) | {"scale_ratio": ratio})
    assert convert_to_steps(duration, horizon, scaled=True) == expected


def test_convert_to_steps_unscaled_duration_scales_only_a_fraction_of_the_run():
    half = Horizon(**vars(RUN) | {"scale_ratio": 0.5})
    assert convert_to_steps("2ep", half, scaled=False) == 20
    assert convert_to_steps("0.2dur", half, scaled=False) == 10


@pytest.mark.parametrize(
    ("duration", "message"),
    [
        ("10tok", "requires the number of tokens per sample"),
        ("1.5ep", 'must contain a whole number. Only the unit "dur"'),
        ("10s", "got '10s'"),
        ("", "got ''"),
        ("0.5dur", 'requires the length of the run. Set "engine": {"max_duration"'),
        ("2ep", "requires the number of steps per epoch. On the command line"),
        ("8sp", "requires the number of samples per step. Set `train_batch_size`"),
    ],
)
def test_convert_to_steps_invalid_duration_or_missing_horizon_is_an_error(duration, message):
    with pytest.raises(DurationError) as error:
        convert_to_steps(duration, Horizon(), scaled=True)
    assert message in str(error.value)


@pytest.mark.parametrize("ratio", [0, -1, float("nan"), float("inf")])
def test_horizon_scale_ratio_not_positive_is_rejected(ratio):
    with pytest.raises(ValueError, match="`scale_ratio` must be positive and finite"):
        Horizon(scale_ratio=ratio)


@pytest.mark.parametrize(
    ("block", "field", "message"),
    [
        (("LinearWithWarmupScheduler", {"t_warmup": "2dur"}), "t_warmup", "at most `t_max`"),
        (("MultiStepScheduler", {"milestones": ["5ep", "20ba"]}), "milestones", "got [50, 20]"),
        (("StepScheduler", {"step_size": "0.001dur"}), "step_size", "to 0 steps in this run"),
        (("CosineAnnealingLR", {"T_max": 0}), "T_max", "at least 1, got 0"),
        (("Phases", {"lr": [{"to": 1.0, "duration": "0.001dur"}]}), "lr", "`lr[0].duration`"),
        (("Phases", {"momentum": [{"to": 1.0, "duration": 5}]}), "momentum", "`momentum[0]`"),
        (("Phases", {}), None, "`weight_decay` must be set"),
        (
            ("WarmupStableDecay", {"total_steps": 10, "decay_steps": 20}),
            "decay_steps",
            "`total_steps` (10)",
        ),
        (
            ("OneCycleLR", {"max_lr": 0.1, "total_steps": 10, "pct_start": 0.1}),
            "pct_start",
            "the phases end at steps 0, 9",
        ),
        (("OneCycleLR", {"max_lr": 0.1}), "total_steps", "both `epochs` and `steps_per_epoch`"),
    ],
)
def test_from_config_conflicting_durations_name_the_field(block, field, message):
    type_name, params = block
    with pytest.raises(ScheduleError) as error:
        from_config({"type": type_name, "params": params}, horizon=RUN)
    assert [fault.field for fault in error.value.problems] == [field]
    assert message in error.value.problems[0].message


def halved_every_hundred(step):
    """Halve the learning rate every 100 steps: SambaFlow's example of a custom schedule."""
    return 0.5 ** (step // 100)


def test_from_config_function_path_multiplies_base_lr():
    block = {"type": f"{__name__}:halved_every_hundred"}
    values = trace(block, 300, base={"lr": (0.4, 0.2)})["lr"]
    assert values[[0, 99, 100, 250], 0].tolist() == [0.4, 0.4, 0.2, 0.1]
    assert values[250, 1] == 0.05
    scaled = trace(block, 300, base={"lr": (0.4,)}, horizon=Horizon(scale_ratio=0.5))["lr"]
    assert scaled[[49, 50], 0].tolist() == [0.4, 0.2]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module:f", "no module 'no_such_module' was found"),
        (f"{__name__}:nothing", "has no attribute 'nothing'"),
        (f"{__name__}:RUN", "`scheduler.type` must be the import path of a scheduler class"),
    ],
)
def test_from_config_path_without_schedule_is_rejected(path, message):
    with pytest.raises(ValueError) as error:
        from_config({"type": path})
    assert message in str(error.value)


def test_from_config_finds_schedule_by_entry_point(monkeypatch):
    class Entry:
        def load(self):
            return halved_every_hundred

    def entry_points(*, group, name):
        return [Entry()] if (group, name) == ("onecycle.schedules", "halving") else []

    monkeypatch.setattr("importlib.metadata.entry_points", entry_points)
    assert trace({"type": "halving"}, 101)["lr"][100, 0] == 0.05
    with pytest.raises(ValueError, match="must be the name of a schedule, got 'halvin'"):
        from_config({"type": "halvin"})


@pytest.mark.parametrize("duration", ["3ep", "9sp", "9tok", "0.5dur", "3ba", 3])
@pytest.mark.parametrize(
    "build",
    [
        lambda own: {"type": "WarmupLR", "params": {"warmup_num_steps": own}},
        lambda own: {"type": "MultiStepScheduler", "params": {"milestones": [own]}},
        lambda own: {"type": "Phases", "params": {"lr": [{"to": 0.2, "duration": own}]}},
        lambda own: {
            "type": "ChainedScheduler",
            "params": {"schedulers": [{"type": "ConstantLR", "params": {"total_iters": own}}]},
        },
    ],
    ids=["field", "list", "phases", "part"],
)
def test_has_data_durations_finds_durations_at_any_depth(build, duration):
    assert has_data_durations(from_config(build(duration))) is (duration not in {"3ba", 3})
