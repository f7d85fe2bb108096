"""DeepSpeed's schedules: values that can be checked by hand, and what their parameters must be."""

import numpy as np
import pytest

import schedules
from schedules import OneCycle, ScheduleError, from_config, trace

TUTORIAL = {
    "type": "OneCycle",
    "params": {
        "cycle_first_step_size": 1000,
        "cycle_first_stair_count": 500,
        "cycle_second_step_size": 1000,
        "cycle_second_stair_count": 500,
        "decay_step_size": 1000,
        "cycle_min_lr": 0.0001,
        "cycle_max_lr": 0.0010,
        "decay_lr_rate": 0.001,
        "cycle_min_mom": 0.85,
        "cycle_max_mom": 0.99,
        "decay_mom_rate": 0.0,
    },
}
CYCLE = {"cycle_min_lr": 0.1, "cycle_max_lr": 0.5, "cycle_first_step_size": 4}


def test_the_tutorials_block():
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
    climbed = (lr[:2001] - 1e-4) / 9e-4
    assert momentum[:2001] == pytest.approx(0.99 - 0.14 * climbed, abs=1e-12)


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
def test_one_cycle(params, lr):
    values = trace({"type": "OneCycle", "params": CYCLE | params}, len(lr))
    assert values["lr"][:, 0] == pytest.approx(lr, rel=1e-12)


def test_momentum_decays_downwards():
    params = {"cycle_max_mom": 0.9, "decay_mom_rate": 1.0, "decay_step_size": 1}
    momentum = trace({"type": "OneCycle", "params": CYCLE | params}, 1000)["momentum"][:, 0]
    assert momentum[8:11] == pytest.approx([0.9, 0.45, 0.3])
    assert (np.diff(momentum[8:]) < 0).all()
    assert momentum.min() > 0


def test_without_momentum_only_the_learning_rate_is_driven():
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
def test_range_test_and_warmups(type_name, params, lr):
    values = trace({"type": type_name, "params": params}, len(lr), base={"lr": (0.6,)})
    assert values["lr"][:, 0] == pytest.approx(lr, rel=1e-12, abs=1e-15)


def test_a_list_gives_one_value_to_each_group():
    params = CYCLE | {"cycle_min_lr": [0.1, 1.0], "cycle_max_lr": [0.5, 2.0]}
    values = trace({"type": "OneCycle", "params": params}, 5, base={"lr": (0.1, 0.2)})
    assert values["lr"][4].tolist() == [0.5, 2.0]
    assert values["lr"].shape == (5, 2)


def test_groups_keep_their_own_learning_rates_where_no_maximum_is_given():
    values = trace(
        {"type": "WarmupLR", "params": {"warmup_num_steps": 2}}, 3, base={"lr": (1e-2, 1e-4)}
    )
    assert values["lr"][2].tolist() == [1e-2, 1e-4]


def test_one_number_for_groups_that_differ_is_refused_by_name():
    schedule = from_config({"type": "WarmupLR", "params": {"warmup_max_lr": 0.1}})
    with pytest.raises(ValueError) as error:
        schedule.curves({"lr": (1e-2, 1e-4)})
    assert str(error.value) == (
        "`warmup_max_lr` must be a list of 2 numbers, one per param group, got 0.1. "
        "A single number would set all groups to the same value (group 0: 0.01, group 1: 0.0001)."
    )


REFUSED = [
    ({"cycle_min_lr": 0.6}, "cycle_max_lr", "must be at least `cycle_min_lr` (0.6), but is 0.5"),
    ({"cycle_min_lr": [0.1, 0.9]}, "cycle_max_lr", "at least `cycle_min_lr` ([0.1, 0.9])"),
    ({"cycle_min_mom": 0.95}, "cycle_max_mom", "at least `cycle_min_mom` (0.95), but is 0.9"),
    ({"cycle_max_mom": 1.0}, "cycle_max_mom", "at least 0 and less than 1, got 1.0"),
    ({"cycle_min_mom": -0.1}, "cycle_min_mom", "got -0.1"),
    ({"decay_mom_rate": -1}, "decay_mom_rate", "at least 0, got -1"),
    ({"cycle_first_step_size": 0}, "cycle_first_step_size", "at least 1, got 0"),
    ({"cycle_first_step_size": -5}, "cycle_first_step_size", "at least 1, got -5"),
    ({"cycle_first_step_size": 2.5}, "cycle_first_step_size", "a whole number"),
    ({"cycle_first_step_size": True}, "cycle_first_step_size", "got True"),
    ({"cycle_second_step_size": 0}, "cycle_second_step_size", "at least 1, got 0"),
    (
        {"cycle_first_stair_count": 5},
        "cycle_first_stair_count",
        "at most the 4 updates of its half",
    ),
    ({"cycle_second_stair_count": 9}, "cycle_second_stair_count", "0 makes the half continuous"),
    ({"cycle_max_lr": float("nan")}, "cycle_max_lr", "got nan"),
    ({"cycle_max_lr": float("inf")}, "cycle_max_lr", "got inf"),
    ({"cycle_max_lr": "0.1"}, "cycle_max_lr", "got '0.1'"),
    ({"cycle_max_lr": None}, "cycle_max_lr", "got None"),
    ({"cycle_max_lr": []}, "cycle_max_lr", "got ()"),
    ({"cycle_momentum": 1}, "cycle_momentum", "true or false, got 1"),
    ({"last_batch_iteration": -2}, "last_batch_iteration", "at least -1"),
    (
        {"decay_step_size": 1, "post_cycle_decay_step_size": 1},
        "post_cycle_decay_step_size",
        "keep one of them",
    ),
]


@pytest.mark.parametrize(("params", "field", "message"), REFUSED)
def test_refused_with_the_field_and_the_cure(params, field, message):
    with pytest.raises(ScheduleError) as error:
        OneCycle(**(CYCLE | params))
    (fault,) = error.value.faults
    assert fault.field == field
    assert message in fault.message


def test_every_wrong_field_is_reported_at_once():
    with pytest.raises(ScheduleError) as error:
        OneCycle(cycle_min_lr=-1, cycle_max_lr="x", cycle_max_mom=2)
    assert [fault.field for fault in error.value.faults] == [
        "cycle_min_lr",
        "cycle_max_lr",
        "cycle_max_mom",
    ]


def test_a_warmup_longer_than_the_run_is_refused():
    for name in ("WarmupDecayLR", "WarmupCosineLR"):
        with pytest.raises(
            ScheduleError, match="must be at most `total_num_steps` \\(5\\), but is 6"
        ):
            getattr(schedules, name)(total_num_steps=5, warmup_num_steps=6)
