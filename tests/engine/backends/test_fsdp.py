"""FSDP2: param groups, optimizers and activation checkpointing with sharded parameters."""

import pytest
import torch

import engine
from tests.testing.distributed import run_distributed_test
from tests.testing.small_model import (
    all_equal,
    build_config,
    build_model,
    copy_parameters,
    start,
    train_step,
)

LRS = [0.01, 0.2]
ONE_CYCLE = {
    "type": "OneCycle",
    "params": {
        "cycle_min_lr": LRS,
        "cycle_max_lr": [0.1, 0.5],
        "cycle_first_step_size": 4,
        "cycle_momentum": False,
    },
}


def build_groups(model):
    weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    return [
        {"params": weights, "lr": LRS[0]},
        {"params": biases, "lr": LRS[1], "weight_decay": 0.0, "betas": (0.8, 0.9)},
    ]


def train_with_param_groups():
    model = build_model()
    trainer, optimizer, *_ = engine.initialize(
        model=model, config=build_config(scheduler=ONE_CYCLE), model_parameters=build_groups(model)
    )
    assert trainer.get_lr() == LRS
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert train_step(trainer)
    assert trainer.get_lr() == [0.0325, 0.275]
    assert [group["betas"][1] for group in optimizer.param_groups] == [0.999, 0.9]


def test_fsdp_with_param_groups_keeps_their_values():
    run_distributed_test(train_with_param_groups, 2)


def train_with_custom_optimizer():
    model = build_model()
    custom = torch.optim.SGD(build_groups(model)[:1], lr=0.5, momentum=0.9)
    config = build_config()
    del config["optimizer"]
    trainer, optimizer, *_ = engine.initialize(model=model, config=config, optimizer=custom)
    assert optimizer is custom
    before = copy_parameters(trainer)
    assert train_step(trainer)
    assert not all_equal(before, copy_parameters(trainer))


def test_fsdp_with_a_custom_optimizer_trains():
    run_distributed_test(train_with_custom_optimizer, 2)


def train_with_and_without_checkpointing():
    results = []
    for section in ({}, {"activation_checkpointing": {"cpu_checkpointing": True}}):
        trainer = start(**section, engine={"backend": "torch", "wrap": ["Linear"]})
        train_step(trainer)
        results.append(copy_parameters(trainer))
    assert all_equal(*results)


def test_fsdp_with_activation_checkpointing_takes_the_same_step():
    run_distributed_test(train_with_and_without_checkpointing, 2)


def initialize_with_foreign_parameter():
    foreign = [torch.nn.Parameter(torch.ones(3))]
    with pytest.raises(ValueError, match=r"`model_parameters` .* shape \(3,\)"):
        engine.initialize(model=build_model(), config=build_config(), model_parameters=foreign)


def test_fsdp_with_a_parameter_of_a_different_model_raises():
    run_distributed_test(initialize_with_foreign_parameter, 2)


def initialize_with_unknown_class_to_wrap():
    with pytest.raises(
        ValueError, match=r"`engine\.wrap` must name classes of the model's modules"
    ):
        start(engine={"backend": "torch", "wrap": ["Nonsense"]})


def test_fsdp_with_an_unknown_class_to_wrap_raises():
    run_distributed_test(initialize_with_unknown_class_to_wrap, 2)


def discard_gradients_of_a_micro_batch(stage):
    trainer = start(zero_optimization={"stage": stage}, gradient_accumulation_steps=2)
    expected = start(zero_optimization={"stage": stage}, gradient_accumulation_steps=2)
    inputs = torch.ones(1, 6)
    trainer.backward(trainer(inputs).sum())
    trainer.zero_grad()
    trainer.micro_steps = 0
    for each in (trainer, expected):
        for _ in range(2):
            each.backward(each(inputs).pow(2).sum())
            each.step()
        assert each.was_step_applied()
    assert all_equal(copy_parameters(trainer), copy_parameters(expected))


