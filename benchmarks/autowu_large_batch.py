"""Compare AutoWU with other ways to choose a learning rate for large batches.

    python benchmarks/autowu_large_batch.py --output docs/results/autowu_large_batch.png

The script trains LeNet (without normalization) and a small ResNet (with batch normalization) on
Fashion-MNIST, with images downsampled to 14 x 14. All runs use AdamW and the same number of epochs,
with batch sizes of 256, 2,048 and 8,192. The methods are

- fixed: the same constant learning rate for all batch sizes (the best of three at batch size 256);
- scaled: the learning rate of "fixed" times batch size / 256;
- cosine: warmup to the learning rate of "scaled" over a tenth of the run, then cosine decay to 0;
- 1Cycle: OneCycle between the bounds that an LR range test suggests for the batch size;
- refined: the same, but short 1Cycle runs refine the maximum, as with ``lr-test --refine``;
- AutoWU: AutoWU with its robust test for a minimum of the loss, and with rollback to the weights at
  that minimum; no hyperparameter is tuned;
- AutoWU 1/4: the same, with a warmup of at most a quarter of the run instead of half.

"refined" and "AutoWU 1/4" are not run with batch size 256, because they are meant to improve on
1Cycle and AutoWU for large batches.

The results are saved in a JSON file next to the plot. Results that already exist are reused.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples" / "fashion_mnist"))

import images

import engine
from engine.range_test.recorder import Run
from engine.range_test.refinement import build_short_cycle, refine

BATCHES = (256, 2048, 8192)
METHODS = ("fixed", "scaled", "cosine", "1Cycle", "refined", "AutoWU", "AutoWU 1/4")
ONLY_LARGE = ("refined", "AutoWU 1/4")
CYCLE_STEPS = 32
"""Number of steps in each of the short 1Cycle runs that refine the maximum learning rate."""
CANDIDATES = (1e-3, 2e-3, 4e-3)


def build_lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(16 * 2 * 2, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


class Block(nn.Module):
    """Residual block: two convolutions with batch normalization, and a 1x1 shortcut."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        self.shortcut = nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) + self.shortcut(x)).relu()


def build_resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        Block(8, 16, 1), Block(16, 32, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, 10),
    )  # fmt: skip


NETS = {"LeNet": build_lenet, "ResNet": build_resnet}


