"""Batch arithmetic: any two sizes give the third, and what does not multiply is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config.batch_sizes import BATCH_KEYS, BatchError, solve

TRAIN, MICRO, ACCUMULATION = BATCH_KEYS


@given(
    st.integers(1, 64),
    st.integers(1, 64),
    st.integers(1, 64),
    st.sampled_from(
        [{MICRO, ACCUMULATION}, {TRAIN, MICRO}, {TRAIN, ACCUMULATION}, set(BATCH_KEYS)]
    ),
)
def test_any_two_give_the_third(micro, accumulation, world_size, keys):
    sizes = {TRAIN: micro * accumulation * world_size, MICRO: micro, ACCUMULATION: accumulation}
    solved = solve({key: sizes[key] for key in keys}, world_size)
    assert (solved.train, solved.micro, solved.accumulation) == tuple(sizes.values())


@pytest.mark.parametrize(
    ("given_sizes", "world_size", "expected"),
    [
        ({TRAIN: 32}, 4, (32, 8, 1)),
        ({MICRO: 8}, 4, (32, 8, 1)),
        ({MICRO: 8, ACCUMULATION: 2}, 4, (64, 8, 2)),
    ],
)
def test_accumulation_is_one_where_nothing_determines_it(given_sizes, world_size, expected):
    solved = solve(given_sizes, world_size)
    assert (solved.train, solved.micro, solved.accumulation) == expected


@pytest.mark.parametrize(
    ("given_sizes", "world_size", "key", "message", "hint"),
    [
        ({}, 1, "", "but neither is.", 'Add "train_batch_size": 32.'),
        ({ACCUMULATION: 2}, 1, "", "but neither is.", 'Add "train_batch_size": 32.'),
        (
            {TRAIN: 32, MICRO: 5},
            2,
            TRAIN,
            "must be a multiple of `train_micro_batch_size_per_gpu` (5) x 2 ranks, but is 32",
            "The nearest are 30 and 40.",
        ),
        ({TRAIN: 2}, 4, TRAIN, "but is 2 instead.", "The nearest is 4."),
        (
            {TRAIN: 33, MICRO: 4, ACCUMULATION: 2},
            4,
            TRAIN,
            "(4) x `gradient_accumulation_steps` (2) x 4 ranks = 32, but is 33 instead.",
            "Make it 32, or leave one of the three out: it is derived then.",
        ),
    ],
)
def test_what_does_not_multiply(given_sizes, world_size, key, message, hint):
    with pytest.raises(BatchError) as error:
        solve(given_sizes, world_size)
    assert error.value.key == key
    assert message in str(error.value)
    assert error.value.hint == hint
