"""Loops that train incorrectly raise or warn once; loops that are only unusual do neither."""

import contextlib
import copy
import gc
import logging
import sys

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import IterableDataset, TensorDataset

import engine
from engine.errors import MisuseError
from tests.testing.fake_backend import FakeBackend, build_engine

WARMUP = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.4, "warmup_num_steps": 4}}
PLATEAU = {"type": "ReduceLROnPlateau", "params": {"patience": 0, "factor": 0.5}}
X = torch.ones(2, 2)


def build_step_lr(optimizer):
    return StepLR(optimizer, 1)


SCHEDULERS = pytest.mark.parametrize(
    "scheduler", [{"scheduler": WARMUP}, {"lr_scheduler": build_step_lr}], ids=["config", "torch"]
)


def backward(trainer):
    trainer.backward(trainer(X).mean())


def train(trainer, micro_batches=1):
    for _ in range(micro_batches):
        backward(trainer)
        trainer.step()


def start(model, *, micro_batch_size=2, **arguments):
    """Return an engine of `initialize`, and its loader."""
    config = {
        "train_batch_size": 2,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    }
    trainer, _, loader, _ = engine.initialize(config=config, model=model, **arguments)
    return trainer, loader


def dataset(samples):
    return TensorDataset(torch.ones(samples, 2))


class OneSample(IterableDataset):
    def __iter__(self):
        yield torch.ones(2)


def read_warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@SCHEDULERS
def test_step_after_the_script_stepped_the_scheduler_raises(scheduler):
    trainer = build_engine(**scheduler)
    trainer.optimizer.step()
    trainer.lr_scheduler.step()  # before the first step, a script may move the schedule
    train(trainer, 2)
    trainer.lr_scheduler.step()
    with pytest.raises(MisuseError, match=r"Remove `scheduler\.step\(\)` from the script\."):
        train(trainer)


@SCHEDULERS
def test_step_after_the_script_loaded_or_replaced_the_scheduler_is_valid(scheduler):
    trainer, other = build_engine(**scheduler), build_engine(**scheduler)
    train(other, 5)
    train(trainer)
    trainer.lr_scheduler.load_state_dict(copy.deepcopy(other.lr_scheduler.state_dict()))
    train(trainer)
    trainer.lr_scheduler = build_step_lr(trainer.optimizer)
    trainer.lr_scheduler.last_epoch = 10
    train(trainer)


@pytest.mark.parametrize(
    ("scheduler", "metric"),
    [({"lr_scheduler": ReduceLROnPlateau}, {"metrics": 1.0}), ({"scheduler": PLATEAU}, {})],
    ids=["torch", "config"],
)
def test_step_after_the_script_passed_a_metric_to_the_scheduler_is_valid(scheduler, metric):
    trainer = build_engine(**scheduler)
    for _ in range(3):
        train(trainer)
        trainer.lr_scheduler.step(**(metric or {"metric": 1.0}))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_step_after_the_script_stepped_the_optimizer_raises(accumulation):
    trainer = build_engine(scheduler=WARMUP, gradient_accumulation_steps=accumulation)
    train(trainer, accumulation)
    backward(trainer)
    trainer.optimizer.step()
    with pytest.raises(MisuseError, match=r"Remove `optimizer\.step\(\)` from the script\."):
        trainer.step()
    trainer.lr_scheduler.step()
    with pytest.raises(MisuseError, match=r"`optimizer\.step\(\)` and `scheduler\.step\(\)`"):
        trainer.step()


def test_optimizer_step_in_place_of_the_trainers_raises_at_the_next_loss():
    trainer = build_engine(scheduler=WARMUP)
    backward(trainer)
    trainer.optimizer.step()
    with pytest.raises(MisuseError, match=r"and `trainer\.step\(\)` instead"):
        backward(trainer)


