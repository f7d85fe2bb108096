"""A small regression run in one process: config, model, data and training loop."""

import copy
import math

import torch
from torch.nn.functional import mse_loss
from torch.utils.data import TensorDataset

import engine

CYCLE = {
    "type": "OneCycle",
    "params": {
        "cycle_min_lr": 0.01,
        "cycle_max_lr": 0.05,
        "cycle_first_step_size": 4,
        "cycle_min_mom": 0.8,
        "cycle_max_mom": 0.95,
    },
}
CONFIG = {
    "train_batch_size": 8,
    "optimizer": {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9}},
    "scheduler": CYCLE,
}


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def dataset(samples=64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 4, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True))


def start(config=CONFIG, **changes):
    config = copy.deepcopy(config) | changes
    trainer, *_, loader, _ = engine.initialize(
        config=config, model=model(), training_data=dataset()
    )
    return trainer, loader


def train(trainer, loader, steps, poison=()):
    """Train for a number of steps and return the (loss, lr, momentum) of each step."""
    seen = []
    total = 0.0
    end = trainer.global_steps + steps
    while True:
        for x, y in loader:
            if trainer.global_steps == end:
                return seen
            used = (trainer.get_lr(), trainer.get_momentum())
            loss = mse_loss(trainer(x).float(), y)
            if trainer.global_steps in poison:
                loss = loss * math.inf
            trainer.backward(loss)
            total += loss.item() / trainer.gradient_accumulation_steps()
            last = trainer.is_gradient_accumulation_boundary()
            trainer.step()
            if last:
                seen.append((total, *used))
                total = 0.0
