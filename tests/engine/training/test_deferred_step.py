"""Deferred steps give the same run as steps that wait for the device."""

import csv
import gc
import logging
import math
import pickle
import weakref

import pytest
import torch
from torch.nn.functional import cross_entropy

import engine
import schedules
from tests.testing.distributed import run_distributed_test

CYCLE = {
    "type": "OneCycle",
    "params": {"cycle_min_lr": 1e-3, "cycle_max_lr": 1e-2, "cycle_first_step_size": 5},
}
PRECISIONS = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 10, "loss_scale_window": 2}},
    "static": {"fp16": {"enabled": True, "loss_scale": 128}},
}
POISONED = (0, 3, 4)


def start(*, deferred=True, **sections):
    config = {
        "train_batch_size": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "scheduler": CYCLE,
        "gradient_clipping": 0.5,
        **sections,
    }
    config["engine"] = {"backend": "torch", "deferred_step": deferred, **config.get("engine", {})}
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(2))
    model = torch.nn.Sequential(*layers, torch.nn.ReLU(), torch.nn.Linear(16, 4))
    return engine.initialize(config=config, model=model)[0]


def make_batch(trainer, step):
    generator = torch.Generator().manual_seed(100 * step + trainer.global_rank)
    size = trainer.train_micro_batch_size_per_gpu()
    x = 5 * torch.randn(size, 16, generator=generator)
    y = torch.randint(0, 4, (size,), generator=generator)
    return (x * math.nan if step in POISONED else x), y


def train_step(trainer, step):
    x, y = make_batch(trainer, step)
    for _ in range(trainer.gradient_accumulation_steps()):
        trainer.backward(cross_entropy(trainer(x).float(), y))
        result = trainer.step()
    return result


def copy_weights(trainer):
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in trainer.module.named_parameters()
    }


def train(steps=12, *, asks=(), **settings):
    """Train, and return the values of each step, read at its end if ``asks`` contains it.

    The last value is the state after the last step, with the weights.
    """
    trainer = start(**settings)
    results = []
    for step in range(steps):
        result = train_step(trainer, step)
        if step in asks:
            assert isinstance(result, bool) != settings.get("deferred", True)
            results.append((bool(result), *read_state(trainer)))
    state = read_state(trainer)
    weights = copy_weights(trainer)
    trainer.destroy()
    return results, state, weights


def read_state(trainer):
    return (
        trainer.get_lr(),
        trainer.get_momentum(),
        trainer.global_steps,
        trainer.skipped_steps,
        trainer.was_step_applied(),
        trainer.cur_scale,
        trainer.lr_scheduler.last_epoch,
        Norm(trainer.get_global_grad_norm()),
    )


class Norm(float):
    """A gradient norm that equals other norms up to rounding."""

    def __eq__(self, other):
        return float(self) == pytest.approx(float(other), rel=1e-5, nan_ok=True)

    __hash__ = None


def check_equal(**settings):
    steps = range(12)
    expected, expected_state, expected_weights = train(deferred=False, asks=steps, **settings)
    for asks in (steps, ()):
        results, state, weights = train(deferred=True, asks=asks, **settings)
        assert results == expected[: len(results)]
        assert state == expected_state
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected_weights[name], rtol=2e-6, atol=2e-7)
    assert [applied for applied, *_ in expected[:5]] == [False, True, True, False, False]


@pytest.mark.parametrize("clipping", [0.0, 0.5])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_deferred_run_equals_a_run_that_waits(precision, clipping):
    check_equal(gradient_clipping=clipping, **PRECISIONS[precision])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
def test_deferred_sgd_starts_its_momentum_after_a_skipped_first_step(momentum, nesterov):
    params = {"lr": 0.1, "momentum": momentum, "nesterov": nesterov and momentum > 0}
    schedule = {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}
    check_equal(optimizer={"type": "SGD", "params": params}, scheduler=schedule)


def test_fused_sgd_that_skips_its_first_step_has_uninitialized_momentum():
    # If PyTorch initializes these buffers one day, `_start_momenta` may only start late ones.
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, fused=True)
    optimizer.found_inf = torch.tensor(1.0)
    weight.grad = torch.ones(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty_like", lambda each: torch.full_like(each, 7.0))
        optimizer.step()
    assert optimizer.state[weight]["momentum_buffer"].tolist() == [7.0] * 3


def test_deferred_steps_with_gradient_accumulation_equal_steps_that_wait():
    check_equal(train_micro_batch_size_per_gpu=4, **PRECISIONS["fp16"])


def check_equal_on_rank(settings):
    logging.disable()
    check_equal(**settings)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_deferred_run_on_two_ranks_equals_a_run_that_waits(stage, precision):
    settings = {"zero_optimization": {"stage": stage}, **PRECISIONS[precision]}
    run_distributed_test(check_equal_on_rank, 2, settings)
