"""Test engines without an optimizer: reference models that only run forward passes."""

import pytest
import torch
from torch import nn

import engine
from engine import MisuseError
from tests.testing.distributed import run_distributed_test

TORCH = {"train_batch_size": 4, "engine": {"backend": "torch"}}


def test_initialize_without_optimizer_runs_the_model():
    model = nn.Linear(2, 1)
    trainer, optimizer, *_ = engine.initialize(config=TORCH, model=model)
    assert optimizer is None
    assert trainer.optimizer is None
    trainer.eval()
    x = torch.ones(4, 2)
    assert torch.equal(trainer(x), model(x))


def test_initialize_without_optimizer_keeps_16_bit_weights():
    model = nn.Linear(2, 1).bfloat16()
    trainer, *_ = engine.initialize(config=TORCH | {"bf16": {"enabled": True}}, model=model)
    assert model.weight.dtype == torch.bfloat16
    assert trainer(torch.ones(4, 2)).dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["torch", "deepspeed"])
@pytest.mark.parametrize("stage", [0, 3])
def test_engine_without_optimizer_raises_for_training(backend, stage):
    run_distributed_test(evaluate_without_optimizer, 2, backend, stage)


def evaluate_without_optimizer(backend, stage):
    config = {
        "train_batch_size": 4,
        "zero_optimization": {"stage": stage},
        "engine": {"backend": backend},
    }
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    x = torch.ones(2, 2)
    expected = model(x).detach()
    trainer, *_ = engine.initialize(config=config, model=model)
    assert torch.equal(trainer(x), expected)
    assert trainer.evaluate([x], lambda batch: trainer(batch).mean()) == expected.mean()
    for call in (lambda: trainer.backward(trainer(x).mean()), trainer.step):
        with pytest.raises(MisuseError, match="built without an optimizer"):
            call()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"scheduler": {"type": "WarmupLR"}}, "but config has a schedule"),
        (
            {"zero_optimization": {"stage": 1}, "engine": {"backend": "deepspeed"}},
            "but DeepSpeed's ZeRO stage 1 requires one",
        ),
    ],
)
def test_initialize_without_a_required_optimizer_raises(config, message):
    with pytest.raises(ValueError, match=message):
        engine.initialize(config={"train_batch_size": 4, **config}, model=nn.Linear(2, 1))


def test_engine_without_optimizer_loads_the_weights_of_a_checkpoint(tmp_path):
    optimizer = {"optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR"}}
    trainer, *_ = engine.initialize(config=TORCH | optimizer, model=nn.Linear(2, 1))
    trainer.save_checkpoint(tmp_path, client_state={"epoch": 3})
    reference, *_ = engine.initialize(config=TORCH, model=nn.Linear(2, 1))
    assert reference.load_checkpoint(tmp_path)[1] == {"epoch": 3}
    x = torch.ones(4, 2)
    assert torch.equal(reference(x), trainer(x))
