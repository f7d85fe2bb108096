"""Gradients of model replicas are averaged, whatever computes them."""

import copy
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from engine.distributed.ranks import get_rank
from engine.training import gradient_averaging
from tests.testing.distributed import run_distributed_test
from tests.testing.replicas import (
    assert_equal_on_all_ranks,
    build_layers,
    check_step,
    compute_loss,
    compute_mean_gradients,
    copy_weights,
    draw,
    start,
)


class Branches(nn.Module):
    """Two layers; a forward pass may leave out the second one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x, *, uses_second):
        return self.first(x) + self.second(x) if uses_second else self.first(x)


WAYS = {
    "trainer.backward": lambda trainer, loss: trainer.backward(loss),
    "trainer.scale": lambda trainer, loss: trainer.scale(loss).backward(),
    "loss.backward": lambda _, loss: loss.backward(),
}
"""The ways to run a backward pass."""


def train_by(way):
    for micro_batches in (1, 2):
        trainer = start(build_layers(), gradient_accumulation_steps=micro_batches)
        for step in range(2):
            before, expected = copy_weights(trainer.module), {}
            steps = [micro_batches * step + index for index in range(micro_batches)]
            for each in steps:
                mean = compute_mean_gradients(trainer.module, each)
                expected = {
                    name: expected.get(name, 0) + value / micro_batches
                    for name, value in mean.items()
                }
            for each in steps:
                WAYS[way](trainer, compute_loss(trainer, trainer.global_rank, each))
                trainer.step()
            check_step(trainer.module, before, expected)
        assert_equal_on_all_ranks(trainer.module.parameters())


@pytest.mark.parametrize("way", WAYS)
def test_each_way_to_run_backward_averages_the_gradients(way):
    run_distributed_test(train_by, 2, way)


def test_gradients_on_three_ranks_are_averaged():
    run_distributed_test(train_by, 3, "trainer.backward")


def train_with_unused_layer():
    decay = {"type": "AdamW", "params": {"lr": 0.1, "weight_decay": 0.5}}
    trainer = start(Branches(), optimizer=decay)
    first, second = trainer.module.first, trainer.module.second
    before = copy_weights(trainer.module)
    for step in range(2):
        x = draw(trainer.global_rank, step)
        trainer.backward(trainer(x, uses_second=False).pow(2).mean())
        assert second.weight.grad is None
        trainer.step()
    assert torch.equal(second.weight, before["second.weight"])
    assert not torch.equal(first.weight, before["first.weight"])
    assert second.weight not in trainer.optimizer.state


def test_parameter_unused_on_all_ranks_is_neither_averaged_nor_decayed():
    run_distributed_test(train_with_unused_layer, 2)


def train_with_layer_unused_on_rank_1(way):
    def loss_of(model, rank, step):
        return model(draw(rank, step), uses_second=rank == 0).pow(2).mean()

    trainer = start(Branches())
    for step in range(2):
        before = copy_weights(trainer.module)
        expected = compute_mean_gradients(trainer.module, step, loss_of)
        assert expected["second.weight"].abs().max() > 0
        WAYS[way](trainer, loss_of(trainer, trainer.global_rank, step))
        trainer.step()
        check_step(trainer.module, before, expected)


@pytest.mark.parametrize("way", ["trainer.backward", "loss.backward"])
def test_parameter_unused_on_one_rank_gets_the_mean(way):
    run_distributed_test(train_with_layer_unused_on_rank_1, 2, way)


def train_with_assigned_gradients(runs_backward):
    trainer = start(nn.Linear(4, 2))
    before = copy_weights(trainer.module)
    if runs_backward:
        trainer.backward(compute_loss(trainer, trainer.global_rank))
    for parameter in trainer.module.parameters():
        parameter.grad = torch.full_like(parameter, trainer.global_rank + 1.0)
    trainer.step()
    check_step(trainer.module, before, dict.fromkeys(before, 1.5))


@pytest.mark.parametrize("runs_backward", [True, False])
def test_gradients_that_the_script_assigns_are_averaged(runs_backward):
    run_distributed_test(train_with_assigned_gradients, 2, runs_backward)


def average_16_bit_gradients():
    """Average 3, 3/256 and 3/256: bfloat16 has 8 bits, so 1 + 1/256 + 1/256 would be 1."""
    model = nn.Linear(3, 1, bias=False, dtype=torch.bfloat16)
    nn.init.zeros_(model.weight)
    trainer = start(model, engine={"backend": "torch", "master_weights": False})
    model.weight.grad = torch.full_like(model.weight, 3 / 256)
    model.weight.grad[0, trainer.global_rank] = 3
    trainer.step()
    assert model.weight.tolist() == [[-1 - 1 / 128] * 3]


def test_16_bit_gradients_are_averaged_in_float32():
    run_distributed_test(average_16_bit_gradients, 3)


class Embedding(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.table = kind(10, 3, sparse=True)
        self.head = nn.Linear(3, 2)

    def forward(self, tokens, *, uses_table=True):
        x = self.table(tokens).view(2, 3) if uses_table else torch.ones(2, 3)
        return self.head(x)


def train_sparse_embeddings():
    for kind in (nn.Embedding, nn.EmbeddingBag):
        for used_by in ({0, 1}, {0}):

            def loss_of(model, rank, step, kind=kind, used_by=used_by):
                del step
                tokens = torch.tensor(
                    [[1, 2 + rank]] if kind is nn.Embedding else [[1], [2 + rank]]
                )
                return model(tokens, uses_table=rank in used_by).pow(2).mean()

            trainer = start(Embedding(kind))
            for _ in range(2):
                before = copy_weights(trainer.module)
                expected = compute_mean_gradients(trainer.module, compute_loss=loss_of)
                trainer.backward(loss_of(trainer, trainer.global_rank, 0))
                assert trainer.module.table.weight.grad.is_sparse
                trainer.step()
                check_step(trainer.module, before, expected)


def test_sparse_gradients_are_averaged():
    run_distributed_test(train_sparse_embeddings, 2)


class Recomputed(nn.Module):
    """Layers that run in reentrant activation checkpoints; the middle one runs twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        x = x.requires_grad_()
        for index in (0, 1, 1, 2):
            x = checkpoint(self.layers[index], x, use_reentrant=True).tanh()
        return x


