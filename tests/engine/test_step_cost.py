"""What a step of the engine costs, in what is the same in every run: function calls, and memory."""

import cProfile
import pstats
import weakref

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


def test_spent_gradients_are_out_of_sight_at_once_and_gone_with_the_next_backward_pass():
    model = net()
    config = {"train_batch_size": 8, "optimizer": {"type": "AdamW"}}
    trainer, *_ = engine.initialize(config=config, model=model)
    x = torch.randn(8, 16)
    trainer.backward(trainer(x).sum())
    spent = [weakref.ref(parameter.grad) for parameter in model.parameters()]
    trainer.step()
    assert all(parameter.grad is None for parameter in model.parameters())
    loss = trainer(x).sum()
    assert all(gradient() is not None for gradient in spent), "for the next backward pass to fill"
    trainer.scale(loss)
    assert all(gradient() is None for gradient in spent)
