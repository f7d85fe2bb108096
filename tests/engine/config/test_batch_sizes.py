"""Test the batch sizes: derivation of missing sizes and rejection of inconsistent ones."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import load_document
from engine.config.batch_sizes import BATCH_KEYS, BatchError, derive_batch_sizes
from engine.config.validate import check

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
        ({}, 1, "", "must be set", 'For example, add "train_batch_size": 32.'),
        ({ACCUMULATION: 2}, 1, "", "must be set", 'For example, add "train_batch_size": 32.'),
        (
            {TRAIN: 33, MICRO: 5},
            2,
            TRAIN,
            "must be a multiple of `train_micro_batch_size_per_gpu` (5) x 2 ranks, got 33",
            "Set `train_batch_size` to 30 or 40.",
        ),
        ({TRAIN: 2}, 4, TRAIN, "got 2.", "Set `train_batch_size` to 4."),
        (
            {TRAIN: 32, MICRO: 32},
            2,
            TRAIN,
            "(32) x 2 ranks, got 32.",
            "Set `train_batch_size` to 64, or remove `train_micro_batch_size_per_gpu`.",
        ),
        (
            {TRAIN: 33, MICRO: 4, ACCUMULATION: 2},
            4,
            TRAIN,
            "(4) x `gradient_accumulation_steps` (2) x 4 ranks = 32, got 33.",
            "Set `train_batch_size` to 32, or remove one of the three keys.",
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


@pytest.mark.parametrize(
    ("sizes", "factors", "near"),
    [
        ((4, 1, 16), "(1) x `gradient_accumulation_steps` (16) = 16", "16"),
        ((6, 4, None), "`train_micro_batch_size_per_gpu` (4)", "4 or 8"),
        ((4, None, 16), "`gradient_accumulation_steps` (16)", "16"),
        ((7, "auto", 2), "`gradient_accumulation_steps` (2)", "6 or 8"),
        ((4, 8, "auto"), "`train_micro_batch_size_per_gpu` (8)", "8"),
    ],
)
def test_sizes_that_fit_no_world_size_are_an_error_that_says_so(sizes, factors, near):
    config = {key: size for key, size in zip(BATCH_KEYS, sizes, strict=True) if size}
    (problem,) = check(load_document(config), None)
    assert problem.pointer == "/train_batch_size"
    assert f"{factors} for any number of ranks, got {sizes[0]}." in problem.message
    assert problem.hint.startswith(f"Set `train_batch_size` to {near}, ")


@pytest.mark.parametrize(
    ("sizes", "is_valid"),
    [
        (("auto", 4, 2), True),
        ((8, "auto", "auto"), True),
        ((8, 4, "auto"), True),
        ((None, "auto", "auto"), True),
        ((None, None, "auto"), False),
    ],
)
def test_auto_leaves_open_only_what_an_integration_can_fill_in(sizes, is_valid):
    config = {key: size for key, size in zip(BATCH_KEYS, sizes, strict=True) if size}
    assert [each.rule for each in check(load_document(config), None)] == (
        [] if is_valid else ["batch-sizes"]
    )


@given(st.integers(1, 24), st.integers(1, 4), st.integers(1, 4))
def test_sizes_are_valid_without_a_world_size_if_some_number_of_ranks_fits(
    train, micro, accumulation
):
    config = dict(zip(BATCH_KEYS, (train, micro, accumulation), strict=True))
    fits = any(not check(load_document(config), ranks) for ranks in range(1, 25))
    assert all(each.severity == "note" for each in check(load_document(config), None)) == fits


@pytest.mark.parametrize(
    ("sizes", "needed"),
    [
        ((32, 4, 2), 4),
        ((32, 32, None), 1),
        ((32, None, 32), 1),
        ((32, 16, None), None),
        ((32, None, None), None),
        ((None, 4, 2), None),
    ],
)
def test_sizes_that_fit_one_world_size_are_noted_without_a_world_size(sizes, needed):
    config = {key: size for key, size in zip(BATCH_KEYS, sizes, strict=True) if size}
    problems = check(load_document(config), None)
    assert [(each.rule, each.severity) for each in problems] == [
        ("batch-sizes", "note") for _ in [needed] if needed
    ]
    assert all(str(needed) in each.message for each in problems)
    assert check(load_document(config), needed or 1) == []