def train_reentrant_checkpoints(bucket_bytes):
    with mock.patch.object(gradient_averaging, "_FIRST_BUCKET_BYTES", bucket_bytes):
        trainer = start(Recomputed())
        for step in range(3):
            before = copy_weights(trainer.module)
            expected = compute_mean_gradients(trainer.module, step)
            trainer.backward(compute_loss(trainer, trainer.global_rank, step))
            trainer.step()
            check_step(trainer.module, before, expected)


@pytest.mark.parametrize("bucket_bytes", [1, 1 << 20])
def test_gradients_of_reentrant_checkpoints_are_averaged(bucket_bytes):
    run_distributed_test(train_reentrant_checkpoints, 2, bucket_bytes)


def freeze_and_unfreeze():
    model = build_layers()
    trainer = start(model)
    for step, is_trained in enumerate([True, False, False, True, True]):
        model[0].requires_grad_(is_trained)
        before = copy_weights(model)
        expected = compute_mean_gradients(model, step)
        assert ("0.weight" in expected) == is_trained
        trainer.backward(compute_loss(trainer, trainer.global_rank, step))
        trainer.step()
        check_step(model, before, expected)


def test_layers_frozen_and_unfrozen_later_are_averaged_while_they_train():
    run_distributed_test(freeze_and_unfreeze, 2)


def freeze_between_backward_and_step(way):
    model = build_layers()
    trainer = start(model)
    for step in range(3):
        before = copy_weights(model)
        expected = compute_mean_gradients(model, step)
        WAYS[way](trainer, compute_loss(trainer, trainer.global_rank, step))
        model[step].requires_grad_(False)
        trainer.step()
        check_step(model, before, expected)


@pytest.mark.parametrize("way", WAYS)
def test_layer_frozen_between_backward_and_step_uses_its_averaged_gradient(way):
    run_distributed_test(freeze_between_backward_and_step, 2, way)


def add_a_param_group():
    model = build_layers()
    trainer = start(model, [*model[4].parameters()])
    for step in range(3):
        if step == 1:
            trainer.optimizer.add_param_group({"params": list(model[:4].parameters())})
        before = copy_weights(model)
        expected = compute_mean_gradients(model, step)
        if step == 0:
            expected = {name: value for name, value in expected.items() if name.startswith("4.")}
        trainer.backward(compute_loss(trainer, trainer.global_rank, step))
        trainer.step()
        check_step(model, before, expected)


def test_parameters_of_a_group_added_later_are_averaged():
    run_distributed_test(add_a_param_group, 2)