@pytest.mark.parametrize("uses_engine", [True, False])
def test_loop_that_steps_only_the_optimizer_raises(uses_engine):
    model = torch.nn.Linear(2, 1)
    trainer, loader = start(model, training_data=dataset(8))
    forward = trainer if uses_engine else model
    with pytest.raises(MisuseError, match=r"Call `trainer\.backward\(loss\)` and"):
        for (x,) in loader:
            forward(x).mean().backward()
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
    assert trainer.global_steps == 0


def test_optimizer_steps_that_do_not_train_are_allowed():
    trainer, _ = start(torch.nn.Linear(2, 1))
    for _ in range(3):
        trainer.optimizer.step()  # without gradients
    backward(trainer)
    (group,) = trainer.optimizer.param_groups
    lr, group["lr"] = group["lr"], 0.0
    for _ in range(3):
        trainer.optimizer.step()  # as in torch.distributed.checkpoint
    group["lr"] = lr
    with pytest.raises(MisuseError, match="optimizer.step"):
        for _ in range(2):
            trainer.optimizer.step()


def test_second_engine_and_plain_loop_may_reuse_the_optimizer_of_a_first_engine():
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first, _ = start(model, optimizer=optimizer)
    train(first, 2)
    second, _ = start(model, optimizer=optimizer)
    train(second, 3)
    del first, second
    gc.collect()
    for _ in range(3):
        model(X).mean().backward()
        optimizer.step()


@pytest.mark.parametrize(("losses", "steps", "warns"), [(1, 0, 0), (3, 1, 0), (3, 0, 1)])
def test_loop_without_a_step_warns_when_the_engine_is_freed(
    losses, steps, warns, caplog, monkeypatch
):
    monkeypatch.delattr(sys, "last_value", raising=False)  # set by pytest if a test has failed
    trainer, _ = start(torch.nn.Linear(2, 1))
    train(trainer, steps)
    for _ in range(losses):
        backward(trainer)
    del trainer
    gc.collect()
    assert caplog.text.count("was never called") == warns


def test_many_losses_without_a_step_warn_once(caplog):
    trainer = build_engine()
    for _ in range(150):
        backward(trainer)
        trainer.step()
    assert "was called" not in caplog.text
    for _ in range(250):
        backward(trainer)
    unmanaged = build_engine()
    unmanaged._run.accumulation.is_managed = False  # as on DeepSpeed, if the config says so
    for _ in range(150):
        backward(unmanaged)
    assert caplog.text.count("was called 100 times since the last call") == 1


def test_step_after_a_step_that_failed_is_valid():
    backend = FakeBackend()
    trainer = build_engine(backend, engine={"max_skipped_steps": 1})
    train(trainer)
    backend.overflows_next = True
    with pytest.raises(FloatingPointError):
        train(trainer)
    trainer.optimizer.step()
    train(trainer)


def test_step_without_a_backward_pass_raises_and_changes_nothing():
    trainer = build_engine(scheduler=WARMUP)
    train(trainer)
    with pytest.raises(MisuseError, match="no backward pass has run since the previous"):
        trainer.step()
    assert (trainer.global_steps, trainer.lr_scheduler.last_epoch) == (1, 1)


@pytest.mark.parametrize(
    ("accumulation", "message"),
    [
        (1, "found no gradients"),
        (2, "2 micro-batches, but the gradients of 1 micro-batch were cleared"),
    ],
)
def test_step_after_zero_grad_raises(accumulation, message):
    trainer = build_engine(gradient_accumulation_steps=accumulation)
    train(trainer, accumulation - 1)
    backward(trainer)
    trainer.optimizer.zero_grad()
    with pytest.raises(MisuseError, match=message):
        trainer.step()


@pytest.mark.parametrize("method", ["backward", "scale", "forward"])
def test_pass_after_zero_grad_in_the_middle_of_a_batch_raises(method):
    trainer = build_engine(gradient_accumulation_steps=3)
    train(trainer, 4)
    loss = trainer(X).mean()
    trainer.module.zero_grad()
    with pytest.raises(MisuseError, match="gradients of 1 micro-batch were cleared"):
        getattr(trainer, method)(X if method == "forward" else loss)


