"""DDP with models that use only some of their parameters in each forward pass."""

import torch

import engine
from tests.testing.distributed import run_distributed_test
from tests.testing.small_model import all_equal, build_config, copy_parameters, train_step


class Branches(torch.nn.Module):
    """Two layers, of which each forward pass uses one in turn."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 1), torch.nn.Linear(6, 1)
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        return (self.first if self.passes % 2 else self.second)(x)


def train_branches():
    section = {"backend": "torch", "find_unused_parameters": True}
    config = build_config(zero_optimization={"stage": 0}, engine=section)
    trainer, *_ = engine.initialize(model=Branches(), config=config)
    before = copy_parameters(trainer)
    assert [train_step(trainer) for _ in range(4)] == [True] * 4
    after = copy_parameters(trainer)
    assert not any(map(torch.equal, before, after))
    return after


def test_ddp_with_find_unused_parameters_trains_all_layers():
    first, second = run_distributed_test(train_branches, 2)
    assert all_equal(first, second)
