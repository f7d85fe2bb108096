"""Curves: values that can be checked by hand, and properties of the combinators."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schedules.core.combinators import (
    delay,
    dilate,
    join,
    multiply_at,
    pointwise,
    repeat,
    stairs,
)
from schedules.core.curves import (
    constant,
    cosine,
    exponential,
    inverse_time,
    linear,
    linear_growth,
    log,
    polynomial,
)

TABLE = [
    ("constant", constant(0.5), [0.5, 0.5, 0.5]),
    ("linear", linear(1.0, 0.0, steps=4), [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
    ("linear with 0 steps", linear(1.0, 0.0, steps=0), [0.0, 0.0]),
    ("cosine", cosine(2.0, 0.0, steps=2), [2.0, 1.0, 0.0, 0.0]),
    ("log", log(0.0, 1.0, steps=2), [0.0, 1.0, 1.0]),
    ("log with 1 step", log(0.0, 1.0, steps=1), [0.0, 1.0, 1.0]),
    ("inverse time", inverse_time(1.0, rate=2.0, steps=2), [1.0, 0.5, 1 / 3, 0.25]),
    ("linear growth", linear_growth(1.0, rate=1.0, steps=4), [1.0, 1.25, 1.5, 1.75, 2.0, 2.25]),
    ("floor stairs", stairs(linear(0.0, 3.0, steps=5), 5, 3), [0, 0, 1, 1, 2, 3, 3]),
    ("ceiling stairs", stairs(linear(3.0, 0.0, 5), 5, 3, rounds_up=True), [3, 2, 1, 1, 0, 0]),
    ("endless stairs", stairs(linear_growth(1.0, 1.0, 2), 2, count=1), [1, 1, 2, 2, 3, 3]),
    ("join", join([linear(0.0, 2.0, 2), linear(9.0, 8.0, 1)], [2]), [0.0, 1.0, 9.0, 8.0]),
    ("join with an empty part", join([constant(1), constant(2), constant(3)], [1, 1]), [1, 3, 3]),
    ("negative delay", delay(linear(0.0, 1.0, 4), -3), [0.75, 1.0, 1.0]),
]


@pytest.mark.parametrize(("curve", "values"), [row[1:] for row in TABLE], ids=[r[0] for r in TABLE])
def test_curve_equals_values_computed_by_hand(curve, values):
    assert [curve(step) for step in range(len(values))] == pytest.approx(values, rel=1e-15)
    assert list(curve.values(len(values))) == [curve(step) for step in range(len(values))]


@pytest.mark.parametrize("curve", [row[1] for row in TABLE], ids=[row[0] for row in TABLE])
def test_curve_called_with_array_equals_single_steps_bitwise(curve):
    steps = np.arange(200)
    assert curve(steps).tolist() == [curve(step) for step in range(200)]


@pytest.mark.parametrize("curve", [row[1] for row in TABLE], ids=[row[0] for row in TABLE])
@pytest.mark.parametrize("steps", [0, 7, 2.5], ids=lambda steps: f"delay {steps}")
def test_curve_array_equals_single_steps_bitwise(curve, steps):
    delayed = join([constant(0.0), curve], [steps])
    assert delayed.array(200).tolist() == [delayed(step) for step in range(200)]


@given(st.integers(1, 300), st.data())
def test_stairs_array_equals_single_steps(steps, data):
    count = data.draw(st.integers(1, 400))
    start = data.draw(st.integers(0, 400))
    rounds_up = data.draw(st.booleans())
    curve = delay(stairs(linear(0.1, 0.7, steps), steps, count, rounds_up=rounds_up), -start)
    assert curve.array(50).tolist() == [curve(step) for step in range(50)]


def test_curve_called_with_unsorted_2d_array_keeps_order_and_shape():
    curve = join([linear(0.0, 1.0, 3), cosine(1.0, 0.0, 5)], [3])
    steps = np.array([[7, 0, 3], [3, 20, 1]])
    assert curve(steps).tolist() == [
        [curve(7), curve(0), curve(3)],
        [curve(3), curve(20), curve(1)],
    ]
    assert curve(np.array([], dtype=int)).shape == (0,)


def test_stairs_start_at_exact_steps():
    # The float 0.29 * 100 is less than 29; with integers stair 29 of 100 starts exactly at step 29.
    curve = stairs(linear(0.0, 100.0, 100), 100, 100)
    assert list(curve.values(101)) == pytest.approx(list(range(101)), abs=1e-12)


@given(
    st.floats(-1e3, 1e3),
    st.floats(-1e3, 1e3),
    st.integers(1, 1000),
    st.sampled_from([linear, cosine, log]),
)
def test_ramp_ends_are_exact_and_bound_all_values(start, end, steps, ramp):
    curve = ramp(start, end, steps)
    values = curve(np.arange(steps + 2))
    assert values[0] == start
    assert values[steps] == values[-1] == end
    assert min(start, end) <= values.min() <= values.max() <= max(start, end)


@given(st.integers(1, 300), st.data())
def test_stairs_descent_mirrors_ascent(steps, data):
    count = data.draw(st.integers(1, steps))
    up = stairs(linear(0.0, 1.0, steps), steps, count)
    down = stairs(linear(1.0, 0.0, steps), steps, count, rounds_up=True)
    ascent = list(up.values(steps + 1))
    assert list(down.values(steps + 1)) == pytest.approx(ascent[::-1], abs=1e-12)
    assert len(set(ascent)) == count + 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear(0.0, 1.0, 2)(-1), "`steps` must be >= 0, got -1"),
        (lambda: linear(0.0, 1.0, 2)(np.array([3, -4])), "All `steps` must be >= 0, got -4"),
        (lambda: join([constant(1.0)], [3]), "for 1 parts, got (3,)"),
        (lambda: join([constant(1.0)] * 3, [5, 3]), "in ascending order, got (5, 3)"),
    ],
)
def test_curve_invalid_argument_is_reported(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


def test_phases_of_nested_curves_keep_names_and_start_steps():
    inner = join([linear(0, 1, 4), constant(1), constant(2)], [4, 9], names=("up", "on", "late"))
    curve = join([constant(0), delay(inner, -2), constant(3)], [10, 16], names=("a", "b", "c"))
    # "late" would start at step 17, but the last part has already started by then.
    assert curve.phases() == ((0, "a"), (12, "on"), (16, "c"))
    assert dilate(curve, 2).phases() == ((0, "a"), (24, "on"), (32, "c"))
    assert pointwise(max, constant(0), curve).phases() == curve.phases()
    assert join([constant(1), constant(2)], [3]).phases() == ()


@pytest.mark.parametrize("ratio", [3, 0.3, 1 / 3, 7.7, 1e-3, 1e3, 0.1 + 0.2])
@pytest.mark.parametrize("steps", [1, 0.7, 10 / 3, 15])
@pytest.mark.parametrize("shape", ["repeat", "growing", "stairs", "polynomial"])
def test_pieces_of_a_stretched_curve_advance_and_equal_single_steps(shape, steps, ratio):
    """The bounds of stretched pieces are rounded: a piece can seem to end where it starts."""
    curve = {
        "repeat": lambda: repeat(lambda cycle, length: linear(0.0, 1.0, length), steps),
        "growing": lambda: repeat(lambda cycle, length: cosine(1.0, 0.0, length), steps, 1.05),
        "stairs": lambda: stairs(exponential(1.0, 0.9, steps), steps, count=1),
        "polynomial": lambda: polynomial(1.0, 0.0, steps, power=0.5),
    }[shape]()
    stretched = dilate(curve, ratio)
    each = [stretched(step) for step in range(300)]
    assert list(stretched.values(300)) == each
    assert stretched.array(300).tolist() == each
    assert stretched(np.arange(300)).tolist() == each


def test_repeat_far_step_takes_bounded_time_and_memory():
    far = 2**53 - 10
    for growth in (1, 1.0001, 1.5, 2, 2**53):
        curve = repeat(lambda cycle, length: linear(0.0, 1.0, length), 10, growth)
        assert 0 <= curve(far) <= 1
        assert len(curve._starts) <= 100_001
    never_longer = repeat(lambda cycle, length: linear(0.0, 1.0, length), 10, 1.05)
    assert never_longer(far) == never_longer(far % 10)


def test_exponential_too_large_for_a_float_is_infinite():
    curve = exponential(0.1, 10.0, steps=1)
    assert curve(400) == np.inf
    assert exponential(0.0, 10.0, steps=1)(400) == 0
    assert multiply_at(0.1, 1e300, [1, 2])(5) == np.inf
