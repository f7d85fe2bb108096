"""Run the LR range test on a training engine and restore its state afterwards."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from engine.engine import Engine
from engine.range_test.recorder import Recorder, Run, SweepOver
from engine.range_test.refinement import check_training_steps
from engine.range_test.report import LRRangeReport
from engine.range_test.sweep import Shape, Sweep
from engine.training.data import call_model
from schedules import from_config

__all__ = ["lr_range_test"]


def lr_range_test(
    trainer: Engine,
    batches: Iterable[Any],
    *,
    loss_fn: Callable[[Engine, Any], Tensor] | None = None,
    min_lr: float = 1e-6,
    max_lr: float = 10.0,
    steps: int = 250,
    shape: Shape = "exponential",
    momentum: tuple[float, float] | None = None,
    divergence_factor: float = 4.0,
    refine: bool = False,
    training_steps: int | None = None,
) -> LRRangeReport:
    """Train with increasing learning rates, suggest a range, and restore the initial state.

    Weights, buffers, optimizer, schedule, loss scale, counters and random states are restored bit
    for bit, even after an exception, so a second call measures the same curve. During the test, a
    boundary set by `set_gradient_accumulation_boundary` has no effect. Every rank must call this
    function; the loss is averaged over all ranks.

    With `refine`, short 1Cycle runs of `steps` steps follow the range test. They try five maximum
    learning rates around the suggestion, each twice the previous one, and more until the best one
    has a neighbor on each side. This is more reliable than reading the maximum from a curve, but
    takes five to ten times as long.

    Args:
        trainer: training engine from `engine.initialize`, not in the middle of a batch.
        batches: micro-batches; when they are exhausted, they are iterated again from the start.
        loss_fn: function that returns the loss for the engine and a batch. By default the model is
            called with the batch (a tuple or mapping is unpacked) and must return the loss.
        min_lr: learning rate of the first step.
        max_lr: learning rate of the last step.
        steps: number of steps, at least 2.
        shape: "exponential", "linear" or "staircase".
        momentum: first and last momentum; momentum decreases while the learning rate increases.
        divergence_factor: end the test when the smoothed loss is this many times its minimum.
        refine: whether to train short cycles around the suggestion.
        training_steps: number of steps of the planned training. If it is longer than the short
            cycles, the refined maximum is multiplied by ``(steps / training_steps) ** 0.32``; see
            `Refinement.max_lr`. None if it is as long as the short cycles.

    Returns:
        The loss curve, the suggested range and its confidence; see `LRRangeReport`.

    Raises:
        ValueError: if `batches` is empty, `min_lr` is not below `max_lr`, accumulation is in
            progress, or `training_steps` is given without `refine`.

    >>> import torch, engine
    >>> _ = torch.manual_seed(0)
    >>> config = {"train_batch_size": 4, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    >>> trainer, *_ = engine.initialize(config=config, model=torch.nn.Linear(2, 1))
    >>> def loss_fn(trainer, x):
    ...     return (trainer(x) - x.sum(1, keepdim=True)).pow(2).mean()
    >>> batches = torch.randn(8, 4, 2, generator=torch.Generator().manual_seed(0))
    >>> report = engine.lr_range_test(trainer, batches, loss_fn=loss_fn, min_lr=1e-5)
    >>> 0.01 < report.max_lr < 1, trainer.global_steps
    (True, 0)
    """
    sweep = Sweep(min_lr, max_lr, steps, shape, momentum, divergence_factor=divergence_factor)
    check_training_steps(refine, training_steps)
    loss_fn = loss_fn or call_model

    def run_trial(block: dict[str, Any], factor: float) -> Run:
        recorder = Recorder(steps, factor)
        with trainer._trial_run(recorder, from_config(block)):  # noqa: SLF001  # private to the package
            trainer.train()
            with contextlib.suppress(SweepOver):
                for batch in _repeat_forever(batches):
                    trainer.backward(loss_fn(trainer, batch))
                    trainer.step()
        return recorder.run

    report = LRRangeReport((run_trial(sweep.scheduler, divergence_factor),))
    if not refine:
        return report
    return report.refined(
        lambda block, _: run_trial(block, math.inf), steps=steps, training_steps=training_steps
    )


def _repeat_forever(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        count = 0
        for count, batch in enumerate(batches, start=1):  # noqa: B007  # used after the loop
            yield batch
        if count == 0:
            raise ValueError(
                "`batches` must yield at least one micro-batch, got none. Pass a list or a data "
                "loader; a generator can be iterated only once."
            )
