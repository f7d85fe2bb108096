"""The range test as a call: on an engine of one's own, which is afterwards as it was before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from engine.data import called_on
from engine.engine import Engine
from engine.lr_range.report import LRRangeReport
from engine.lr_range.sweep import Recorder, Shape, Sweep, SweepOver
from schedules import from_config

__all__ = ["lr_range_test"]


def lr_range_test(
    trainer: Engine,
    batches: Iterable[Any],
    *,
    loss_of: Callable[[Engine, Any], Tensor] | None = None,
    min_lr: float = 1e-6,
    max_lr: float = 10.0,
    steps: int = 250,
    shape: Shape = "exponential",
    momentum: tuple[float, float] | None = None,
    divergence: float = 4.0,
) -> LRRangeReport:
    """Train for some updates at rising learning rates, suggest bounds, and put everything back.

    Weights, buffers, optimizer, schedule, loss scale, counters and random numbers are afterwards
    bit for bit what they were, also after an exception; a second call finds the same curve. Every
    rank calls it: the loss is the mean over all of them.

    Args:
        trainer: from `engine.initialize`, in any precision and on any backend, between updates.
        batches: micro-batches; begun again when they end.
        loss_of: from the engine and a batch to the loss; by default the model returns it, called
            with the batch (a tuple or a mapping is taken apart into its arguments).
        min_lr: learning rate of the first update.
        max_lr: learning rate of the last.
        steps: updates, at least 2.
        shape: "exponential", "linear" or "staircase".
        momentum: from what to what momentum falls while the learning rate grows.
        divergence: the test ends when the smoothed loss is this many times the lowest.

    Returns:
        The curve, what it suggests and how sure that is; see `LRRangeReport`.

    Raises:
        ValueError: there are no batches, the bounds do not rise, or an update is begun.

    >>> import torch, engine
    >>> _ = torch.manual_seed(0)
    >>> config = {"train_batch_size": 4, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    >>> trainer, *_ = engine.initialize(config=config, model=torch.nn.Linear(2, 1))
    >>> def loss_of(trainer, x):
    ...     return (trainer(x) - x.sum(1, keepdim=True)).pow(2).mean()
    >>> batches = torch.randn(8, 4, 2, generator=torch.Generator().manual_seed(0))
    >>> report = engine.lr_range_test(trainer, batches, loss_of=loss_of, min_lr=1e-5)
    >>> 0.01 < report.suggestion.max_lr < 1, trainer.global_steps
    (True, 0)
    """
    sweep = Sweep(min_lr, max_lr, steps, shape, momentum, divergence=divergence)
    recorder = Recorder(steps, divergence)
    loss_of = loss_of or called_on
    with trainer.rehearsal(recorder, from_config(sweep.scheduler)):
        trainer.train()
        try:
            for batch in _without_end(batches):
                trainer.backward(loss_of(trainer, batch))
                trainer.step()
        except SweepOver:
            pass
    return LRRangeReport((recorder.run,))


def _without_end(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        count = 0
        for count, batch in enumerate(batches, start=1):  # noqa: B007  # whether there are any
            yield batch
        if count == 0:
            raise ValueError("`batches` must give micro-batches, but is empty or used up.")
