"""DeepSpeed's schedules: values computed by hand, and the checks of their parameters."""

import numpy as np
import pytest

import schedules
from schedules import OneCycle, ScheduleError, from_config, trace
from tests.testing.schedule_instances import TUTORIAL

CYCLE = {"cycle_min_lr": 0.1, "cycle_max_lr": 0.5, "cycle_first_step_size": 4}


def test_onecycle_tutorial_block_matches_the_formula():
    values = trace(TUTORIAL, 4001)
    lr, momentum = values["lr"][:, 0], values["momentum"][:, 0]
    assert lr[[0, 1]].tolist() == [1e-4, 1e-4]
    assert lr[2] == pytest.approx(1.018e-4, rel=1e-12)
    assert lr[1000] == 1e-3
    assert lr[999] < 1e-3 > lr[1001]
    assert lr[2000] == 1e-4
    after = np.arange(2000, 4001)
    assert lr[after] == pytest.approx(1e-4 / (1 + 0.001 * (after - 2000) / 1000), rel=1e-15)
    assert momentum[[0, 1000, 2000, 4000]].tolist() == [0.99, 0.85, 0.99, 0.99]
    progress = (lr[:2001] - 1e-4) / 9e-4
    assert momentum[:2001] == pytest.approx(0.99 - 0.14 * progress, abs=1e-12)


@pytest.mark.parametrize(
    ("params", "lr"),
    [
        ({}, [0.1, 0.2, 0.3, 0.4, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1]),
        ({"cycle_second_step_size": 2}, [0.1, 0.2, 0.3, 0.4, 0.5, 0.3, 0.1, 0.1]),
        ({"cycle_first_stair_count": 2}, [0.1, 0.1, 0.3, 0.3, 0.5, 0.3, 0.3, 0.1, 0.1]),
        (
            {"cycle_first_stair_count": 2, "cycle_second_stair_count": 0},
            [0.1, 0.1, 0.3, 0.3, 0.5, 0.4, 0.3, 0.2, 0.1],
        ),
        (
            {"cycle_second_step_size": 2, "decay_step_size": 2, "decay_lr_rate": 1.0},
            [0.1, 0.2, 0.3, 0.4, 0.5, 0.3, 0.1, 0.1 / 1.5, 0.05, 0.04],
        ),
        (
            {"cycle_second_step_size": 2, "post_cycle_decay_step_size": 2, "decay_lr_rate": 1.0},
            [0.1, 0.2, 0.3, 0.4, 0.5, 0.3, 0.1, 0.1 / 1.5, 0.05, 0.04],
        ),
        ({"last_batch_iteration": 3}, [0.5, 0.4, 0.3, 0.2, 0.1, 0.1]),
    ],
)
def test_onecycle_values_match_hand_computed_values(params, lr):
    values = trace({"type": "OneCycle", "params": CYCLE | params}, len(lr))
    assert values["lr"][:, 0] == pytest.approx(lr, rel=1e-12)


def test_onecycle_momentum_decreases_in_the_decay():
    params = {"cycle_max_mom": 0.9, "decay_mom_rate": 1.0, "decay_step_size": 1}
    momentum = trace({"type": "OneCycle", "params": CYCLE | params}, 1000)["momentum"][:, 0]
    assert momentum[8:11] == pytest.approx([0.9, 0.45, 0.3])
    assert (np.diff(momentum[8:]) < 0).all()
    assert momentum.min() > 0


def test_onecycle_without_cycle_momentum_sets_only_lr():
    values = trace({"type": "OneCycle", "params": CYCLE | {"cycle_momentum": False}}, 3)
    assert list(values) == ["lr"]


