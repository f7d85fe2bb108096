"""The data loader: every step sees the same samples, however a batch is split."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import IterableDataset, TensorDataset

from engine.config import load_config
from engine.distributed.ranks import Ranks
from engine.training.batch_sampler import GlobalBatchSampler, order_dataset
from engine.training.data import build_loader


def batches(samples, world_size=1, epochs=2, **config):
    """Return the sorted samples of each step, over all ranks and micro-batches."""
    resolved = load_config(config, world_size=world_size)
    order = order_dataset(samples, resolved)
    ranks = [GlobalBatchSampler(order, resolved, rank) for rank in range(world_size)]
    seen = []
    for _ in range(epochs):
        micro = [list(sampler) for sampler in ranks]
        accumulation = resolved.batch.accumulation
        for start in range(0, len(ranks[0]), accumulation):
            together = [batch for rank in micro for batch in rank[start : start + accumulation]]
            assert {len(batch) for batch in together} == {resolved.batch.micro}
            seen.append(sorted(sample for batch in together for sample in batch))
    return seen


@given(st.integers(1, 100), st.booleans())
@settings(deadline=None)
def test_sampler_with_a_split_batch_yields_the_same_samples_per_step(samples, drop_last):
    if drop_last and samples < 8:
        samples += 8
    common = {"train_batch_size": 8, "dataloader_drop_last": drop_last}
    one = batches(samples, **common)
    assert batches(samples, gradient_accumulation_steps=4, **common) == one
    assert batches(samples, world_size=2, **common) == one
    assert batches(samples, world_size=2, gradient_accumulation_steps=2, **common) == one


def test_sampler_epoch_has_every_sample_and_a_full_last_batch():
    first, second = batches(10, epochs=1, train_batch_size=8)
    assert set(first) | set(second) == set(range(10))
    assert len(second) == 8


def test_sampler_with_drop_last_drops_an_incomplete_batch():
    assert len(batches(15, epochs=1, train_batch_size=8, dataloader_drop_last=True)) == 1


def test_sampler_order_depends_on_the_epoch_and_the_seed_only():
    run = batches(64, train_batch_size=8)
    assert run[:8] != run[8:]
    assert batches(64, train_batch_size=8) == run
    assert batches(64, train_batch_size=8, engine={"seed": 1}) != run


@pytest.mark.parametrize(
    ("samples", "drop_last", "message"),
    [
        (0, False, ">= 1, got 0"),
        (7, True, '>= 8, got 7. Set "dataloader_drop_last": false'),
    ],
)
def test_sampler_with_too_few_samples_raises(samples, drop_last, message):
    with pytest.raises(ValueError) as error:
        batches(samples, train_batch_size=8, dataloader_drop_last=drop_last)
    assert message in str(error.value)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(10))


ONE = Ranks(0, 0, 1, torch.device("cpu"))


def test_loader_of_an_iterable_dataset_keeps_its_order():
    loader = build_loader(Stream(), load_config({"train_batch_size": 4}), ONE, None)
    assert [batch.tolist() for batch in loader] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((x for x in range(8)), "must have `__len__`, got a value of type generator"),
        (set(range(8)), "must have `__getitem__`, got a value of type set"),
    ],
)
def test_loader_of_data_without_length_or_index_raises(data, message):
    with pytest.raises(ValueError, match=message):
        build_loader(data, load_config({"train_batch_size": 4}), ONE, None)


def test_loader_with_collate_fn_yields_its_batches():
    data = TensorDataset(torch.arange(8))
    loader = build_loader(data, load_config({"train_batch_size": 4}), ONE, len)
    assert list(loader) == [4, 4]
