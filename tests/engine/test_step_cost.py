"""What a step of the engine costs in function calls, which are the same in every run."""

import cProfile
import pstats

import torch
from torch.nn.functional import cross_entropy

import engine


def calls(step, steps=20):
    for _ in range(3):
        step()
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(steps):
        step()
    profile.disable()
    return pstats.Stats(profile).total_calls / steps


def net():
    layers = [torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)]
    return torch.nn.Sequential(*layers)


def test_a_step_makes_at_most_forty_calls_more_than_the_raw_loop():
    x, y = torch.randn(8, 16), torch.randint(4, (8,))
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def raw():
        cross_entropy(model(x), y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    cycle = {"cycle_min_lr": 0.001, "cycle_max_lr": 0.01, "cycle_first_step_size": 1000}
    config = {
        "train_batch_size": 8,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW"},
        "scheduler": {"type": "OneCycle", "params": cycle},
    }
    trainer, *_ = engine.initialize(config=config, model=net())

    def ours():
        trainer.backward(cross_entropy(trainer(x), y))
        trainer.step()

    assert calls(ours) <= calls(raw) + 40