@pytest.mark.parametrize(
    ("type_name", "params", "lr"),
    [
        (
            "LRRangeTest",
            {"lr_range_test_min_lr": 0.1, "lr_range_test_step_size": 2},
            [0.1, 0.15, 0.2],
        ),
        (
            "LRRangeTest",
            {
                "lr_range_test_min_lr": 0.1,
                "lr_range_test_step_size": 2,
                "lr_range_test_staircase": True,
                "lr_range_test_step_rate": 3.0,
            },
            [0.1, 0.1, 0.4, 0.4, 0.7],
        ),
        ("WarmupLR", {"warmup_num_steps": 2, "warmup_type": "linear"}, [0.0, 0.3, 0.6, 0.6]),
        (
            "WarmupLR",
            {"warmup_num_steps": 4, "warmup_max_lr": 1.0},
            [0.0, 0.5, np.log(3) / np.log(4), 1.0, 1.0],
        ),
        (
            "WarmupDecayLR",
            {"warmup_num_steps": 2, "total_num_steps": 4, "warmup_type": "linear"},
            [0.0, 0.3, 0.6, 0.3, 0.0, 0.0],
        ),
        (
            "WarmupCosineLR",
            {
                "warmup_num_steps": 2,
                "total_num_steps": 4,
                "warmup_type": "linear",
                "warmup_min_ratio": 0.5,
                "cos_min_ratio": 0.0,
            },
            [0.3, 0.45, 0.6, 0.3, 0.0, 0.0],
        ),
    ],
)
def test_range_test_and_warmups_match_hand_computed_values(type_name, params, lr):
    values = trace({"type": type_name, "params": params}, len(lr), base={"lr": (0.6,)})
    assert values["lr"][:, 0] == pytest.approx(lr, rel=1e-12, abs=1e-15)


def test_onecycle_lists_set_one_value_per_param_group():
    params = CYCLE | {"cycle_min_lr": [0.1, 1.0], "cycle_max_lr": [0.5, 2.0]}
    values = trace({"type": "OneCycle", "params": params}, 5, base={"lr": (0.1, 0.2)})
    assert values["lr"][4].tolist() == [0.5, 2.0]
    assert values["lr"].shape == (5, 2)


def test_warmup_without_maximum_reaches_each_groups_lr():
    values = trace(
        {"type": "WarmupLR", "params": {"warmup_num_steps": 2}}, 3, base={"lr": (1e-2, 1e-4)}
    )
    assert values["lr"][2].tolist() == [1e-2, 1e-4]


def test_warmup_one_maximum_for_different_groups_is_an_error():
    schedule = from_config({"type": "WarmupLR", "params": {"warmup_max_lr": 0.1}})
    with pytest.raises(ValueError, match="`warmup_max_lr` must be a list with one number") as error:
        schedule.curves({"lr": (1e-2, 1e-4)})
    assert "group 0: 0.01, group 1: 0.0001" in str(error.value)


INVALID_PARAMETERS = [
    ({"cycle_min_lr": 0.6}, "cycle_max_lr", ["`cycle_min_lr` (0.6)", "0.5"]),
    ({"cycle_min_lr": [0.1, 0.9]}, "cycle_max_lr", ["`cycle_min_lr` ([0.1, 0.9])"]),
    ({"cycle_min_mom": 0.95}, "cycle_max_mom", ["`cycle_min_mom` (0.95)", "0.9"]),
    ({"cycle_max_mom": 1.0}, "cycle_max_mom", ["0", "1", "1.0"]),
    ({"cycle_min_mom": -0.1}, "cycle_min_mom", ["-0.1"]),
    ({"decay_mom_rate": -1}, "decay_mom_rate", ["0", "-1"]),
    ({"cycle_first_step_size": 0}, "cycle_first_step_size", ["1", "0"]),
    ({"cycle_first_step_size": -5}, "cycle_first_step_size", ["1", "-5"]),
    ({"cycle_first_step_size": 2.5}, "cycle_first_step_size", ["2.5"]),
    ({"cycle_first_step_size": True}, "cycle_first_step_size", ["True"]),
    ({"cycle_second_step_size": 0}, "cycle_second_step_size", ["1", "0"]),
    ({"cycle_first_stair_count": 5}, "cycle_first_stair_count", ["at most 4", "got 5"]),
    ({"cycle_second_stair_count": 9}, "cycle_second_stair_count", ["at most 4", "Set it to 0"]),
    ({"cycle_max_lr": float("nan")}, "cycle_max_lr", ["nan"]),
    ({"cycle_max_lr": float("inf")}, "cycle_max_lr", ["inf"]),
    ({"cycle_max_lr": "0.1"}, "cycle_max_lr", ["'0.1'"]),
    ({"cycle_max_lr": []}, "cycle_max_lr", ["or a list with at least one value", "got []"]),
    ({"cycle_momentum": 1}, "cycle_momentum", ["true or false", "1"]),
    ({"last_batch_iteration": -2}, "last_batch_iteration", ["-1", "-2"]),
    (
        {"decay_step_size": 1, "post_cycle_decay_step_size": 1},
        "post_cycle_decay_step_size",
        ["alias of `decay_step_size`"],
    ),
]


