"""DeepSpeed: the three ways to run a backward pass give the same steps."""

import pytest
import torch

from tests.testing.distributed import run_distributed_test
from tests.testing.small_model import all_equal, copy_parameters, start

ZERO_2 = {"zero_optimization": {"stage": 2}, "engine": {"backend": "deepspeed"}}


def train_by(way):
    """Train two steps of two micro-batches; DeepSpeed's hooks scale the gradients."""
    trainer = start(**ZERO_2, gradient_accumulation_steps=2, steps_per_print=1)
    for micro_batch in range(4):
        torch.manual_seed(10 * micro_batch + trainer.global_rank)
        loss = trainer(torch.randn(1, 6)).pow(2).mean()
        match way:
            case "trainer.backward":
                trainer.backward(loss)
            case "trainer.scale":
                trainer.scale(loss).backward()
            case "loss.backward":
                loss.backward()
        trainer.step()
    assert trainer.global_steps == 2
    return copy_parameters(trainer)


def train_by_each_way():
    expected = train_by("trainer.backward")
    assert all_equal(train_by("trainer.scale"), expected)
    assert all_equal(train_by("loss.backward"), expected)


@pytest.mark.slow
def test_deepspeed_with_each_way_to_run_backward_takes_the_same_steps():
    run_distributed_test(train_by_each_way, 2)