def train_from_different_weights():
    model = build_layers(has_norm=True)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data += get_rank()
    trainer = start(model)
    for step in range(3):
        if trainer.global_rank == 0:  # as many scripts evaluate
            trainer.eval()
            with torch.no_grad():
                trainer(draw(0))
            trainer.train()
        loss = compute_loss(trainer, trainer.global_rank, step)
        with torch.no_grad():  # changes the statistics of BatchNorm on one rank
            for _ in range(trainer.global_rank):
                trainer(draw(0))
        trainer.backward(loss)
        trainer.step()
        assert model[2].num_batches_tracked == step + 1
        assert_equal_on_all_ranks([*model.parameters(), *model.buffers()])


def test_parameters_and_buffers_equal_those_of_rank_0_after_each_step():
    run_distributed_test(train_from_different_weights, 2)


def evaluate_on_rank_0():
    """Train with forward passes without gradients that only rank 0 runs, and without them."""
    results = []
    for evaluates in (False, True):
        trainer = start(build_layers())
        for step in range(3):
            loss = compute_loss(trainer, trainer.global_rank, step)
            if evaluates and trainer.global_rank == 0:
                with torch.no_grad():
                    trainer(draw(5)), trainer.module(draw(6))
            trainer.backward(loss)
            trainer.step()
        results.append(list(trainer.module.parameters()))
    assert all(map(torch.equal, *results))


def test_forward_without_gradients_on_rank_0_does_not_change_the_steps():
    run_distributed_test(evaluate_on_rank_0, 2)


def train_with_hooks_of_the_script(way):
    trainer = start(build_layers())

    def scale_gradient(parameter):
        parameter.grad.mul_(trainer.global_rank + 1)

    for parameter in trainer.module.parameters():
        parameter.register_post_accumulate_grad_hook(scale_gradient)
    for step in range(2):
        before = copy_weights(trainer.module)
        expected = compute_mean_gradients(
            trainer.module,
            step,
            lambda model, rank, step: (rank + 1) * compute_loss(model, rank, step),
        )
        WAYS[way](trainer, compute_loss(trainer, trainer.global_rank, step))
        trainer.step()
        check_step(trainer.module, before, expected)


@pytest.mark.parametrize("way", WAYS)
def test_gradients_that_a_hook_of_the_script_changes_are_averaged(way):
    run_distributed_test(train_with_hooks_of_the_script, 2, way)


def destroy_and_run_backward_on_rank_0():
    trainer = start(build_layers())
    trainer.backward(compute_loss(trainer, trainer.global_rank))
    trainer.step()
    trainer.destroy()
    if trainer.global_rank == 0:
        expected = copy.deepcopy(trainer.module)
        compute_loss(expected, 0).backward()
        compute_loss(trainer.module, 0).backward()
        pairs = zip(trainer.module.parameters(), expected.parameters(), strict=True)
        assert all(torch.equal(p.grad, q.grad) for p, q in pairs)


def test_destroy_removes_the_hooks():
    run_distributed_test(destroy_and_run_backward_on_rank_0, 2)


def train_in_buckets(first=1 << 20, others=25 << 20):
    sizes = {"_FIRST_BUCKET_BYTES": first, "_BUCKET_BYTES": others}
    with mock.patch.multiple(gradient_averaging, **sizes):
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Linear(4, 4) for _ in range(3)), nn.Linear(4, 4).double(), nn.Linear(4, 2).double()
        )
        model[2].register_forward_hook(lambda _, __, out: out.double())
        trainer = start(model, steps_per_print=None)  # a progress line averages the loss
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
            for step in range(3):
                trainer.backward(compute_loss(trainer, trainer.global_rank, step))
                trainer.step()
        return list(model.parameters()), all_reduce.call_count


def compare_buckets():
    whole, few = train_in_buckets()
    parts, many = train_in_buckets(1, 1)
    some, medium = train_in_buckets(1, 100)
    assert few == 3 * (2 + 1)  # one bucket per dtype, and a check of the ranks' steps
    assert many == 3 * (10 + 1)
    assert few < medium < many
    assert all(map(torch.equal, whole, parts))
    assert all(map(torch.equal, whole, some))
    assert_equal_on_all_ranks(whole)


def test_gradients_in_many_buckets_equal_those_in_one():
    run_distributed_test(compare_buckets, 2)


def train_under_no_sync():
    model = build_layers()
    trainer = start(model)
    before = copy_weights(model)
    first, second = (compute_mean_gradients(model, step) for step in range(2))
    with trainer.no_sync():
        trainer.backward(compute_loss(trainer, trainer.global_rank, 0))
    trainer.backward(compute_loss(trainer, trainer.global_rank, 1))
    trainer.step()
    check_step(model, before, {name: value + second[name] for name, value in first.items()})


def test_gradients_accumulated_under_no_sync_are_averaged_with_the_last():
    run_distributed_test(train_under_no_sync, 2)