@pytest.mark.parametrize(("params", "field", "parts"), INVALID_PARAMETERS)
def test_onecycle_invalid_parameter_is_named_with_its_value(params, field, parts):
    with pytest.raises(ScheduleError) as error:
        OneCycle(**(CYCLE | params))
    (fault,) = error.value.problems
    assert fault.field == field
    for part in (f"`{field}`", *parts):
        assert part in fault.message


def test_onecycle_several_invalid_fields_are_all_reported():
    with pytest.raises(ScheduleError) as error:
        OneCycle(cycle_min_lr=-1, cycle_max_lr="x", cycle_max_mom=2)
    assert [fault.field for fault in error.value.problems] == [
        "cycle_min_lr",
        "cycle_max_lr",
        "cycle_max_mom",
    ]


def test_warmup_longer_than_the_run_is_an_error():
    for name in ("WarmupDecayLR", "WarmupCosineLR"):
        with pytest.raises(ScheduleError, match=r"must be at most `total_num_steps` \(5\), got 6"):
            getattr(schedules, name)(total_num_steps=5, warmup_num_steps=6)


@pytest.mark.parametrize(
    ("name", "params", "peak"),
    [
        ("OneCycle", {"cycle_min_lr": 0.0, "cycle_max_lr": None, "cycle_first_step_size": 2}, 2),
        ("CyclicLR", {"base_lr": 0.0, "max_lr": None, "step_size_up": 2}, 2),
        ("OneCycleLR", {"max_lr": None, "total_steps": 10}, 2),
    ],
)
def test_maximum_of_null_is_each_groups_lr(name, params, peak):
    block = {"type": name, "params": params | {"relative": True}}
    lrs = trace(block, 9, base={"lr": (1.0, 0.125)})["lr"]
    assert lrs[peak].tolist() == [1.0, 0.125]
    assert lrs.max() == 1.0
    missing = {key: value for key, value in params.items() if value is not None}
    with pytest.raises(ScheduleError, match="max_lr` is required"):
        from_config({"type": name, "params": missing})


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("OneCycle", {"cycle_min_lr": 0.5, "cycle_max_lr": 2.0, "cycle_first_step_size": 2}),
        ("OneCycleLR", {"max_lr": 2.0, "total_steps": 9}),
        ("CyclicLR", {"base_lr": 0.5, "max_lr": 2.0, "step_size_up": 2}),
        ("WarmupLR", {"warmup_min_lr": 0.5, "warmup_max_lr": 2.0, "warmup_num_steps": 2}),
        ("WarmupDecayLR", {"warmup_max_lr": 2.0, "warmup_num_steps": 2, "total_num_steps": 9}),
        ("LRRangeTest", {"lr_range_test_min_lr": 2.0, "lr_range_test_step_size": 2}),
    ],
)
def test_relative_bounds_are_multiples_of_each_groups_lr(name, params):
    base = {"lr": (1.0, 0.125, 0.0)}
    with pytest.raises(
        ValueError, match='set `"relative": true` and use multiples of the initial values'
    ):
        trace({"type": name, "params": params}, 9, base=base)
    alone = trace({"type": name, "params": params}, 9, base={"lr": 1.0})["lr"]
    lrs = trace({"type": name, "params": params | {"relative": True}}, 9, base=base)["lr"]
    assert lrs == pytest.approx(alone * [[1.0, 0.125, 0.0]])
