"""Test settings of DeepSpeed: 16-bit weights, "auto", accumulation by the script, base64."""

import base64
import itertools
import json
import logging

import pytest
import torch
import torch.distributed as dist
from torch import nn

import engine
from engine.backends.deepspeed_config import build_deepspeed_config
from engine.config import load_config
from engine.config.master_weights import find_cpu_adam_key
from engine.config.validate import validate
from tests.testing.distributed import run_distributed_test

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
MASTER = {"enabled": True, "bf16_master_weights_and_grads": True}
STATES = MASTER | {"bf16_optimizer_states": True}


def find_errors(config):
    return [each for each in validate(CONFIG | config) if each.severity == "error"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bf16": MASTER}, "requires the optimizer to be offloaded"),
        ({"bf16": STATES}, None),
        ({"bf16": MASTER, "zero_optimization": {"stage": 1} | OFFLOAD}, None),
        ({"bf16": STATES, "zero_optimization": {"stage": 3} | OFFLOAD}, None),
        ({"bf16": MASTER, "zero_optimization": {"stage": 1, "cpu_offload": True}}, None),
        (
            {
                "bf16": MASTER,
                "zero_optimization": {"stage": 1} | OFFLOAD,
                "optimizer": {"type": "Adagrad"},
            },
            "requires DeepSpeed's CPU Adam, but the optimizer is Adagrad",
        ),
        (
            {
                "bf16": MASTER,
                "zero_optimization": {"stage": 1} | OFFLOAD,
                "optimizer": {"type": "Adam", "params": {"torch_adam": True}},
            },
            "requires DeepSpeed's CPU Adam, but the optimizer is torch's Adam",
        ),
        (
            {"bf16": {"enabled": True, "bf16_optimizer_states": True}},
            "requires `bf16_master_weights_and_grads`",
        ),
        (
            {"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}},
            "requires the optimizer to be offloaded",
        ),
    ],
)
def test_validate_master_weights_require_cpu_adam(config, message):
    errors = find_errors({"zero_optimization": {"stage": 2}} | config)
    assert [message in error.message for error in errors] == ([True] if message else [])


@pytest.mark.parametrize(
    ("bf16", "zero"),
    [(MASTER, {"stage": 1} | OFFLOAD), (STATES, {"stage": 3, "cpu_offload": True})],
)
def test_master_weights_with_offloading_select_deepspeeds_adam(bf16, zero):
    config = CONFIG | {"bf16": bf16, "zero_optimization": zero}
    assert find_cpu_adam_key(config) == "bf16.bf16_master_weights_and_grads"
    built = build_deepspeed_config(load_config(config), builds_optimizer=True)
    assert built["optimizer"]["type"] == "AdamW"


@pytest.mark.parametrize(
    ("autocast", "more", "is_valid"),
    [
        ({"dtype": "bfloat16"}, {"bf16": {"enabled": True}}, True),
        ({"dtype": "bfloat16"}, {"bf16": STATES, "zero_optimization": {"stage": 2}}, True),
        ({"dtype": "float16"}, {"bf16": {"enabled": True}}, False),
        ({"dtype": "float16"}, {"fp16": {"enabled": True}}, False),
        (
            {"dtype": "float16"},
            {"fp16": {"enabled": True}, "zero_optimization": {"stage": 1}},
            True,
        ),
    ],
)
def test_validate_autocast_in_the_dtype_of_the_weights_is_valid(autocast, more, is_valid):
    config = {"torch_autocast": {"enabled": True} | autocast} | more
    assert (find_errors(config) == []) == is_valid


def test_auto_in_zero_optimization_means_the_default():
    zero = {"stage": 3, "reduce_bucket_size": "auto", "allgather_bucket_size": "auto"}
    config = CONFIG | {"zero_optimization": zero}
    (problem,) = [each for each in validate(config) if each.severity != "note"]
    assert (problem.severity, problem.pointer) == (
        "warning",
        "/zero_optimization/allgather_bucket_size",
    )
    built = build_deepspeed_config(load_config(config), builds_optimizer=False)
    assert built["zero_optimization"]["reduce_bucket_size"] == 500_000_000
    assert built["zero_optimization"]["allgather_bucket_size"] == 500_000_000
    with pytest.raises(engine.ConfigError, match="stage"):
        load_config(CONFIG | {"zero_optimization": {"stage": "auto"}})


