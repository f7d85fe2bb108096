"""Test the batch sizes: derivation of missing sizes and rejection of inconsistent ones."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config.batch_sizes import BATCH_KEYS, BatchError, derive_batch_sizes

TRAIN, MICRO, ACCUMULATION = BATCH_KEYS


@given(
    st.integers(1, 64),
    st.integers(1, 64),
    st.integers(1, 64),
    st.sampled_from(
        [{MICRO, ACCUMULATION}, {TRAIN, MICRO}, {TRAIN, ACCUMULATION}, set(BATCH_KEYS)]
    ),
)
def test_derive_batch_sizes_two_sizes_determine_the_third(micro, accumulation, world_size, keys):
    sizes = {TRAIN: micro * accumulation * world_size, MICRO: micro, ACCUMULATION: accumulation}
    solved = derive_batch_sizes({key: sizes[key] for key in keys}, world_size)
    assert (solved.train, solved.micro, solved.accumulation) == tuple(sizes.values())


@pytest.mark.parametrize(
    ("given_sizes", "world_size", "expected"),
    [
        ({TRAIN: 32}, 4, (32, 8, 1)),
        ({MICRO: 8}, 4, (32, 8, 1)),
        ({MICRO: 8, ACCUMULATION: 2}, 4, (64, 8, 2)),
    ],
)
def test_derive_batch_sizes_undetermined_accumulation_is_one(given_sizes, world_size, expected):
    solved = derive_batch_sizes(given_sizes, world_size)
    assert (solved.train, solved.micro, solved.accumulation) == expected


@pytest.mark.parametrize(
    ("given_sizes", "world_size", "key", "message", "hint"),
    [
        ({}, 1, "", "must be set", 'Add, for example, "train_batch_size": 32.'),
        ({ACCUMULATION: 2}, 1, "", "must be set", 'Add, for example, "train_batch_size": 32.'),
        (
            {TRAIN: 32, MICRO: 5},
            2,
            TRAIN,
            "must be a multiple of `train_micro_batch_size_per_gpu` (5) x 2 ranks, got 32",
            "Set it to 30 or 40.",
        ),
        ({TRAIN: 2}, 4, TRAIN, "got 2.", "Set it to 4."),
        (
            {TRAIN: 33, MICRO: 4, ACCUMULATION: 2},
            4,
            TRAIN,
            "(4) x `gradient_accumulation_steps` (2) x 4 ranks = 32, got 33.",
            "Set it to 32, or remove one of the three keys.",
        ),
    ],
)
def test_derive_batch_sizes_inconsistent_sizes_raises_with_the_fix(
    given_sizes, world_size, key, message, hint
):
    with pytest.raises(BatchError) as error:
        derive_batch_sizes(given_sizes, world_size)
    assert error.value.key == key
    assert message in str(error.value)
    assert error.value.hint == hint
