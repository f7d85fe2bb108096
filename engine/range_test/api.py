"""Run an LR range test with a training engine, and restore the engine's state afterwards."""

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
from engine.range_test.sweep import Shape, Sweep, read_initial_lrs, spread_over_groups
from engine.run.training_loops import preserve_state
from engine.training.data import call_model
from engine.training.device_moves import move_to_device
from schedules import Schedule, from_config

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
    """Run an LR range test: train with increasing learning rates, and suggest a range for 1Cycle.

    Afterwards, the weights, buffers, optimizer, schedule, loss scale, counters and RNG states are
    restored bit for bit, even after an exception. On the CPU, a second call therefore measures the
    same curve. On a GPU, rounding may differ. Every rank must call this function. The loss is
    averaged over all ranks. Calls to `set_gradient_accumulation_boundary` have no effect during the
    test.

    If `refine` is true, the range test is followed by short 1Cycle runs of `steps` steps each. The
    first five runs use 1/4, 1/2, 1, 2 and 4 times the suggested maximum learning rate. As long as
    the lowest final loss is at the smallest or the largest learning rate tried so far, further runs
    extend the range. The suggestion becomes more reliable, but the call takes five to ten times as
    long.

    If param groups have different learning rates, all of them are multiplied by the same factor.
    The learning rates in the arguments and in the report are those of the first group. The
    suggested scheduler block contains a list with one value per group.

    Args:
        trainer: training engine from `engine.initialize`. Gradient accumulation must not be in
            progress.
        batches: iterable of micro-batches. It is iterated as often as needed.
        loss_fn: function that takes the engine and a micro-batch and returns the loss. By default,
            the model is called with the micro-batch and must return the loss. A tuple, list or
            mapping is unpacked into the model's arguments.
        min_lr: learning rate of the first step.
        max_lr: learning rate of the last step.
        steps: number of steps, at least 2.
        shape: shape of the increase: "exponential", "linear" or "staircase".
        momentum: momentum of the first step and of the last step; it changes linearly in between.
            By default, the momentum stays constant.
        divergence_factor: maximum ratio of the smoothed loss to its previous minimum; a larger
            ratio ends the test.
        refine: whether to refine the suggestion with short 1Cycle runs.
        training_steps: number of steps in the planned training run; default: `steps`. If it is
            larger than `steps`, the refined maximum is multiplied by
            ``(steps / training_steps) ** 0.32``; see `Refinement.max_lr`.

    Returns:
        Report with the loss curve and the suggested learning-rate range.

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

    lrs = read_initial_lrs(trainer._backend.optimizer.param_groups)  # noqa: SLF001  # private to the package

    def run_trial(block: dict[str, Any], factor: float) -> Run:
        recorder = Recorder(steps, factor, facts={"lrs": lrs, "steps": steps})
        with _trial_run(trainer, recorder, from_config(spread_over_groups(block, lrs))):
            trainer.train()
            with contextlib.suppress(SweepOver):
                for batch in _repeat_forever(batches):
                    moved = move_to_device(batch, trainer.device)
                    trainer.backward(loss_fn(trainer, moved))
                    trainer.step()
        return recorder.run

    report = LRRangeReport((run_trial(sweep.scheduler, divergence_factor),))
    if not refine:
        return report
    return report.refine(
        lambda block, _: run_trial(block, math.inf), steps=steps, training_steps=training_steps
    )


@contextlib.contextmanager
def _trial_run(trainer: Engine, recorder: Recorder, schedule: Schedule[Any]) -> Iterator[None]:
    """Use ``schedule`` inside this context, and restore the training state on exit.

    ``recorder`` records every step inside the context.
    """
    run = trainer._run  # noqa: SLF001  # private to the package
    run.accumulation.check_between_steps()
    run.settle()  # before the snapshot, which contains the learning rate of the next step
    with preserve_state(trainer, trainer._backend, trainer.training_dataloader):  # noqa: SLF001  # private to the package
        try:
            trainer._run = run.start_trial(recorder, schedule)  # noqa: SLF001  # private to the package
            yield
        finally:
            trainer._run = run  # noqa: SLF001  # private to the package


def _repeat_forever(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        count = 0
        for count, batch in enumerate(batches, start=1):  # noqa: B007  # used after the loop
            yield batch
        if count == 0:
            raise ValueError(
                "`batches` must yield at least one micro-batch each time it is iterated, got 0. "
                "Pass a list or a data loader, because a generator can be iterated only once."
            )
