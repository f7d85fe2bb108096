"""PyTorch backends: layers used in turn, large gradients, and gradients that no step uses."""

import pytest
import torch
from torch import nn

from tests.testing.distributed import run_distributed_test
from tests.testing.replicas import build_layers, check_step, compute_loss, copy_weights, start
from tests.testing.small_model import all_equal, copy_parameters


class Branches(nn.Module):
    """Two layers, of which each forward pass uses one in turn."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 1), nn.Linear(4, 1)
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        return (self.first if self.passes % 2 else self.second)(x)


def train_branches():
    trainer = start(Branches())
    before = copy_parameters(trainer)
    for step in range(4):
        trainer.backward(compute_loss(trainer, trainer.global_rank, step))
        assert trainer.step()
    after = copy_parameters(trainer)
    assert not any(map(torch.equal, before, after))
    return after


def test_replicas_with_layers_used_in_turn_train_all_layers():
    first, second = run_distributed_test(train_branches, 2)
    assert all_equal(first, second)


def train_with_large_gradients(stage, clipping):
    torch.manual_seed(0)
    trainer = start(
        nn.Linear(4, 4, bias=False),
        gradient_clipping=clipping,
        optimizer={"type": "SGD", "params": {"lr": 1.0 if clipping else 1e-31}},
        zero_optimization={"stage": stage},
    )
    (before,) = copy_parameters(trainer)
    # Each of the 16 gradients is 3e30, so their squares overflow float32.
    trainer.backward(trainer(torch.ones(3, 4)).sum() * 1e30)
    assert trainer.step()
    assert trainer.get_global_grad_norm() == pytest.approx(1.2e31)
    (after,) = copy_parameters(trainer)
    change = 0.25 if clipping else 0.3
    torch.testing.assert_close(after, before - change, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clipping", [0.0, 1.0])
def test_step_with_a_norm_that_overflows_float32_is_applied(clipping):
    train_with_large_gradients(0, clipping)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_step_on_two_ranks_with_a_norm_that_overflows_float32_is_clipped(stage):
    run_distributed_test(train_with_large_gradients, 2, stage, 1.0)


def train_the_last_layer(stage):
    model = build_layers()
    trainer = start(model, [*model[4].parameters()], zero_optimization={"stage": stage})
    for step in range(3):
        trainer.backward(compute_loss(trainer, trainer.global_rank, step))
        trainer.step()
        for parameter in model.parameters():
            assert parameter.grad is None or not parameter.grad.any()


@pytest.mark.parametrize(("world_size", "stage"), [(1, 0), (2, 0), (2, 1), (2, 3)])
def test_gradients_of_parameters_outside_the_optimizer_are_cleared(world_size, stage):
    run_distributed_test(train_the_last_layer, world_size, stage)


def test_first_step_of_parameters_added_later_uses_the_gradients_of_this_step_only():
    model = build_layers()
    trainer = start(model, [*model[4].parameters()])
    for step in range(2):
        trainer.backward(compute_loss(trainer, 0, step))
        trainer.step()
    trainer.optimizer.add_param_group({"params": list(model[:4].parameters())})
    before = copy_weights(model)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(compute_loss(model, 0, 2), parameters)
    trainer.backward(compute_loss(trainer, 0, 2))
    trainer.step()
    check_step(model, before, dict(zip(names, gradients, strict=True)))


def train_classifier(precision, stage):
    """Train on a loss that starts near 2, and return the losses."""
    torch.manual_seed(0)
    x, y = torch.randn(24, 4), torch.arange(24) % 8
    section = {} if precision == "fp32" else {precision: {"enabled": True}}
    trainer = start(
        nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 8)),
        train_micro_batch_size_per_gpu=24,
        optimizer={"type": "AdamW", "params": {"lr": 0.02}},
        zero_optimization={"stage": stage},
        **section,
    )
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(trainer(x), y)
        trainer.backward(loss)
        assert trainer.step()
        losses.append(float(loss))
    assert trainer.skipped_steps == 0
    return losses


def compare_precisions(stage):
    expected = train_classifier("fp32", stage)
    assert expected[0] > 2
    for precision, tolerance in (("bf16", 0.02), ("fp16", 0.005)):
        assert train_classifier(precision, stage) == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize(("world_size", "stage"), [(1, 0), (2, 0), (2, 3)])
def test_half_precision_with_default_scale_skips_no_step_and_follows_float32(world_size, stage):
    run_distributed_test(compare_precisions, world_size, stage)
