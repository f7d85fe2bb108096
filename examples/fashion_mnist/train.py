"""Train LeNet from ds_config.json, in one process or with torchrun.

python examples/fashion_mnist/train.py
torchrun --nproc_per_node 2 examples/fashion_mnist/train.py
"""

from __future__ import annotations

import argparse
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import images
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import engine
from engine.display.plots import draw

HERE = Path(__file__).parent


def lenet() -> nn.Module:
    """Build LeNet with ReLU and max pooling."""
    return nn.Sequential(
        nn.Conv2d(1, 6, kernel_size=5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, kernel_size=5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 5 * 5, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )


@torch.no_grad()
def compute_accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Return the fraction of samples that the model classifies correctly."""
    model.eval()
    parts = zip(*(torch.split(tensor, 1000) for tensor in data.tensors), strict=True)
    correct = sum(int((model(x).argmax(1) == y).sum()) for x, y in parts)
    model.train()
    return correct / len(data)


def build_progress_bar(console: Console) -> Progress:
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  lr {task.fields[lr]:.2e}"),
        TextColumn("momentum {task.fields[momentum]:.3f}  {task.fields[speed]:,.0f} samples/s"),
        TimeRemainingColumn(),
        console=console,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", default=HERE / "ds_config.json", help="path of the config")
    parser.add_argument(
        "--steps", type=int, default=3000, help="number of optimizer steps (default: 3000)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("run"), help="directory for the plot")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    data = images.load()
    trainer, _, loader, _ = engine.initialize(
        config=args.config, model=lenet(), training_data=data.train
    )
    first = trainer.global_rank == 0
    console = Console(quiet=not first)
    console.print(
        f"Training on {data.source}: {len(data.train):,} training images, "
        f"{len(data.test):,} test images."
    )

    used: dict[str, list[float]] = {"lr": [], "momentum": [], "loss": []}
    window = 0.0
    fields: dict[str, Any] = {"loss": float("nan"), "lr": 0.0, "momentum": 0.0, "speed": 0.0}
    with build_progress_bar(console) as bar:
        done = trainer.global_steps  # above 0 if the run was resumed
        task = bar.add_task("training", total=args.steps, completed=done, **fields)
        for x, y in chain.from_iterable(repeat(loader)):
            if trainer.global_steps == args.steps:
                break
            lr, momentum = trainer.get_lr()[0], (trainer.get_momentum() or [0.0])[0]
            loss = cross_entropy(trainer(x.to(trainer.device)), y.to(trainer.device))
            trainer.backward(loss)
            window += loss.item() / trainer.gradient_accumulation_steps()
            if trainer.step():
                for name, value in (("lr", lr), ("momentum", momentum), ("loss", window)):
                    used[name].append(value)
                window = 0.0
                speed = (bar.tasks[task].speed or 0.0) * trainer.train_batch_size()
                bar.update(
                    task, advance=1, loss=used["loss"][-1], lr=lr, momentum=momentum, speed=speed
                )

    found = compute_accuracy(trainer.module, data.test)  # on all ranks: ZeRO-3 gathers layers
    if first:
        picture = args.output / "lr_momentum_loss.png"
        draw(used, picture, f"LeNet on {data.source.partition(' from')[0].partition(' (')[0]}")
        console.print(f"Test accuracy: {found:.4f}")
        console.print(f"Plot of learning rate, momentum and loss: {picture.resolve()}")


if __name__ == "__main__":
    main()