def test_config_in_base64_is_read():
    text = base64.urlsafe_b64encode(json.dumps(CONFIG | {"x-é?>": "~~~"}).encode()).decode()
    assert load_config(text).batch.micro == 2
    with pytest.raises(engine.ConfigError, match="Unknown key"):
        load_config(base64.urlsafe_b64encode(b'{"nope": 1}').decode())


def train(config, batches, per_step):
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    trainer, *_ = engine.initialize(config=CONFIG | config, model=model)
    for index, batch in enumerate(batches, 1):
        trainer.backward(trainer(batch).float().pow(2).mean())
        if index % per_step == 0:
            assert trainer.step()
    return trainer, {name: value.clone() for name, value in trainer.module_state_dict().items()}


def train_by_hand(batches):
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    for step in batches.split(3):
        optimizer.zero_grad()
        for batch in step:
            (model(batch).pow(2).mean() / 3).backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= 2
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def coalesce_inside_and_around_no_sync():
    config = CONFIG | {"zero_optimization": {"stage": 1, "overlap_comm": False}}
    trainer = engine.initialize(config=config, model=torch.nn.Linear(4, 1))[0]
    nested = pytest.raises(engine.MisuseError, match=r"`no_sync\(\)` must not be nested")
    with trainer.coalesce_grad_reduction(), nested, trainer.no_sync():
        pass
    nested = pytest.raises(engine.MisuseError, match=r"must not be nested in `no_sync\(\)`")
    with trainer.no_sync(), nested, trainer.coalesce_grad_reduction():
        pass
    with trainer.coalesce_grad_reduction():
        trainer.backward(trainer(torch.ones(2, 4)).mean())
    assert trainer.step()


def test_coalesce_grad_reduction_and_no_sync_exclude_each_other():
    run_distributed_test(coalesce_inside_and_around_no_sync, 1)
    trainer = engine.initialize(config=CONFIG, model=torch.nn.Linear(4, 1))[0]
    message = "exists only with the DeepSpeed backend"
    with pytest.raises(AttributeError, match=message), trainer.coalesce_grad_reduction():
        pass


def compare_unmanaged():
    dist.init_process_group("gloo")
    logging.disable(logging.INFO)
    torch.manual_seed(dist.get_rank())
    batches = torch.randn(6, 2, 4)
    expected = train_by_hand(batches).weight.detach()
    config = {"managed_gradient_accumulation": False, "gradient_accumulation_steps": 3}
    for stage in (0, 1, 2, 3):
        zero = {"zero_optimization": {"stage": stage, "overlap_comm": False}}
        trainer, found = train(config | zero, batches, per_step=3)
        assert (trainer.global_steps, trainer.global_samples) == (2, 24)
        with pytest.raises(engine.MisuseError, match="call then takes an optimizer step"):
            trainer.set_gradient_accumulation_boundary(False)
        if stage < 3:
            torch.testing.assert_close(found["weight"], expected)


def test_unmanaged_accumulation_steps_at_every_call():
    run_distributed_test(compare_unmanaged, 2)


PRECISIONS = [
    {"bf16": {"enabled": True}},
    {"bf16": STATES},
    {
        "bf16": {"enabled": True},
        "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
    },
    {"bf16": STATES, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
]


def train_precisions():
    dist.init_process_group("gloo")
    logging.disable(logging.INFO)
    batches = torch.randn(2, 2, 4)
    for stage, precision, offload in itertools.product((0, 1, 2, 3), PRECISIONS, ({}, OFFLOAD)):
        config = precision | {"zero_optimization": {"stage": stage} | offload}
        if not find_errors(config) and find_cpu_adam_key(config) is None:
            trainer, _ = train(config | {"engine": {"backend": "deepspeed"}}, batches, 1)
            assert trainer.global_steps == 2


@pytest.mark.slow
def test_every_valid_16_bit_config_trains_on_deepspeed():
    run_distributed_test(train_precisions, 2)
