"""Train LeNet with the settings in ds_config.json, in one process or with torchrun.

python examples/fashion_mnist/train.py
torchrun --nproc_per_node 2 examples/fashion_mnist/train.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import images
import torch
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


def smooth(values: list[float], count: int = 50) -> list[float]:
    """Return the moving average of the values over windows of up to ``count`` values."""
    windows = (values[max(0, end - count) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]


def plot(used: dict[str, list[float]], path: Path, title: str) -> None:
    """Plot the learning rate, the momentum and the loss of each step."""
    losses = used.pop("loss")
    columns = used | {"loss.of the batch": losses, "loss.mean of 50 steps": smooth(losses)}
    figure = draw(columns, path, title)
    axis = figure.axes[-1]
    axis.set_yscale("log")
    axis.lines[0].set(alpha=0.3, linewidth=0.8)  # single batches vary more than the mean
    axis.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--config",
        type=Path,
        help="path of the config (default: ds_config.json, or digits.json if Fashion-MNIST is not "
        "available)",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("run"), help="directory for the plot")
    args = engine.add_schedule_arguments(parser).parse_args()

    torch.manual_seed(args.seed)
    data = images.load()
    name = "ds_config.json" if data.source.startswith("Fashion-MNIST") else "digits.json"
    trainer, *_ = engine.initialize(
        args, config=args.config or HERE / name, model=lenet(), training_data=data.train
    )
    if trainer.global_rank == 0:
        print(
            f"Training on {data.source}: {len(data.train):,} training images, "
            f"{len(data.test):,} test images."
        )
    used: dict[str, list[float]] = {"lr": [], "momentum": [], "loss": []}
    window = 0.0
    for x, y in trainer.batches():
        lr, momentum = trainer.get_lr()[0], (trainer.get_momentum() or [0.0])[0]
        loss = cross_entropy(trainer(x), y)
        trainer.backward(loss)
        window += loss.item() / trainer.gradient_accumulation_steps()
        if trainer.step():
            for key, value in (("lr", lr), ("momentum", momentum), ("loss", window)):
                used[key].append(value)
            window = 0.0

    found = compute_accuracy(trainer.module, data.test)  # on all ranks: ZeRO-3 gathers layers
    if trainer.global_rank == 0:
        picture = args.output / "lr_momentum_loss.png"
        plot(used, picture, f"LeNet on {data.source.partition(' from')[0].partition(' (')[0]}")
        print(f"Test accuracy: {found:.4f}")
        print(f"Plot of learning rate, momentum and loss: {picture.resolve()}")


if __name__ == "__main__":
    main()