def step_gradients_by_hand(trainer):
    for parameter in trainer.module.parameters():
        parameter.grad = torch.ones_like(parameter)
    trainer.step()


def step_loss_backward(trainer):
    trainer(X).mean().backward()
    trainer.step()


def step_combined_gradients(trainer):
    backward(trainer)
    first = [parameter.grad for parameter in trainer.module.parameters()]
    trainer.zero_grad()
    backward(trainer)
    for parameter, gradient in zip(trainer.module.parameters(), first, strict=True):
        parameter.grad += gradient
    trainer.step()


def step_with_an_omitted_micro_batch(trainer):
    trainer.set_gradient_accumulation_boundary(is_boundary=False)
    train(trainer)
    trainer.set_gradient_accumulation_boundary(is_boundary=True)
    trainer.step()


def step_between_zero_grads(trainer):
    trainer.optimizer.zero_grad()
    train(trainer)
    trainer.optimizer.zero_grad()


@pytest.mark.parametrize(
    "step",
    [
        step_gradients_by_hand,
        step_loss_backward,
        step_combined_gradients,
        step_with_an_omitted_micro_batch,
        step_between_zero_grads,
    ],
)
def test_step_of_an_unusual_loop_is_valid(step):
    trainer = build_engine(scheduler=WARMUP)
    for _ in range(3):
        step(trainer)
    assert trainer.global_steps == 3


def test_step_after_loading_a_checkpoint_or_a_range_test_is_valid(tmp_path):
    trainer = build_engine(scheduler=WARMUP, gradient_accumulation_steps=2)
    train(trainer, 2)
    trainer.save_checkpoint(tmp_path)
    train(trainer, 1)
    trainer.load_checkpoint(tmp_path)
    trainer.optimizer.step()  # torch's checkpoint functions do so to create its state
    train(trainer, 2)

    def fail_in_the_middle_of_a_batch(trainer, batch):
        if trainer.micro_steps == 3:
            raise KeyError
        return trainer(batch).mean()

    with contextlib.suppress(KeyError):
        engine.lr_range_test(trainer, [X], loss_fn=fail_in_the_middle_of_a_batch, steps=5)
    train(trainer, 2)
    assert trainer.global_steps == 3


def test_epochs_without_a_step_warn_and_then_raise(caplog):
    trainer, loader = start(torch.nn.Linear(2, 1), training_data=dataset(4))

    def run_epoch(*, steps):
        for (x,) in loader:
            trainer.backward(trainer(x).mean())
            if steps:
                trainer.step()

    for (x,) in loader:  # evaluation
        trainer(x)
    run_epoch(steps=True)
    assert not read_warnings(caplog)
    run_epoch(steps=False)
    (message,) = read_warnings(caplog)
    assert "`trainer.step()` was not" in message
    trainer.step()  # one step for the whole dataset
    run_epoch(steps=False)
    trainer.step()
    assert len(read_warnings(caplog)) == 1
    run_epoch(steps=False)
    run_epoch(steps=False)
    with pytest.raises(MisuseError, match=r"in 2 epochs, but `trainer\.step\(\)` was not"):
        run_epoch(steps=False)


def test_epochs_that_each_end_in_the_middle_of_a_batch_are_valid(caplog):
    trainer, loader = start(torch.nn.Linear(2, 1), micro_batch_size=1, training_data=OneSample())
    for _ in range(3):
        for x in loader:
            trainer.backward(trainer(x).mean())
            trainer.step()
    assert not read_warnings(caplog)


def test_engines_that_take_turns_on_one_model_warn_once(caplog):
    model = torch.nn.Linear(2, 1)
    (first, _), (second, _) = start(model), start(model)
    train(first, 2)
    train(second, 2)  # the second engine may have replaced the first one
    assert not read_warnings(caplog)
    for _ in range(3):
        train(first)
        train(second)
    (message,) = read_warnings(caplog)
    assert "such as `weight`" in message


