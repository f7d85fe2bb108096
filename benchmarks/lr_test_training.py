"""Compare the maximum learning rates suggested by LR range tests with a grid of nine maxima.

    python benchmarks/lr_test_training.py --output docs/results/lr_test_training.png

The suggestions are those of ``onecycle lr-test --repeat 3``, with and without refinement
(``--refine --training-steps``). There are three tasks: LeNet on Fashion-MNIST (or on scikit-learn's
digits if Fashion-MNIST is not available), an MLP on the digits, and a small transformer that
predicts the next character in the source code and docs of this repository. Each task is trained
with 1Cycle schedules that have different maximum learning rates: the two suggestions, and a grid of
nine values half a decade apart. Each schedule starts at a tenth of its maximum, and is used with
several seeds. Accuracy is measured on held-out data.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "fashion_mnist")]

import images
from train import lenet

import engine
from engine.range_test.recorder import Run
from engine.range_test.report import LRRangeReport
from schedules.plots import STYLE

STEPS, REPEATS = 250, 3
GRID = tuple(10 ** (exponent / 2) for exponent in range(-8, 1))
CONTEXT, WIDTH = 64, 64

Batch = tuple[Tensor, Tensor]
Cells = dict[float, list[float]]
"""Maps each maximum learning rate to the accuracies of the runs that use it."""


@dataclass(frozen=True)
class Task:
    """A model with its optimizer, data and number of training steps."""

    model: Callable[[], nn.Module]
    optimizer: dict[str, Any]
    training_steps: int
    batches: Callable[[], Iterator[Batch]]
    test: Batch


class Transformer(nn.Module):
    """A character-level Transformer language model with two layers."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, WIDTH)
        self.positions = nn.Parameter(torch.zeros(CONTEXT, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, characters)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layers(self.embedding(x) + self.positions, mask=self.mask, is_causal=True)
        return self.head(hidden).flatten(0, 1)


def make_batches(train: Batch, size: int) -> Callable[[], Iterator[Batch]]:
    def batches() -> Iterator[Batch]:
        while True:
            for part in torch.randperm(len(train[0])).split(size)[:-1]:
                yield train[0][part], train[1][part]

    return batches


def build_text_task() -> Task:
    paths = sorted((*ROOT.glob("schedules/*.py"), *ROOT.glob("docs/**/*.md")))
    text = "".join(path.read_text(encoding="utf-8") for path in paths)
    alphabet = {character: index for index, character in enumerate(sorted(set(text)))}
    data = torch.tensor([alphabet[character] for character in text])
    split = len(data) * 9 // 10

    def windows(tokens: Tensor, starts: Tensor) -> Batch:
        rows = tokens[starts[:, None] + torch.arange(CONTEXT + 1)]
        return rows[:, :-1], rows[:, 1:].flatten()

    def batches() -> Iterator[Batch]:
        while True:
            yield windows(data[:split], torch.randint(split - CONTEXT - 1, (16,)))

    held_out = data[split:]
    test = windows(held_out, torch.arange(0, len(held_out) - CONTEXT - 1, CONTEXT))
    optimizer = {"type": "AdamW", "params": {"weight_decay": 0.01}}
    return Task(lambda: Transformer(len(alphabet)), optimizer, 500, batches, test)


def build_tasks() -> dict[str, Task]:
    pictures = images.load()
    train, test = pictures.train.tensors, pictures.test.tensors
    digits = images._load_digits()
    small, held_out = digits.train.tensors, digits.test.tensors
    adam = {"type": "AdamW", "params": {"weight_decay": 0.01}}
    sgd = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}

    def mlp() -> nn.Module:
        return nn.Sequential(
            nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
            nn.Linear(64, 10),
        )  # fmt: skip

    return {
        f"LeNet, {pictures.source.split(' from')[0]}, AdamW": Task(
            lenet, adam, 600, make_batches(train, 64), test
        ),
        "MLP, digits, SGD": Task(mlp, sgd, 300, make_batches(small, 32), held_out),
        "transformer, text, AdamW": build_text_task(),
    }


def loss_fn(trainer: engine.Engine, batch: Batch) -> Tensor:
    return cross_entropy(trainer(batch[0]), batch[1])


def build_engine(task: Task, seed: int, scheduler: dict[str, Any] | None) -> engine.Engine:
    torch.manual_seed(seed)
    config: dict[str, Any] = {"train_batch_size": 1, "optimizer": task.optimizer}
    if scheduler:
        config["scheduler"] = scheduler
    trainer, *_ = engine.initialize(config=config, model=task.model())
    return trainer


def suggest_maxima(task: Task, seed: int) -> dict[str, float]:
    """Return the maximum learning rates that range tests suggest, without and with refinement."""
    runs = []
    for repeat in range(REPEATS):
        trainer = build_engine(task, seed + repeat, None)
        runs += engine.lr_range_test(trainer, task.batches(), loss_fn=loss_fn, steps=STEPS).runs
    report = LRRangeReport(tuple(runs))
    assert report.max_lr is not None, report.suggestion.reason

    def train(block: dict[str, Any], repeat: int) -> Run:
        trainer = build_engine(task, seed + repeat, block)
        return Run(losses=train_engine(trainer, task, STEPS))

    known = build_one_cycle(report.max_lr, task.training_steps)
    refined = report.refine(train, steps=STEPS, training_steps=task.training_steps, known=known)
    assert refined.max_lr is not None
    return {"range test": report.max_lr, "refined": refined.max_lr}


