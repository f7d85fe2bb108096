"""Dynamic loss scaling follows DeepSpeed's rule: examples, and a comparison with DeepSpeed."""

import warnings
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import LossScaling
from engine.training.loss_scaling import LossScaler


def scaling(**changes):
    values = {
        "loss_scale": 0,
        "initial_scale_power": 4,
        "loss_scale_window": 3,
        "hysteresis": 2,
        "consecutive_hysteresis": False,
        "min_loss_scale": 1,
    }
    return LossScaling(**(values | changes))


def scales(settings_, overflows):
    scaler = LossScaler(settings_)
    found = []
    for letter in overflows:
        scaler.update(overflow=letter == "x")
        found.append(scaler.scale)
    return found


@pytest.mark.parametrize(
    ("changes", "overflows", "expected"),
    [
        ({}, "xx", [16, 8]),  # the second overflow halves the scale
        ({}, "xxx", [16, 8, 4]),  # and so does each later one
        ({}, "....", [16, 16, 16, 32]),  # the first step without overflow does not count
        ({}, ".......", [16, 16, 16, 32, 32, 32, 64]),
        ({}, "x..x", [16, 16, 16, 8]),  # steps without overflow do not reset the hysteresis
        ({"consecutive_hysteresis": True}, "x..x", [16, 16, 16, 16]),
        ({}, "x....x", [16, 16, 16, 16, 32, 32]),  # doubling the scale resets the hysteresis
        ({"hysteresis": 1}, "x", [8]),
        ({"loss_scale": 128.0}, "xx....", [128] * 6),
        ({"hysteresis": 1, "min_loss_scale": 5}, "xx", [8, 5]),
    ],
)
def test_scaler_after_overflows_has_the_expected_scale(changes, overflows, expected):
    assert scales(scaling(**changes), overflows) == expected


def test_scaler_overflow_at_the_lowest_scale_raises():
    with pytest.raises(FloatingPointError, match="minimum loss scale, 8"):
        scales(scaling(hysteresis=1, min_loss_scale=8), "xx")


def test_scaler_without_minimum_raises_at_the_smallest_float16():
    found = []
    scaler = LossScaler(scaling(hysteresis=1, initial_scale_power=0, min_loss_scale=0))
    with pytest.raises(FloatingPointError, match="minimum loss scale"):
        for _ in range(100):
            found.append(scaler.scale)
            scaler.update(overflow=True)
    assert found == [2.0**-power for power in range(25)]


@given(st.text("x...", max_size=60), st.integers(1, 3), st.integers(1, 4), st.booleans())
@settings(deadline=None)
def test_scaler_gives_the_scales_of_deepspeed(overflows, hysteresis, window, consecutive):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scalers = pytest.importorskip("deepspeed.runtime.fp16.loss_scaler")
    theirs = scalers.DynamicLossScaler(
        2.0**30, window, 1, hysteresis, consecutive, raise_error_at_min_scale=False
    )
    found = []
    with mock.patch.object(scalers, "dist"), mock.patch.object(scalers, "logger"):
        for letter in overflows:
            theirs.update_scale(letter == "x")
            found.append(theirs.cur_scale)
    ours = scaling(
        initial_scale_power=30,
        hysteresis=hysteresis,
        loss_scale_window=window,
        consecutive_hysteresis=consecutive,
    )
    if 1.0 not in found:
        assert scales(ours, overflows) == found


@given(st.text("x...", max_size=20), st.text("x...", max_size=20))
def test_scaler_restored_continues_like_the_original(before, after):
    ours = scaling(initial_scale_power=100)
    whole = LossScaler(ours)
    for letter in before:
        whole.update(overflow=letter == "x")
    restored = LossScaler(ours)
    restored.load_state_dict(whole.state_dict())
    for letter in after:
        whole.update(overflow=letter == "x")
        restored.update(overflow=letter == "x")
    assert restored.state_dict() == whole.state_dict()
