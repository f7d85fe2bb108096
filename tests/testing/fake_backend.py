"""A backend for engine tests, with real gradients but simulated ranks and overflows."""

from __future__ import annotations

import copy
from unittest import mock

import torch
from typing_extensions import override

from engine.backends.base import Backend
from engine.checkpoint.fingerprint import build_identity, read_hyperparameters
from engine.config import load_config
from engine.distributed.ranks import Ranks
from engine.engine import Engine
from schedules.torch_scheduler import bind

CONFIG = {
    "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
    "engine": {"backend": "torch"},
}


class FakeBackend(Backend):
    """Rank 0 of a simulated run that trains ``torch.nn.Linear(2, 1)`` on the CPU.

    Args:
        others: values that the other ranks contribute to every mean, one per rank.
        loss_scale: factor on the loss.

    Attributes:
        calls: name and argument of every training call, in order.
        overflows_next: whether the next step is skipped as if its gradients were non-finite.
    """

    def __init__(self, *, others=(), loss_scale=1.0):
        torch.manual_seed(0)
        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        ranks = Ranks(0, 0, 1 + len(others), torch.device("cpu"))
        super().__init__(model, optimizer, ranks, num_parameters=3)
        self.calls = []
        self.overflows_next = False
        self._others = others
        self._loss_scale = loss_scale

    def arguments(self, name):
        """Return the arguments of all calls to a method."""
        return [argument for called, argument in self.calls if called == name]

    @override
    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)

    @override
    def backward(self, loss, accumulation, *, is_last, retain_graph=False):
        self.calls += [("backward", accumulation), ("is_last", is_last)]
        (loss * self._loss_scale / accumulation).backward(retain_graph=retain_graph)

    @override
    def scale(self, loss, accumulation, *, is_last):
        self.calls.append(("scale", accumulation))
        return loss * self._loss_scale / accumulation

    @override
    def step(self, *, divide_by=1):
        self.calls.append(("step", divide_by))
        applied, self.overflows_next = not self.overflows_next, False
        if applied:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad /= self._loss_scale * divide_by
            self.optimizer.step()
        self.zero_grad()
        return applied

    @property
    @override
    def loss_scale(self):
        return self._loss_scale

    @override
    def mean(self, value):
        return (value + sum(self._others)) / self.ranks.world_size

    @override
    def save(self, checkpoint_dir, *, frozen=True):
        torch.save(self.snapshot(), checkpoint_dir / "fake.pt")

    @override
    def save_async(self, checkpoint_dir, group, buffers, *, frozen=True):
        raise NotImplementedError

    @override
    def load(self, checkpoint_dir, *, optimizer, strict, frozen=True):
        self.restore(torch.load(checkpoint_dir / "fake.pt"))

    @override
    def snapshot(self, reuse=None):
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))

    @override
    def restore(self, snapshot, *, only_check=False):
        if only_check:
            return
        model, optimizer = snapshot
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)

    @override
    def describe(self):
        return "fake", "fp32"

    @override
    def destroy(self):
        self.calls.append(("destroy", None))


def build_engine(backend=None, *, lr_scheduler=None, monitors=None, **sections):
    """Build an engine on a fake backend, in the same way as `initialize`.

    Args:
        backend: backend of the engine; default: a `FakeBackend` with one rank.
        lr_scheduler: function that takes the optimizer and returns a scheduler, used if the config
            does not contain one.
        monitors: monitors that receive the events of every step.
        sections: sections of the config; ``train_micro_batch_size_per_gpu`` is 2 by default.
    """
    backend = backend or FakeBackend()
    sections["engine"] = CONFIG["engine"] | sections.get("engine", {})
    config = load_config(
        CONFIG | {"train_micro_batch_size_per_gpu": 2} | sections,
        world_size=backend.ranks.world_size,
    )
    if config.schedule is not None:
        scheduler = bind(config.schedule, backend.optimizer, horizon=config.horizon(None))
    else:
        scheduler = lr_scheduler and lr_scheduler(backend.optimizer)
    identity = build_identity(config, scheduler, read_hyperparameters(backend.optimizer))
    # The other ranks of a fake backend exist only as numbers, so there is no process group.
    with mock.patch("engine.training.data.gather_if_different", return_value=[]):
        return Engine(config, backend, scheduler, None, identity, monitors)
