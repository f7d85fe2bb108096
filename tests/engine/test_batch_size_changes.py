"""Batch sizes that change during a run, and epochs whose last batch is incomplete."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset

import engine
from engine.errors import MisuseError
from tests.testing.distributed import run_distributed_test
from tests.testing.replicas import (
    build_layers,
    check_step,
    compute_loss,
    compute_mean_gradients,
    copy_weights,
    start,
)


def train_step(trainer, steps):
    """Train one step on a micro-batch per element of ``steps``, and check it."""
    before = copy_weights(trainer.module)
    means = [compute_mean_gradients(trainer.module, step) for step in steps]
    for index, step in enumerate(steps):
        trainer.backward(compute_loss(trainer, trainer.global_rank, step))
        assert trainer.step() == (index == len(steps) - 1)
    expected = {name: sum(mean[name] for mean in means) / len(steps) for name in before}
    check_step(trainer.module, before, expected)


def change_batch_sizes(backend):
    trainer = start(build_layers(), engine={"backend": backend})
    train_step(trainer, [0])
    assert trainer.global_samples == 6
    trainer.set_train_batch_size(12)
    assert (trainer.train_batch_size(), trainer.gradient_accumulation_steps()) == (12, 2)
    assert trainer.train_micro_batch_size_per_gpu() == 3
    train_step(trainer, [1, 2])
    assert trainer.global_samples == 18
    trainer.set_train_micro_batch_size(1)
    assert (trainer.train_batch_size(), trainer.gradient_accumulation_steps()) == (4, 2)
    assert trainer.train_micro_batch_size_per_gpu() == 1
    train_step(trainer, [3, 4])
    assert (trainer.global_samples, trainer.global_steps, trainer.micro_steps) == (22, 3, 5)
    for size in (3, 0, -2, 1):
        with pytest.raises(ValueError, match="`train_batch_size`"):
            trainer.set_train_batch_size(size)
    for size in (0, -1):
        with pytest.raises(ValueError, match="`micro_batch_size`"):
            trainer.set_train_micro_batch_size(size)
    trainer.backward(compute_loss(trainer, trainer.global_rank))
    trainer.step()
    for change in (trainer.set_train_batch_size, trainer.set_train_micro_batch_size):
        with pytest.raises(MisuseError):
            change(8)
    assert (trainer.train_batch_size(), trainer.gradient_accumulation_steps()) == (4, 2)


@pytest.mark.parametrize("backend", ["torch", "deepspeed"])
def test_batch_sizes_set_between_steps_apply_to_the_next_step(backend):
    run_distributed_test(change_batch_sizes, 2, backend)


class Stream(IterableDataset):
    """Seven samples: with batches of 2, an epoch has three whole micro-batches and a half one."""

    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        return iter(torch.randn(7, 4, generator=generator))


def train_on_stream(*, epochs, limit=None):
    """Train in steps of three micro-batches, of which each epoch leaves out one."""
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
    }
    trainer, _, loader, _ = engine.initialize(
        config=config, model=nn.Linear(4, 1), training_data=Stream()
    )
    for _ in range(epochs):
        for index, x in enumerate(loader):
            if limit is None or index < limit:
                trainer.backward(trainer(x).pow(2).mean())
                trainer.step()
    return trainer


def test_incomplete_step_at_the_end_of_an_epoch_is_discarded():
    trainer, expected = train_on_stream(epochs=3), train_on_stream(epochs=3, limit=3)
    torch.testing.assert_close(
        trainer.module.state_dict(), expected.module.state_dict(), rtol=0, atol=0
    )
    assert all(parameter.grad is None for parameter in trainer.module.parameters())
    for counted in (trainer, expected):
        assert (counted.global_steps, counted.micro_steps, counted.global_samples) == (3, 9, 18)
    before = copy.deepcopy(trainer.module.state_dict())
    trainer.backward(trainer(torch.ones(2, 4)).mean())
    assert not trainer.step()  # the next step starts with its first micro-batch
    torch.testing.assert_close(trainer.module.state_dict(), before, rtol=0, atol=0)
