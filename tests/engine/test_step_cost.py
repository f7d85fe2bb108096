"""The cost of an engine step, measured in function calls and memory, which do not vary."""

import cProfile
import pstats
import weakref

import torch
from torch.nn.functional import cross_entropy

import engine


def count_calls(step, steps=20):
    for _ in range(3):
        step()
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(steps):
        step()
    profile.disable()
    return pstats.Stats(profile).total_calls / steps


def build_net():
    layers = [torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)]
    return torch.nn.Sequential(*layers)


def test_step_makes_at_most_three_quarters_of_the_calls_of_a_plain_loop():
    x, y = torch.randn(8, 16), torch.randint(4, (8,))
    model = build_net()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def plain():
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
    trainer, *_ = engine.initialize(config=config, model=build_net())

    def ours():
        trainer.backward(cross_entropy(trainer(x), y))
        trainer.step()

    assert count_calls(ours) <= 0.75 * count_calls(plain)


def test_step_clears_the_gradients_and_the_next_backward_pass_frees_them():
    model = build_net()
    config = {"train_batch_size": 8, "optimizer": {"type": "AdamW"}}
    trainer, *_ = engine.initialize(config=config, model=model)
    x = torch.randn(8, 16)
    trainer.backward(trainer(x).sum())
    old_gradients = [weakref.ref(parameter.grad) for parameter in model.parameters()]
    trainer.step()
    assert all(parameter.grad is None for parameter in model.parameters())
    loss = trainer(x).sum()
    assert all(gradient() is not None for gradient in old_gradients), "freed too early"
    trainer.scale(loss)
    assert all(gradient() is None for gradient in old_gradients)
