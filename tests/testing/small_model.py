"""A small model for distributed tests, with a config and a training step."""

import torch

import engine


def build_model():
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(3))
    return torch.nn.Sequential(*layers, torch.nn.Linear(6, 1))


def build_config(**changes):
    """Return a config for FSDP2 at stage 3, with the given sections replaced."""
    return {
        "train_batch_size": 4,
        "zero_optimization": {"stage": 3},
        "optimizer": {"type": "AdamW", "params": {"weight_decay": 0.1}},
        "engine": {"backend": "torch"},
    } | changes


def start(**changes):
    """Return a training engine for the small model."""
    return engine.initialize(model=build_model(), config=build_config(**changes))[0]


def train_step(trainer):
    """Train one step on data that differs between ranks. Return whether the step was applied."""
    trainer.backward(trainer(torch.ones(2, 6) * (trainer.global_rank + 1)).pow(2).mean())
    return trainer.step()


def copy_parameters(trainer):
    """Return copies of all parameters, each gathered from all ranks."""
    return [
        (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for p in trainer.module.parameters()
    ]


def all_equal(first, second):
    return len(first) == len(second) and all(map(torch.equal, first, second))
