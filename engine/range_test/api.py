"""The LR range test as a function: on your engine, which is restored afterwards."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from engine.engine import Engine
from engine.range_test.recorder import Recorder, Run, SweepOver
from engine.range_test.refinement import refuse_updates
from engine.range_test.report import LRRangeReport
from engine.range_test.sweep import Shape, Sweep
from engine.training.data import called_on
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
    refine: bool = False,
    updates: int | None = None,
) -> LRRangeReport:
    """Train for some updates at rising learning rates, suggest bounds, and put everything back.

    Weights, buffers, optimizer, schedule, loss scale, counters and random numbers are restored bit
    for bit, also after an exception; a second call finds the same curve. A boundary set by
    `set_gradient_accumulation_boundary` does not hold inside. Every rank calls it: the loss is the
    mean over all of them.

    With `refine`, 1Cycles of `steps` updates follow, to five maxima a factor of 2 apart around the
    suggestion (and to more, until the best lies among them): what a range test can only read from a
    curve is tried. That takes five to ten times as long.

    Args:
        trainer: from `engine.initialize`, in any precision and on any backend, between steps.
        batches: micro-batches; begun again when they end.
        loss_of: from the engine and a batch to the loss; by default the model returns it, called
            with the batch (a tuple or a mapping is taken apart into its arguments).
        min_lr: learning rate of the first update.
        max_lr: learning rate of the last.
        steps: updates, at least 2.
        shape: "exponential", "linear" or "staircase".
        momentum: from what to what momentum falls while the learning rate grows.
        divergence: the test ends when the smoothed loss is this many times the lowest.
        refine: whether short cycles are trained around the suggestion.
        updates: of the training that is to follow; a refined maximum is lower the longer it is, by
            ``(steps / updates) ** 0.32`` (see `Refinement.max_lr`). None: as the short cycles.

    Returns:
        The curve, what it suggests and how sure that is; see `LRRangeReport`.

    Raises:
        ValueError: there are no batches, the bounds do not rise, an accumulation window has
            started, or `updates` is given without `refine`.

    >>> import torch, engine
    >>> _ = torch.manual_seed(0)
    >>> config = {"train_batch_size": 4, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    >>> trainer, *_ = engine.initialize(config=config, model=torch.nn.Linear(2, 1))
    >>> def loss_of(trainer, x):
    ...     return (trainer(x) - x.sum(1, keepdim=True)).pow(2).mean()
    >>> batches = torch.randn(8, 4, 2, generator=torch.Generator().manual_seed(0))
    >>> report = engine.lr_range_test(trainer, batches, loss_of=loss_of, min_lr=1e-5)
    >>> 0.01 < report.max_lr < 1, trainer.global_steps
    (True, 0)
    """
    sweep = Sweep(min_lr, max_lr, steps, shape, momentum, divergence=divergence)
    refuse_updates(refine, updates)
    loss_of = loss_of or called_on

    def run_trial(block: dict[str, Any], divergence: float) -> Run:
        recorder = Recorder(steps, divergence)
        with trainer._trial_run(recorder, from_config(block)):  # noqa: SLF001  # private to the package
            trainer.train()
            with contextlib.suppress(SweepOver):
                for batch in _without_end(batches):
                    trainer.backward(loss_of(trainer, batch))
                    trainer.step()
        return recorder.run

    report = LRRangeReport((run_trial(sweep.scheduler, divergence),))
    if not refine:
        return report
    return report.refined(lambda block, _: run_trial(block, math.inf), steps=steps, updates=updates)


def _without_end(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        count = 0
        for count, batch in enumerate(batches, start=1):  # noqa: B007  # whether there are any
            yield batch
        if count == 0:
            raise ValueError("`batches` must give micro-batches, but is empty or used up.")
