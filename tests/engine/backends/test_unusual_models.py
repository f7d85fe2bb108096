"""Test models and parameters that scripts pass besides plain ones, on every backend and stage."""

import itertools
import logging

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import engine
from tests.testing.distributed import run_distributed_test

BACKENDS = list(itertools.product(["torch", "deepspeed"], [0, 1, 2, 3]))
ADAM = {"type": "AdamW", "params": {"lr": 0.1}}


def build_config(backend, stage, **more):
    return {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": ADAM,
        "zero_optimization": {"stage": stage},
        "engine": {"backend": backend},
        **more,
    }


def build_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))


def train(model, config, steps=2, **arguments):
    trainer, *_ = engine.initialize(config=config, model=model, **arguments)
    torch.manual_seed(dist.get_rank())
    for _ in range(steps):
        trainer.backward(trainer(torch.randn(2, 4)).pow(2).mean())
        assert trainer.step()
    return trainer


def gather_weights(trainer):
    return {name: value.clone() for name, value in trainer.module_state_dict().items()}


def assert_equal(first, second):
    for name in first.keys() | second.keys():
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)


def check_combinations(directory):
    dist.init_process_group("gloo")
    logging.disable(logging.INFO)
    for backend, stage in BACKENDS:
        config = build_config(backend, stage)
        expected = gather_weights(train(build_model(), config)) if stage < 3 else None
        named = build_model()
        trainer = train(named, config, model_parameters=named.named_parameters())
        if expected is not None:
            assert_equal(gather_weights(trainer), expected)

        compiled = torch.compile(build_model(), backend="eager")
        trainer = train(compiled, config)
        if expected is not None:
            assert_equal(gather_weights(trainer), expected)
        path = f"{directory}/{backend}{stage}"
        trainer.save_checkpoint(path)
        plain = train(build_model(), config, steps=0)
        plain.load_checkpoint(path)
        x = torch.ones(2, 4)
        assert torch.equal(plain(x), compiled(x))

        again = build_model()
        train(again, config).destroy()
        trainer = train(again, config)
        assert trainer.global_steps == 2


@pytest.mark.slow
def test_named_compiled_and_reused_models_train_on_every_backend(tmp_path):
    run_distributed_test(check_combinations, 2, str(tmp_path), timeout=120)


def refuse_outside():
    dist.init_process_group("gloo")
    logging.disable(logging.INFO)
    for backend, stage in BACKENDS:
        model, weight = build_model(), nn.Parameter(torch.zeros(2))
        given = [*model.parameters(), weight]
        config = build_config(backend, stage)
        if (backend, stage) == ("torch", 0):
            trainer, *_ = engine.initialize(config=config, model=model, model_parameters=given)
            loss = trainer(torch.ones(2, 4)).sum() + (weight * (1 + dist.get_rank())).sum()
            trainer.backward(loss)
            torch.testing.assert_close(weight.grad, torch.full((2,), 1.5))
            continue
        with pytest.raises(ValueError, match=r"Register its module in the model"):
            engine.initialize(config=config, model=model, model_parameters=given)
        model = build_model()
        optimizer = torch.optim.AdamW([*model.parameters(), weight])
        with pytest.raises(ValueError, match=r"Register its module in the model"):
            engine.initialize(config=config, model=model, optimizer=optimizer)


def test_parameters_outside_the_model_are_trained_or_refused():
    run_distributed_test(refuse_outside, 2)


class Words(nn.Module):
    """A bag of words with sparse gradients."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(10, 4, sparse=True)
        self.head = nn.Linear(4, 1)

    def forward(self, words):
        return self.head(self.table(words).mean(1))


def train_sparse():
    dist.init_process_group("gloo")
    logging.disable(logging.INFO)
    results = []
    for backend in ("torch", "deepspeed"):
        model = Words()
        config = build_config(
            backend, 0, optimizer={"type": "SGD", "params": {"lr": 0.1}}, gradient_clipping=0
        )
        trainer, *_ = engine.initialize(config=config, model=model)
        torch.manual_seed(dist.get_rank())
        for _ in range(3):
            trainer.backward(trainer(torch.randint(0, 10, (2, 3))).pow(2).mean())
            assert trainer.step()
        results.append(gather_weights(trainer))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name])
    with pytest.raises(ValueError, match=r"sparse gradient of `table.weight`. Create the"):
        engine.initialize(config=build_config("torch", 2), model=Words())


def test_sparse_embeddings_train_equally_or_are_refused():
    run_distributed_test(train_sparse, 2)


def reshard_differently():
    dist.init_process_group("gloo")
    model = build_model()
    train(model, build_config("torch", 2))
    train(model, build_config("torch", 1))  # stages 1 and 2 shard a model in the same way
    with pytest.raises(ValueError, match="already sharded by FSDP2"):
        engine.initialize(config=build_config("torch", 3), model=model)
    own = fully_shard(build_model(), mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(ValueError, match="must not be sharded by `fully_shard`"):
        engine.initialize(config=build_config("torch", 3), model=own)


def test_sharded_model_with_another_stage_raises():
    run_distributed_test(reshard_differently, 2)