def loss_fn(trainer: engine.Engine, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(trainer(batch[0]), batch[1])


class Experiment:
    """The benchmark's dataset, and functions that train models on it."""

    def __init__(self, epochs: int, samples: int | None) -> None:
        found = images.load()
        self.epochs = epochs
        self.source = found.source.split(" from")[0]
        parts = [
            (avg_pool2d(x[:samples], 2) - 0.29, y[:samples])
            for x, y in (found.train.tensors, found.test.tensors)
        ]
        (x, y), self.test = parts
        held_out = len(x) // 12
        self.valid, self.train = (x[:held_out], y[:held_out]), (x[held_out:], y[held_out:])

    def iterate_batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            for part in torch.randperm(len(self.train[0])).split(size)[: self.count_steps(size)]:
                yield self.train[0][part], self.train[1][part]

    def count_steps(self, size: int) -> int:
        return max(1, len(self.train[0]) // size)

    def build_engine(
        self, net: str, seed: int, lr: float, block: dict[str, Any] | None
    ) -> engine.Engine:
        torch.manual_seed(seed)
        config: dict[str, Any] = {
            "train_batch_size": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": lr, "weight_decay": 0.01}},
        }
        if block:
            config["scheduler"] = block
        return engine.initialize(config=config, model=NETS[net]())[0]

    def measure_accuracy(
        self,
        net: str,
        seed: int,
        size: int,
        lr: float,
        block: dict[str, Any] | None,
        *,
        valid: bool,
    ) -> tuple[float, str]:
        trainer = self.build_engine(net, seed, lr, block)
        batches = self.iterate_batches(size)
        for _ in range(self.epochs * self.count_steps(size)):
            trainer.backward(loss_fn(trainer, next(batches)))
            trainer.step()
        trainer.eval()
        inputs, labels = self.valid if valid else self.test
        with torch.no_grad():
            correct = sum(
                int((trainer(x).argmax(1) == y).sum())
                for x, y in zip(inputs.split(2000), labels.split(2000), strict=True)
            )
        decision = getattr(trainer.lr_scheduler, "decision", None)
        note = f"{decision.lr:.2g} at {decision.step}" if decision else ""
        return 100 * correct / len(labels), note

    def suggest_max_lr(self, net: str, size: int) -> float:
        trainer = self.build_engine(net, 100, 1e-3, None)
        report = engine.lr_range_test(
            trainer, self.iterate_batches(size), loss_fn=loss_fn, min_lr=1e-5, max_lr=1.0, steps=120
        )
        assert report.suggestion.max_lr is not None, report.suggestion.reason
        return report.suggestion.max_lr

    def refine_max_lr(self, net: str, size: int, max_lr: float) -> float:
        """Refine the suggested ``max_lr`` with short 1Cycle runs, and return the result."""

        def train_cycle(block: dict[str, Any], repeat: int) -> Run:
            trainer = self.build_engine(net, 100 + repeat, 1e-3, block)
            losses = []
            for batch in itertools.islice(self.iterate_batches(size), CYCLE_STEPS):
                loss = loss_fn(trainer, batch)
                losses.append(loss.item())
                trainer.backward(loss)
                trainer.step()
            return Run(losses=losses)

        steps = self.epochs * self.count_steps(size)
        block = self.build_block("1Cycle", size, max_lr)
        found = refine(
            lambda max_lr, repeat: train_cycle(
                build_short_cycle(block, max_lr, CYCLE_STEPS), repeat
            ),
            max_lr,
            repeats=1,
            steps=CYCLE_STEPS,
            training_steps=steps,
        )
        return found.max_lr

    def build_block(self, method: str, size: int, lr: float) -> dict[str, Any] | None:
        steps = self.epochs * self.count_steps(size)
        if method == "cosine":
            params: dict[str, Any] = {"total_num_steps": steps, "warmup_num_steps": steps // 10}
            params |= {"warmup_type": "linear", "cos_min_ratio": 0.0, "warmup_min_ratio": 0.0}
            return {"type": "WarmupCosineLR", "params": params}
        if method in ("1Cycle", "refined"):
            first = steps * 3 // 10
            params = {"cycle_min_lr": lr / 10, "cycle_max_lr": lr, "cycle_first_step_size": first}
            params["cycle_second_step_size"] = steps - first
            return {"type": "OneCycle", "params": params}
        if method in ("AutoWU", "AutoWU 1/4"):
            params = {
                "steps_per_epoch": self.count_steps(size),
                "total_epochs": self.epochs,
            }
            params |= {"test": "robust", "rollback": True, "immediate_cooldown": True}
            if method == "AutoWU 1/4":
                params["max_warmup_fraction"] = 0.25
            return {"type": "AutoWU", "params": params}
        return None


def choose_learning_rate(
    found: Experiment, rows: dict[str, Any], net: str, method: str, size: int
) -> float:
    key = f"{net} tuned"
    if key not in rows:
        tried = {
            lr: found.measure_accuracy(net, 0, 256, lr, None, valid=True)[0] for lr in CANDIDATES
        }
        rows[key] = max(tried, key=tried.__getitem__)
    tuned = float(rows[key])
    if method in ("1Cycle", "refined"):
        key = f"{net} {size} suggested"
        if key not in rows:
            rows[key] = found.suggest_max_lr(net, size)
        if method == "1Cycle":
            return float(rows[key])
        refined = f"{net} {size} refined"
        if refined not in rows:
            rows[refined] = found.refine_max_lr(net, size, rows[key])
        return float(rows[refined])
    return tuned if method == "fixed" else tuned * size / 256


def report_results(
    rows: dict[str, Any], nets: list[str], seeds: int, path: Path, console: Console
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(nets), 4), layout="constrained")
    axes = figure.subplots(1, len(nets), squeeze=False)[0]
    for axis, net in zip(axes, nets, strict=True):
        table = Table(net, *map(str, BATCHES))
        for method in METHODS:
            cells = []
            for size in BATCHES:
                keys = [f"{net} {size} {method} {seed}" for seed in range(seeds)]
                cells.append([rows[key][0] for key in keys if key in rows])
            shown = [" ".join(f"{value:.1f}" for value in cell) or "-" for cell in cells]
            table.add_row(method, *shown)
            means = [statistics.mean(cell) if cell else float("nan") for cell in cells]
            [line] = axis.plot(BATCHES, means, marker="o", label=method)
            for size, cell in zip(BATCHES, cells, strict=True):
                axis.scatter([size] * len(cell), cell, s=8, color=line.get_color(), alpha=0.6)
        console.print(table)
        axis.set(xscale="log", xlabel="batch", ylabel="test accuracy %", title=net)
        axis.set_xticks(BATCHES, [f"{size:,}" for size in BATCHES])
        axis.minorticks_off()
        axis.set_ylim(bottom=max(axis.get_ylim()[0], 75))
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("autowu_large_batch.png"))
    parser.add_argument(
        "--smoke", action="store_true", help="use only a few samples and one network"
    )
    args = parser.parse_args()
    if args.smoke:
        args.epochs = 40
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    found, console = Experiment(args.epochs, 128 if args.smoke else None), Console(width=110)
    nets = ["LeNet"] if args.smoke else list(NETS)
    path = args.output.with_suffix(".json")
    rows: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    for net in nets:
        for seed in range(args.seeds):
            for size in BATCHES:
                for method in METHODS:
                    key = f"{net} {size} {method} {seed}"
                    if key in rows or (method in ONLY_LARGE and size == BATCHES[0]):
                        continue
                    start = time.monotonic()
                    lr = choose_learning_rate(found, rows, net, method, size)
                    block = found.build_block(method, size, lr)
                    rows[key] = found.measure_accuracy(net, seed, size, lr, block, valid=False)
                    path.write_text(json.dumps(rows, indent=1) + "\n")
                    console.print(
                        key, f"lr {lr:.2g}", *rows[key], f"{time.monotonic() - start:.0f} s"
                    )
    report_results(rows, nets, args.seeds, args.output, console)


if __name__ == "__main__":
    main()
