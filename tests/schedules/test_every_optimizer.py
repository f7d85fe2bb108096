"""Every schedule on every optimizer of torch either runs, or is refused with a reason."""

import inspect
import warnings

import pytest
import torch

from engine.config import validate
from schedules import SCHEDULES, Horizon, from_config
from schedules.torch_scheduler import bind
from tests.testing.torch_optimizers import HYPERPARAMETERS

OPTIMIZERS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and name != "Optimizer"
}
BLOCKS = [{"type": name, "params": dict(cls.example)} for name, cls in SCHEDULES.items()]
HORIZON = Horizon(total_steps=1000, steps_per_epoch=10, samples_per_step=4)
STEPS = 3


def build(kind):
    weight = torch.nn.Parameter(torch.ones(2, 2))
    return kind([weight]), weight


def run(optimizer, weight, binder):
    def compute_loss():
        optimizer.zero_grad()
        loss = weight.pow(2).sum()
        loss.backward()
        if isinstance(optimizer, torch.optim.SparseAdam):
            weight.grad = weight.grad.to_sparse()
        return loss

    for _ in range(STEPS):
        optimizer.step(compute_loss)
        binder.step(**({binder.schedule.feedback: 1.0} if binder.schedule.feedback else {}))
    return optimizer.param_groups[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_schedule_on_any_optimizer_runs_and_resumes_or_is_refused(name):
    has_momentum = {"momentum", "betas"} & build(OPTIMIZERS[name])[0].param_groups[0].keys()
    for block in BLOCKS:
        schedule = from_config(block)
        optimizer, weight = build(OPTIMIZERS[name])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            missing = set(schedule.hyperparameters) - {"lr"} - optimizer.param_groups[0].keys()
            if missing - ({"momentum"} if has_momentum else set()):
                with pytest.raises(ValueError, match=f"param group 0 of {name} has only"):
                    bind(schedule, optimizer, horizon=HORIZON)
                continue
            binder = bind(schedule, optimizer, horizon=HORIZON)
            group = run(optimizer, weight, binder)
            resumed = bind(schedule, build(OPTIMIZERS[name])[0], horizon=HORIZON)
        resumed.load_state_dict(binder.state_dict())
        assert resumed.get_last_lr() == [group["lr"]], block
        assert resumed.last_epoch == STEPS


@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_config_with_any_optimizer_and_schedule_is_valid_or_has_problems_with_a_fix(name):
    for block in BLOCKS:
        config = {
            "train_batch_size": 8,
            "optimizer": {"type": name, "params": HYPERPARAMETERS[name]},
            "scheduler": block,
            "engine": {"backend": "torch", "max_duration": 1000},
        }
        for problem in validate(config):
            assert problem.severity != "error" or problem.hint, problem
