"""DeepSpeed: the ways to run a backward pass, steps with NaN, and loops that raise."""

from types import SimpleNamespace

import pytest
import torch

import engine
from engine.backends.deepspeed_import import import_deepspeed
from engine.backends.deepspeed_optimizer import update_muon_momentum
from engine.errors import MisuseError
from tests.testing import replicas
from tests.testing.distributed import run_distributed_test
from tests.testing.small_model import (
    all_equal,
    build_config,
    build_model,
    copy_parameters,
    start,
    train_step,
)

WARMUP = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1}}
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


def test_deepspeed_with_each_way_to_run_backward_takes_the_same_steps():
    run_distributed_test(train_by_each_way, 2)


def train_with_nan(backend, steps, poisoned):
    """Train steps of two micro-batches; NaN is in the last rank's first one of a step."""
    trainer = replicas.start(
        replicas.build_layers(),
        gradient_accumulation_steps=2,
        optimizer={"type": "AdamW", "params": {"lr": 0.01}},
        scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 3}},
        engine={"backend": backend},
    )
    rank, world_size = trainer.global_rank, trainer.world_size
    for step in steps:
        for index in range(2):
            loss = replicas.compute_loss(trainer, rank, 2 * step + index)
            is_poisoned = step in poisoned and index == 0 and rank == world_size - 1
            trainer.backward(loss * float("nan") if is_poisoned else loss)
            applied = trainer.step()
        assert applied == (step not in poisoned)
        assert trainer.was_step_applied() == applied
    return trainer


def skip_nan():
    expected = train_with_nan("torch", [0, 3], [])
    trainer = train_with_nan("deepspeed", range(4), [1, 2])
    for one, two in zip(trainer.module.parameters(), expected.module.parameters(), strict=True):
        assert torch.isfinite(one).all()
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)
    samples = 4 * 2 * 3 * trainer.world_size
    for counted in (trainer, trainer._backend.engine):
        assert (counted.global_steps, counted.skipped_steps) == (4, 2)
        assert counted.global_samples == samples
    assert trainer.lr_scheduler.last_epoch == 2
    replicas.assert_equal_on_all_ranks(trainer.module.parameters())


@pytest.mark.parametrize("world_size", [1, 2])
def test_deepspeed_in_fp32_without_zero_skips_steps_with_nan(world_size):
    run_distributed_test(skip_nan, world_size)


def misuse_each_stage():
    for stage in (0, 1):
        config = build_config(
            zero_optimization={"stage": stage}, engine={"backend": "deepspeed"}, scheduler=WARMUP
        )
        model = build_model()
        trainer, _, _, scheduler = engine.initialize(model=model, config=config)
        train_step(trainer)
        with pytest.raises(MisuseError, match="no backward pass"):
            trainer.step()
        scheduler.step()
        trainer.basic_optimizer.step()
        with pytest.raises(MisuseError, match=r"`optimizer\.step\(\)` and `scheduler\.step\(\)`"):
            train_step(trainer)
    first, second = (engine.initialize(model=model, config=config)[0] for _ in range(2))
    with pytest.raises(MisuseError, match="Two engines take turns"):
        for _ in range(2):
            train_step(first)
            train_step(second)


def test_deepspeed_step_after_misuse_raises():
    run_distributed_test(misuse_each_stage, 1)


def initialize_inside_zero_init():
    deepspeed = import_deepspeed()
    deepspeed.init_distributed("gloo", verbose=False)
    config = build_config(
        bf16={"enabled": True},
        zero_optimization={"stage": 3},
        engine={"backend": "deepspeed"},
    )
    dtypes = []

    def build_optimizer(parameters):
        dtypes.append(torch.ones(1).dtype)
        return torch.optim.Adam(parameters, lr=0.1)

    with deepspeed.zero.Init(config_dict_or_path=config | {"engine": None}):
        model = build_model()
        trainer, *_ = engine.initialize(config=config, model=model, optimizer=build_optimizer)
        dtypes.append(torch.ones(1).dtype)
        assert hasattr(torch.nn.Linear(2, 2).weight, "ds_id")
    assert dtypes == [torch.float32, torch.bfloat16]
    train_step(trainer)
    assert trainer.global_steps == 1


def test_initialize_inside_zero_init_suspends_the_context():
    run_distributed_test(initialize_inside_zero_init, 2)


def test_momentum_schedule_reaches_muon_at_stage_3():
    muon, other = {"use_muon": True, "momentum": 0.5}, {"use_muon": False, "betas": (0.9, 0.95)}
    optimizer = SimpleNamespace(
        muon_beta=0.9, param_groups=[muon, other, dict(muon)], offload_optimizer=False
    )
    update_muon_momentum(optimizer)
    assert optimizer.muon_beta == 0.5
    muon["momentum"] = 0.6
    with pytest.raises(ValueError, match=r"the same momentum, got 0\.5 and 0\.6"):
        update_muon_momentum(optimizer)
    update_muon_momentum(SimpleNamespace(param_groups=[other]))  # as of Adam