def build_one_cycle(max_lr: float, training_steps: int) -> dict[str, Any]:
    first = training_steps * 3 // 10
    params = {
        "cycle_min_lr": max_lr / 10,
        "cycle_max_lr": max_lr,
        "cycle_first_step_size": first,
        "cycle_second_step_size": training_steps - first,
    }
    return {"type": "OneCycle", "params": params}


def train_engine(trainer: engine.Engine, task: Task, training_steps: int) -> list[float]:
    """Train an engine, and return the loss of each step."""
    losses = []
    batches = task.batches()
    for _ in range(training_steps):
        loss = loss_fn(trainer, next(batches))
        losses.append(loss.item())
        trainer.backward(loss)
        trainer.step()
    return losses


def measure_accuracy(task: Task, max_lr: float, seed: int) -> float:
    trainer = build_engine(task, seed, build_one_cycle(max_lr, task.training_steps))
    train_engine(trainer, task, task.training_steps)
    trainer.eval()
    with torch.no_grad():
        parts = zip(task.test[0].split(500), _split_targets(task, 500), strict=True)
        correct = sum(int((trainer(x).argmax(1) == y).sum()) for x, y in parts)
    return 100 * correct / len(task.test[1])


def _split_targets(task: Task, size: int) -> tuple[Tensor, ...]:
    return task.test[1].split(size * (len(task.test[1]) // len(task.test[0])))


def standard_error(values: list[float]) -> float:
    """Return the standard error of the mean of the values."""
    return statistics.stdev(values) / math.sqrt(len(values))


def compare_with_grid(mine: list[float], top: list[float], lr: float, threshold: float) -> str:
    """Return a table cell that compares a suggested learning rate with the best one in the grid.

    Args:
        mine: accuracies of the runs with the suggested learning rate.
        top: accuracies of the runs with the best learning rate in the grid, for the same seeds.
        lr: suggested maximum learning rate.
        threshold: lowest mean accuracy at which the suggestion counts as equally good.
    """
    pairs = [own - other for own, other in zip(mine, top, strict=True)]
    off = f"{statistics.mean(pairs):+.2f} ± {standard_error(pairs):.2f}"
    verdict = "reached" if statistics.mean(mine) >= threshold else "missed"
    return f"{statistics.mean(mine):.2f} at {lr:.1e} ({off}), {verdict}"


def draw(found: dict[str, Cells], best: dict[str, dict[str, float]], path: Path) -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        axes = figure.subplots(1, len(found), squeeze=False)[0]
        for axis, (name, cells) in zip(axes, found.items(), strict=True):
            grid = {lr: accuracies for lr, accuracies in cells.items() if lr in GRID}
            means = [statistics.mean(accuracies) for accuracies in grid.values()]
            spread = [statistics.stdev(accuracies) for accuracies in grid.values()]
            axis.errorbar(list(grid), means, spread, marker="o", label="grid")
            for number, (way, lr) in enumerate(best[name].items()):
                mine, error = statistics.mean(cells[lr]), statistics.stdev(cells[lr])
                axis.errorbar(lr, mine, error, marker="s", color=f"C{number + 1}", label=way)
            axis.set(xscale="log", title=name)
        axes[0].legend()
        figure.supxlabel("cycle_max_lr", fontsize="medium")
        figure.supylabel("accuracy in percent", fontsize="medium")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--seeds", type=int, default=4, help="runs per maximum learning rate (default: 4)"
    )
    parser.add_argument(
        "--first-seed",
        type=int,
        default=0,
        help="seed of the first run at each maximum learning rate; each later run uses the next "
        "seed (default: 0)",
    )
    parser.add_argument("--task", default="", help="run only the tasks whose names start with TASK")
    parser.add_argument("--output", type=Path, default=Path("lr_test_training.png"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    console = Console()
    found: dict[str, Cells] = {}
    best: dict[str, dict[str, float]] = {}
    with Progress(console=console, transient=True) as bar:
        chosen = {name: task for name, task in build_tasks().items() if name.startswith(args.task)}
        for name, task in chosen.items():
            best[name] = suggest_maxima(task, seed=args.first_seed + 100)
            maxima = list(dict.fromkeys((*GRID, *best[name].values())))
            row = bar.add_task(name, total=len(maxima) * args.seeds)
            found[name] = {}
            for lr in maxima:
                found[name][lr] = []
                for seed in range(args.first_seed, args.first_seed + args.seeds):
                    found[name][lr].append(measure_accuracy(task, lr, seed))
                    bar.advance(row)
    table = Table("task", *(f"{lr:.1e}" for lr in GRID), "best - 1 SE", *next(iter(best.values())))
    for name, cells in found.items():
        means = {lr: statistics.mean(accuracies) for lr, accuracies in cells.items()}
        top = max(GRID, key=lambda lr, means=means: means[lr])
        threshold = means[top] - standard_error(cells[top])
        grid = (f"{means[lr]:.2f}" for lr in GRID)
        verdicts = (
            compare_with_grid(cells[lr], cells[top], lr, threshold) for lr in best[name].values()
        )
        table.add_row(name, *grid, f"{threshold:.2f}", *verdicts)
    Console(width=260).print(table)
    draw(found, best, args.output)


if __name__ == "__main__":
    main()