@pytest.mark.parametrize("stage", [1, 2])
def test_fsdp_zero_grad_discards_unreduced_gradients(stage):
    run_distributed_test(discard_gradients_of_a_micro_batch, 2, stage)


def evaluate_before_a_step():
    trainers = [start(zero_optimization={"stage": 1}) for _ in range(2)]
    for index, trainer in enumerate(trainers):
        for _ in range(2):
            trainer.backward(trainer(torch.ones(2, 6)).pow(2).mean())
            if index == 0:
                with torch.no_grad():
                    trainer(torch.ones(1, 6))
            trainer.step()
    assert all_equal(*map(copy_parameters, trainers))


def test_fsdp_forward_pass_before_a_step_does_not_keep_the_old_weights():
    run_distributed_test(evaluate_before_a_step, 2)


def average_16_bit_gradients():
    found = []
    for stage in (0, 3):
        model = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
        torch.nn.init.zeros_(model.weight)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
            "gradient_clipping": 0,
            "zero_optimization": {"stage": stage},
            "engine": {"backend": "torch", "master_weights": False},
        }
        trainer, *_ = engine.initialize(config=config, model=model)
        # In bf16, 1 + 0.0034 is 1, so that a sum that starts at 1 would lose the other gradients.
        value = 1.0 if trainer.global_rank == 1 else 1.75 * 2**-9
        trainer.backward(trainer(torch.full((1, 1), value, dtype=torch.bfloat16)).sum())
        trainer.step()
        found.append(trainer.module_state_dict()["weight"].item())
    mean = torch.tensor((1 + 3.5 * 2**-9) / 3).to(torch.bfloat16).item()
    assert found == [-mean, -mean]


def test_gradients_of_16_bit_weights_are_averaged_in_float32_with_and_without_fsdp():
    run_distributed_test(average_16_bit_gradients, 3)


class Branches(torch.nn.Module):
    """A model of which each rank can use other layers."""

    def __init__(self, count):
        super().__init__()
        torch.manual_seed(0)
        self.branches = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(count))

    def forward(self, x, order):
        for index in order:
            x = self.branches[index](x)
        return x


def train_branches(stage, orders):
    """Train a step in which each rank calls its own sequence of layers, once per micro-batch."""
    config = build_config(zero_optimization={"stage": stage})
    config |= {"train_batch_size": 4 * len(orders), "gradient_accumulation_steps": len(orders)}
    config["engine"] |= {"wrap": ["Linear"]}
    trainer, *_ = engine.initialize(model=Branches(2), config=config)
    for of_ranks in orders:
        trainer.backward(trainer(torch.ones(2, 4), of_ranks[trainer.global_rank]).pow(2).mean())
        trainer.step()


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(
    ("orders", "message"),
    [
        ([([0], [1])], "`branches.0.weight` has a gradient on rank 0, but not on rank 1"),
        (
            [([0], [1]), ([1], [0])],
            "backward pass 1 is through `branches.0` on rank 0, and through `branches.1` on rank 1",
        ),
    ],
)
def test_ranks_that_use_different_layers_get_an_error_instead_of_mixed_parameters(
    stage, orders, message
):
    with pytest.raises(engine.MisuseError, match=f"used different layers in this step: {message}"):
        run_distributed_test(train_branches, 2, stage, orders)


def test_ranks_that_use_the_same_layers_in_another_order_than_before_train():
    run_distributed_test(train_branches, 2, 3, [([0, 1], [0, 1]), ([1, 0], [1, 0]), ([1], [1])])


def look_at_outputs_on_rank_0(stage):
    trainer = start(zero_optimization={"stage": stage})
    for _ in range(2):
        loss = trainer(torch.ones(2, 6)).pow(2).mean()
        if trainer.global_rank == 0:
            trainer.module(torch.ones(1, 6))  # the parameters are still gathered
        trainer.backward(loss)
        assert trainer.step()


@pytest.mark.parametrize("stage", [1, 2])
def test_forward_pass_on_one_rank_without_backward_pass_is_accepted(stage):
    run_distributed_test(look_at_outputs_on_rank_0, 2, stage)
