"""Models with parameters that no loss depends on, or only some losses, on two ranks."""

import pytest
import torch

import engine
from tests.testing.distributed import run_distributed_test
from tests.testing.small_model import copy_parameters


class Branches(torch.nn.Module):
    """Two layers that are used alternately, and one that is never used."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)
        self.pooler = torch.nn.Linear(4, 4)

    def forward(self, x, step):
        return self.second(x) if step % 2 else self.first(x)


def train_branches(backend):
    for stage in range(4):
        trainer, *_ = engine.initialize(
            model=Branches(),
            config={
                "train_micro_batch_size_per_gpu": 2,
                "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
                "zero_optimization": {"stage": stage},
                "engine": {"backend": backend},
            },
        )
        before = copy_parameters(trainer)
        for step in range(3):
            trainer.backward(trainer(torch.ones(2, 4), step).mean())
            trainer.step()
        changes = [
            not torch.equal(*both) for both in zip(before, copy_parameters(trainer), strict=True)
        ]
        if (backend, stage) != ("deepspeed", 3):  # whose parameters are empty here
            assert changes == [True, True, True, True, False, False], stage


@pytest.mark.parametrize("backend", ["torch", "deepspeed"])
def test_unused_parameters_stay_unchanged_and_raise_no_error(backend):
    run_distributed_test(train_branches, 2, backend)
