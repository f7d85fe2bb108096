"""`schedules.trace`: the initial hyperparameters of param groups."""

import pytest

import schedules

CONSTANT = {"type": "ConstantLR", "params": {"factor": 1.0}}


def test_trace_repeats_a_number_for_each_param_group():
    values = schedules.trace(CONSTANT, 2, base={"lr": [0.1, 0.2], "momentum": 0.5})
    assert values["lr"].tolist() == [[0.1, 0.2]] * 2


@pytest.mark.parametrize(
    ("base", "named"),
    [
        ({"learning_rate": 0.1}, "learning_rate"),
        ({"lr": [0.1, 0.2], "momentum": [0.9, 0.8, 0.7]}, "lr"),
        ({"lr": []}, "lr"),
    ],
)
def test_trace_invalid_base_is_an_error_that_names_the_key(base, named):
    with pytest.raises(ValueError, match=f"`base` .*{named}"):
        schedules.trace(CONSTANT, 2, base=base)
