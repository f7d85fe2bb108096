"""A load that fails changes nothing; with ``load_module_strict=False``, models may differ."""

import pytest
import torch

import engine
from tests.testing.distributed import run_distributed_test
from tests.testing.small_model import all_equal, copy_parameters

WARMUP = {"type": "WarmupLR", "params": {"warmup_num_steps": 2}}
OTHER_WARMUP = {"type": "WarmupLR", "params": {"warmup_num_steps": 7}}
BACKENDS = [("torch", 0, 1), ("torch", 3, 2), ("deepspeed", 0, 1), ("deepspeed", 1, 2)]


class Net(torch.nn.Module):
    """A body and a head; possibly a second head."""

    def __init__(self, outputs=1, has_new_head=False):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = torch.nn.Linear(4, 4), torch.nn.Linear(4, outputs)
        self.new_head = torch.nn.Linear(outputs, 3) if has_new_head else torch.nn.Identity()

    def forward(self, x):
        return self.new_head(self.head(self.body(x)))


def start(backend, stage, *, model=None, is_split=False, scheduler=WARMUP):
    model = model or Net()
    parameters = list(model.parameters())
    groups = [{"params": parameters[:1]}, {"params": parameters[1:]}]
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": stage},
        "scheduler": scheduler,
        "engine": {"backend": backend},
    }
    trainer, *_ = engine.initialize(
        model=model, config=config, model_parameters=groups if is_split else None
    )
    train_step(trainer)
    return trainer


def train_step(trainer):
    trainer.backward(trainer(torch.ones(2, 4)).pow(2).mean())
    trainer.step()


def read_state(trainer):
    """Return the weights, and the counters and hyperparameters."""
    counters = trainer.global_steps, trainer.micro_steps, trainer.skipped_steps
    return copy_parameters(trainer), (counters, trainer.get_lr(), trainer.lr_scheduler.state_dict())


FAILURES = [
    ({"model": {"outputs": 2}}, {}, "`head.weight` has shape"),
    ({"model": {"outputs": 2}}, {"load_module_strict": False}, "`head.weight` has shape"),
    ({"model": {"outputs": 2}}, {"load_module_only": True}, "`head.weight` has shape"),
    ({"model": {"has_new_head": True}}, {}, "`new_head.weight` is missing"),
    ({"is_split": True}, {"load_lr_scheduler_states": False}, "does not match"),
    ({"scheduler": OTHER_WARMUP}, {"load_optimizer_states": False}, "`warmup_num_steps` is 2"),
]


def fail_to_load(directory, backend, stage):
    trainer = start(backend, stage)
    train_step(trainer)
    trainer.save_checkpoint(directory, tag=7)
    for changes, options, message in FAILURES:
        model = Net(**changes["model"]) if "model" in changes else None
        other = start(backend, stage, **(changes | {"model": model}))
        weights, others = read_state(other)
        with pytest.raises(engine.CheckpointError, match=message):
            other.load_checkpoint(directory, tag=7, **options)
        weights_now, others_now = read_state(other)
        assert all_equal(weights_now, weights), message
        assert others_now == others, message
        train_step(other)


@pytest.mark.parametrize(("backend", "stage", "world_size"), BACKENDS)
def test_failed_load_changes_nothing(tmp_path, backend, stage, world_size):
    run_distributed_test(fail_to_load, world_size, tmp_path, backend, stage)


def load_with_new_head(directory, backend, stage):
    trainer = start(backend, stage)
    trainer.save_checkpoint(directory, tag=0.5)
    loads_optimizer = backend == "torch"
    for options in ({"load_module_only": True}, {"load_optimizer_states": loads_optimizer}):
        other = start(backend, stage, model=Net(has_new_head=True))
        train_step(other)
        new_head = copy_parameters(other)[-2:]
        path, _ = other.load_checkpoint(directory, tag=0.5, load_module_strict=False, **options)
        assert path == str(directory / "0.5")
        loaded = copy_parameters(other)
        assert all_equal(loaded[:-2], copy_parameters(trainer))
        assert all_equal(loaded[-2:], new_head)
        train_step(other)
        assert not all_equal(copy_parameters(other)[-2:], new_head)


@pytest.mark.parametrize(("backend", "stage", "world_size"), BACKENDS)
def test_load_without_strict_keeps_the_weights_of_a_new_head(tmp_path, backend, stage, world_size):
    run_distributed_test(load_with_new_head, world_size, tmp_path, backend, stage)
