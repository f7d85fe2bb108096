"""The loader: every update sees the same samples, however a batch is shared out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import IterableDataset, TensorDataset

from engine.config import load_config
from engine.distributed.ranks import Ranks
from engine.training.data import GlobalBatchSampler, make_loader


def batches(samples, world_size=1, epochs=2, **config):
    """The set of samples that each update sees, over all ranks and accumulation steps."""
    resolved = load_config(config, world_size=world_size)
    ranks = [GlobalBatchSampler(samples, resolved, rank) for rank in range(world_size)]
    seen = []
    for _ in range(epochs):
        micro = [list(sampler) for sampler in ranks]
        accumulation = resolved.batch.accumulation
        for begin in range(0, len(ranks[0]), accumulation):
            together = [
                batch for of_rank in micro for batch in of_rank[begin : begin + accumulation]
            ]
            assert {len(batch) for batch in together} == {resolved.batch.micro}
            seen.append(sorted(sample for batch in together for sample in batch))
    return seen


@given(st.integers(1, 100), st.booleans())
@settings(deadline=None)
def test_an_update_sees_the_same_samples_however_the_batch_is_shared_out(samples, drop_last):
    if drop_last and samples < 8:
        samples += 8
    common = {"train_batch_size": 8, "dataloader_drop_last": drop_last}
    one = batches(samples, **common)
    assert batches(samples, gradient_accumulation_steps=4, **common) == one
    assert batches(samples, world_size=2, **common) == one
    assert batches(samples, world_size=2, gradient_accumulation_steps=2, **common) == one


def test_an_epoch_shows_every_sample_and_fills_the_last_batch_up():
    first, second = batches(10, epochs=1, train_batch_size=8)
    assert set(first) | set(second) == set(range(10))
    assert len(second) == 8


def test_drop_last_leaves_out_what_does_not_fill_a_batch():
    assert len(batches(15, epochs=1, train_batch_size=8, dataloader_drop_last=True)) == 1


def test_epochs_differ_and_seeds_differ_and_runs_do_not():
    run = batches(64, train_batch_size=8)
    assert run[:8] != run[8:]
    assert batches(64, train_batch_size=8) == run
    assert batches(64, train_batch_size=8, engine={"seed": 1}) != run


@pytest.mark.parametrize(
    ("samples", "drop_last", "message"),
    [
        (0, False, "must hold at least 1 samples, but holds 0 instead; check how"),
        (7, True, 'at least 8 samples, but holds 7 instead; set "dataloader_drop_last": false'),
    ],
)
def test_too_few_samples(samples, drop_last, message):
    with pytest.raises(ValueError) as error:
        batches(samples, train_batch_size=8, dataloader_drop_last=drop_last)
    assert message in str(error.value)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(10))


ONE = Ranks(0, 0, 1, torch.device("cpu"))


def test_a_stream_is_batched_in_its_own_order():
    loader = make_loader(Stream(), load_config({"train_batch_size": 4}), ONE, None)
    assert [batch.tolist() for batch in loader] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_collate_function_makes_the_batches():
    data = TensorDataset(torch.arange(8))
    loader = make_loader(data, load_config({"train_batch_size": 4}), ONE, len)
    assert list(loader) == [4, 4]
