"""Compare onecycle's LR suggestions with those of Lightning and torch-lr-finder.

    pip install -c constraints.txt -e '.[benchmarks]'
    python benchmarks/lr_test_rules.py

The script uses 1,000 synthetic loss curves from five families at five noise levels, and 200 curves
on which the loss does not fall. A noise level is the standard deviation of the noise as a fraction
of the total drop in the loss. Each tool receives the same losses, and smooths and evaluates them
with its own code. A suggestion is correct if it differs from the true value by less than a factor
of 3.

For onecycle's suggested maximum learning rate, the true value is the middle of the region in which
the loss without noise exceeds its minimum by less than 5% of the total drop. For the rule
"steepest", the only one that the other tools have, the true value is the learning rate at which the
loss falls most steeply as a function of log(lr).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from pytorch_lightning.tuner.lr_finder import _LRCallback, _LRFinder
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch_lr_finder import LRFinder

sys.path.insert(0, str(Path(__file__).parent.parent))

from engine.range_test.suggestion import suggest
from tests.testing.planted_losses import FAMILIES, Curve, flat, plant

NOISE = (0.0, 0.02, 0.05, 0.1, 0.2)
FLAT = ("noise", "rises")


def maximum(curve: Curve) -> float | None:
    return suggest(curve.lrs, curve.losses).max_lr


def steepest(curve: Curve) -> float | None:
    return suggest(curve.lrs, curve.losses).rules.get("steepest")


def lightning(curve: Curve) -> float | None:
    callback = _LRCallback(len(curve.lrs), early_stop_threshold=4.0)
    trainer: Any = SimpleNamespace(
        fit_loop=SimpleNamespace(batch_idx=0),
        accumulate_grad_batches=1,
        strategy=SimpleNamespace(broadcast=lambda value: value),
        should_stop=False,
        global_step=0,
    )
    module: Any = None
    for step, loss in enumerate(curve.losses, start=1):
        trainer.global_step = step
        callback.on_train_batch_end(trainer, module, {"loss": torch.tensor(loss)}, None, step)
        if trainer.should_stop:
            break
    finder = _LRFinder("exponential", curve.lrs[0], curve.lrs[-1], len(curve.lrs))
    count = len(callback.losses)
    finder.results = {"lr": list(curve.lrs[:count]), "loss": callback.losses}
    return finder.suggestion()


class _Planted(LRFinder):
    """LR finder from torch-lr-finder that reads the losses from a curve instead of training."""

    def __init__(self, curve: Curve) -> None:
        model = torch.nn.Linear(1, 1)
        super().__init__(model, torch.optim.SGD(model.parameters(), lr=curve.lrs[0]), None)
        self._losses = iter(curve.losses)

    def _train_batch(self, *args: object, **kwargs: object) -> float:
        del args, kwargs
        return float(next(self._losses))


def torch_lr_finder(curve: Curve) -> float | None:
    finder = _Planted(curve)
    batches = torch.utils.data.DataLoader(torch.zeros(len(curve.lrs), 1, 1))
    figure, axes = plt.subplots()
    try:
        finder.range_test(batches, end_lr=curve.lrs[-1], num_iter=len(curve.lrs), step_mode="exp")
        return finder.plot(ax=axes)[1]
    except (RuntimeError, ValueError):
        return None
    finally:
        plt.close(figure)


CONTENDERS: dict[str, Callable[[Curve], float | None]] = {
    "onecycle, maximum": maximum,
    "onecycle, steepest": steepest,
    "Lightning": lightning,
    "torch-lr-finder": torch_lr_finder,
}


def call_quietly(contender: Callable[[Curve], float | None], curve: Curve) -> float | None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return contender(curve)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--curves",
        type=int,
        default=1000,
        help="number of curves with a decreasing loss (default: 1000)",
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    plt.switch_backend("agg")
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    random = np.random.default_rng(args.seed)
    count = args.curves // (len(NOISE) * len(FAMILIES))
    correct = {name: np.zeros(len(NOISE)) for name in CONTENDERS}
    by_family = {name: dict.fromkeys(FAMILIES, 0.0) for name in CONTENDERS}
    for level, noise in enumerate(track(NOISE, transient=True)):
        for family in FAMILIES:
            for curve in (plant(family, noise, random) for _ in range(count)):
                for name, contender in CONTENDERS.items():
                    lr = call_quietly(contender, curve)
                    true_lr = curve.lowest if contender is maximum else curve.steepest
                    good = lr is not None and 1 / 3 < lr / true_lr < 3
                    correct[name][level] += good / (count * len(FAMILIES))
                    by_family[name][family] += good / (count * len(NOISE))
    rejected = dict.fromkeys(CONTENDERS, 0)
    for kind in FLAT:
        for curve in (flat(kind, random) for _ in range(100)):
            for name, contender in CONTENDERS.items():
                rejected[name] += call_quietly(contender, curve) is None
    console = Console()
    table = Table("fraction correct at noise level", *(f"{noise:.0%}" for noise in NOISE), "all")
    for name, fractions in correct.items():
        table.add_row(name, *(f"{fraction:.1%}" for fraction in (*fractions, fractions.mean())))
    console.print(table)
    table = Table("fraction correct per family", *FAMILIES, "no suggestion on flat curves")
    for name, fractions in by_family.items():
        cells = (f"{fraction:.1%}" for fraction in fractions.values())
        table.add_row(name, *cells, f"{rejected[name]} of {100 * len(FLAT)}")
    console.print(table)


if __name__ == "__main__":
    main()