def test_engines_that_train_different_parts_of_one_model_do_not_warn(caplog):
    model = torch.nn.Linear(2, 1)
    (first, _), (second, _) = (start(model, model_parameters=[p]) for p in model.parameters())
    for _ in range(3):
        train(first)
        train(second)
        first.zero_grad()
    assert not read_warnings(caplog)


def test_engine_on_a_dataset_smaller_than_a_batch_warns(caplog):
    start(torch.nn.Linear(2, 1), training_data=dataset(2))
    assert not read_warnings(caplog)
    start(torch.nn.Linear(2, 1), training_data=dataset(1))
    (message,) = read_warnings(caplog)
    assert "`len(training_data)` (1) is smaller than `train_batch_size` (2)" in message


@pytest.mark.parametrize("steps_before", [1, 50])
def test_unfrozen_parameters_that_are_not_trained_are_named_once(steps_before, caplog):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    model[:2].requires_grad_(False)
    trained = [*model[1].parameters(), *model[2].parameters()]
    trainer, _ = start(model, model_parameters=trained)
    train(trainer, steps_before)
    model.requires_grad_(True)
    train(trainer, 51)
    (message,) = read_warnings(caplog)
    assert "are not trained: `0.weight`, `0.bias`." in message


def test_parameters_added_to_the_optimizer_or_left_out_at_the_start_do_not_warn(caplog):
    model = torch.nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    trainer, _ = start(model)
    model.bias.requires_grad_(True)
    trainer.optimizer.add_param_group({"params": [model.bias]})
    train(trainer, 3)
    model = torch.nn.Linear(2, 1)
    trainer, _ = start(model, model_parameters=[model.weight])
    train(trainer, 3)
    assert not read_warnings(caplog)


def test_destroy_removes_the_hook_from_the_optimizer():
    trainer = build_engine()
    assert trainer.optimizer._optimizer_step_post_hooks
    trainer.destroy()
    assert not trainer.optimizer._optimizer_step_post_hooks


def step_by_hand(optimizer, trainer):
    optimizer.zero_grad()
    trainer(X).mean().backward()
    optimizer.step()


@pytest.mark.parametrize("loop", ["instead", "before", "after"])
def test_own_optimizer_instead_of_or_beside_the_engine_warns_once(caplog, loop):
    trainer, _ = start(torch.nn.Linear(2, 1))
    own = torch.optim.AdamW(trainer.parameters(), 0.1)
    for step in range(4):
        if loop == "before":
            train(trainer)
        step_by_hand(own, trainer)
        if loop == "after":
            trainer.zero_grad()
            train(trainer)
        warnings = caplog.text.count("own AdamW optimizer steps parameters that the engine trains")
        assert warnings == (step > 0)


def test_own_optimizer_of_frozen_parameters_is_accepted(caplog):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    trainer, _ = start(model, model_parameters=model[0].parameters())
    model[0].requires_grad_(False)
    for _ in range(3):
        step_by_hand(torch.optim.AdamW(model.parameters(), 0.1), trainer)
    assert "own AdamW" not in caplog.text


def test_own_optimizer_of_other_parameters_or_after_the_engine_is_accepted(caplog):
    trainer, _ = start(torch.nn.Linear(2, 1))
    other = torch.nn.Linear(2, 1)
    for _ in range(3):
        step_by_hand(torch.optim.AdamW(other.parameters(), 0.1), other)
        torch.optim.AdamW(trainer.parameters(), 0.1).step()  # without gradients
    trainer.destroy()
    for _ in range(3):
        step_by_hand(torch.optim.AdamW(trainer.module.parameters(), 0.1), trainer.module)
    assert "own AdamW" not in caplog.text


def test_own_optimizer_of_an_engine_without_optimizer_is_accepted():
    trainer, *_ = engine.initialize(model=torch.nn.Linear(2, 1), config={"train_batch_size": 2})
    own = torch.optim.AdamW(trainer.module.parameters(), 0.1)
    for _ in range(3):
        step_by_hand(own, trainer.module)
