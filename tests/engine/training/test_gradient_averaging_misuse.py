"""Model replicas that the ranks use differently raise, and never hang."""

import contextlib
from unittest import mock

import pytest
import torch
from torch import nn

from engine.distributed.ranks import get_rank
from engine.errors import MisuseError
from engine.training import gradient_averaging
from tests.testing.distributed import run_distributed_test
from tests.testing.replicas import (
    build_layers,
    check_step,
    compute_loss,
    compute_mean_gradients,
    copy_weights,
    draw,
    start,
)


def change_gradients_in_place(ranks, factor):
    trainer = start(nn.Linear(4, 2))
    before = copy_weights(trainer.module)
    expected = compute_mean_gradients(trainer.module)
    trainer.backward(compute_loss(trainer, trainer.global_rank))
    if trainer.global_rank in ranks:
        for parameter in trainer.module.parameters():
            parameter.grad.mul_(factor)
    is_misuse = len(ranks) == 1
    expects = pytest.raises(MisuseError) if is_misuse else contextlib.nullcontext()
    with expects:
        trainer.step()
    changed = {name: 0 * value if is_misuse else factor * value for name, value in expected.items()}
    check_step(trainer.module, before, changed)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("factor", [0.0, 3.0, float("nan"), float("inf")])
def test_gradients_changed_in_place_on_one_rank_raise(rank, factor):
    run_distributed_test(change_gradients_in_place, 2, [rank], factor)


def test_gradients_changed_in_place_on_all_ranks_are_used():
    run_distributed_test(change_gradients_in_place, 2, [0, 1], 3.0)


def run_an_extra_backward_on_rank_1():
    trainer = start(build_layers())
    with pytest.raises(MisuseError):
        for step in range(4):
            trainer.backward(compute_loss(trainer, trainer.global_rank, step))
            if trainer.global_rank == 1:
                trainer.backward(compute_loss(trainer, trainer.global_rank, step))
            trainer.step()


def test_extra_backward_on_one_rank_raises():
    run_distributed_test(run_an_extra_backward_on_rank_1, 2, timeout=30)


def start_with_different_models(build):
    with pytest.raises(ValueError, match="`model`"):
        start(build(get_rank()))


def build_of_another_shape(rank):
    return nn.Linear(3 + rank, 1)


def build_with_more_layers(rank):
    return nn.Sequential(*(nn.Linear(2, 2) for _ in range(2 + rank)))


def build_of_another_dtype(rank):
    return nn.Linear(2, 1, dtype=[torch.float32, torch.float64][rank])


@pytest.mark.parametrize(
    "build", [build_of_another_shape, build_with_more_layers, build_of_another_dtype]
)
def test_different_models_on_the_ranks_raise(build):
    run_distributed_test(start_with_different_models, 2, build)


class Failing(torch.autograd.Function):
    """An identity whose backward pass raises."""

    @staticmethod
    def forward(ctx, x):
        del ctx
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        del ctx, gradient
        raise ArithmeticError


def train_after_a_failed_backward():
    sizes = {"_FIRST_BUCKET_BYTES": 1, "_BUCKET_BYTES": 1}
    with mock.patch.multiple(gradient_averaging, **sizes):
        model = build_layers()
        trainer = start(model)
        for step in range(3):
            out = Failing.apply(model[:2](draw(trainer.global_rank, step)))
            with pytest.raises(ArithmeticError):
                trainer.backward(model[2:](out).pow(2).mean())
            trainer.zero_grad()
            before = copy_weights(model)
            expected = compute_mean_gradients(model, step)
            trainer.backward(compute_loss(trainer, trainer.global_rank, step))
            trainer.step()
            check_step(model, before, expected)


def test_step_after_a_backward_that_failed_on_all_ranks_averages_its_own_gradients():
    run_distributed_test(train_after_a_failed_backward, 2)
