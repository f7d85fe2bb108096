"""Small runs with a checkpoint each, to damage the checkpoint and load it."""

import functools

import torch
from torch.utils.data import TensorDataset

import engine
from engine.training.best_metric import BestMetric
from tests.testing.torch_optimizers import HYPERPARAMETERS

__all__ = ["DEEPSPEED_RUNS", "RUNS", "Count", "SavedRun"]

_CYCLE = {
    "type": "OneCycle",
    "params": {"cycle_min_lr": 0.001, "cycle_max_lr": 0.01, "cycle_first_step_size": 20},
}
_AUTOWU = {
    "type": "AutoWU",
    "params": {"steps_per_epoch": 3, "total_epochs": 20, "rollback": True},
}
_PLATEAU = {"type": "ReduceLROnPlateau", "params": {"patience": 0}}


class Count(torch.nn.Module):
    """A layer that counts its calls, in a state that is not a tensor."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = state["calls"] + 0


class Position:
    """A data loader that saves its own position."""

    def __init__(self, batches):
        self.batches, self.given = batches, 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        while self.given < len(self.batches):
            self.given += 1
            yield self.batches[self.given - 1]
        self.given = 0

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.given = state["given"] + 0


class Averaging(torch.optim.Optimizer):
    """A custom optimizer, whose state has a list and a number."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.01, "decay": 0.5})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["history"], state["count"] = [], 0
                state["history"] = [*state["history"][-1:], parameter.grad.clone()]
                state["count"] += 1
                parameter.sub_(sum(state["history"]), alpha=group["lr"] / state["count"])


class SavedRun:
    """An engine that has trained for some steps.

    Args:
        optimizer: ``optimizer`` block of the config, or a class.
        scheduler: ``scheduler`` block of the config, or a function of the optimizer.
        own_loader: whether the data loader saves its own position.
        groups: whether each layer has its own param group.
        best: whether the best value of a metric is tracked.
        norm: class of the second layer.
        sections: other sections of the config.
    """

    def __init__(
        self,
        optimizer,
        scheduler,
        *,
        own_loader=False,
        groups=False,
        best=False,
        norm=torch.nn.BatchNorm1d,
        **sections,
    ):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), norm(4), Count(), torch.nn.Linear(4, 1))
        x = torch.randn(24, 3)
        data = TensorDataset(x, x.sum(1, keepdim=True))
        if own_loader:
            data = Position(list(zip(*(each.split(4) for each in data.tensors), strict=True)))
        is_block = isinstance(optimizer, dict)
        config = {"train_batch_size": 4, "engine": {"backend": "torch"}, **sections}
        config |= {"optimizer": optimizer} if is_block else {}
        config |= {"scheduler": scheduler} if isinstance(scheduler, dict) else {}
        parameters = [{"params": layer.parameters()} for layer in (model[0], model[1], model[3])]
        self.trainer, _, self.loader, _ = engine.initialize(
            model=model,
            config=config,
            training_data=data,
            model_parameters=parameters if groups else None,
            optimizer=None if is_block else optimizer(model.parameters()),
            lr_scheduler=None if isinstance(scheduler, dict) else scheduler,
        )
        self.state = self.trainer._run
        self.state.best = BestMetric("metric", patience=100) if best else None

    def train(self, steps):
        """Train for some steps."""
        for x, y in self.loader:
            loss = (self.trainer(x).float() - y).pow(2).mean()
            self.trainer.backward(loss)
            self.trainer.step(metric=loss.detach())
            steps -= 1
            if not steps:
                break


def _build_sequence(optimizer):
    first = torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5, 2)
    second = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3)
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [first, second], [2])


RUNS = {
    "OneCycle": lambda: SavedRun({"type": "AdamW", "params": {"lr": 0.01}}, _CYCLE, best=True),
    "AutoWU": lambda: SavedRun(
        {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
        _AUTOWU,
        fp16={"enabled": True, "initial_scale_power": 4},
    ),
    "plateau": lambda: SavedRun(
        {"type": "RMSprop", "params": HYPERPARAMETERS["RMSprop"]}, _PLATEAU, own_loader=True
    ),
    "torch": lambda: SavedRun(
        {"type": "Rprop", "params": HYPERPARAMETERS["Rprop"]}, _build_sequence, groups=True
    ),
    "custom": lambda: SavedRun(Averaging, {"type": "WarmupLR", "params": {"warmup_num_steps": 9}}),
    "override": lambda: SavedRun(
        {"type": "Adam", "params": HYPERPARAMETERS["Adam"]},
        _AUTOWU,
        engine={"backend": "torch", "checkpoint": {"override": True}},
    ),
}
"""Functions that start a run, by name."""


def _start_deepspeed(stage, **sections):
    return SavedRun(
        {"type": "AdamW", "params": {"lr": 0.01}},
        _CYCLE,
        engine={"backend": "deepspeed"},
        zero_optimization={"stage": stage},
        **sections,
    )


DEEPSPEED_RUNS = {
    f"stage {stage}": functools.partial(_start_deepspeed, stage) for stage in range(4)
} | {
    "stage 2 in bf16": functools.partial(
        _start_deepspeed, 2, bf16={"enabled": True}, norm=torch.nn.LayerNorm
    )
}
"""The same with DeepSpeed."""
