"""Compare AutoWU with other ways to choose a learning rate for large batches.

    python benchmarks/evidence/autowu_large_batch.py

The script trains LeNet (without normalization) and a small ResNet (with batch normalization) on
Fashion-MNIST, with images downsampled to 14 x 14. All runs use AdamW and 8 epochs, with batch
sizes of 256, 1,024 and 4,096. The methods are

- fixed: the same constant learning rate for all batch sizes (the best of three at batch size 256);
- scaled: the learning rate of "fixed" times batch size / 256;
- cosine: warmup to the learning rate of "scaled" in the first epoch, then cosine decay to 0;
- 1Cycle: OneCycle between the bounds that an LR range test suggests for the batch size;
- refined: the same, but short 1Cycle runs refine the maximum, as with ``lr-test --refine``;
- AutoWU: AutoWU with its robust test for a minimum of the loss, and with rollback to the weights at
  that minimum; no hyperparameter is tuned;
- AutoWU 1/4: the same, with a warmup of at most a quarter of the run instead of half.

At batch size 256, the script skips "scaled", which would equal "fixed". It also skips "refined" and
"AutoWU 1/4", which are meant to improve on 1Cycle and AutoWU for large batches.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from experiment import SMOKE_STEPS, Config, Experiment, Row, Task, train
from pages import (
    build_figure,
    format_table,
    format_values,
    get_last,
    save_figure,
    write_page,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import engine

BATCHES = (256, 1024, 4096)
CONFIGS = {
    "fixed": "fixed",
    "scaled": "fixed",
    "cosine": "cosine",
    "1Cycle": "one_cycle",
    "refined": "one_cycle",
    "AutoWU": "autowu",
    "AutoWU 1/4": "autowu",
}
"""The config of each method."""
ONLY_LARGE = ("scaled", "refined", "AutoWU 1/4")
CANDIDATES = (1e-3, 2e-3, 4e-3)
TUNING_SEED = 100
SWEEP_STEPS = 120
"""Number of steps in the range test, and in each 1Cycle run that refines its suggestion."""


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


def set_batch(config: Config, task: Task, size: int) -> Config:
    return config | {"train_batch_size": min(size, len(task.train))}


def set_lr(config: Config, lr: float) -> Config:
    optimizer = config["optimizer"]
    return config | {"optimizer": optimizer | {"params": optimizer["params"] | {"lr": lr}}}


def count_steps(config: Config, task: Task) -> int:
    """Return the number of steps in the run."""
    epochs = int(config["engine"]["max_duration"].removesuffix("ep"))
    return epochs * (len(task.train) // config["train_batch_size"])


def train_once(config: Config, task: Task, seed: int) -> Row:
    """Train a new model, and measure its accuracy only at the end."""
    return train(config, task, seed, every=count_steps(config, task))


def tune(config: Config, task: Task) -> Row:
    """Return the candidate with the highest accuracy on samples held out from the training set."""
    held_out = len(task.train) // 12
    parts = [tensor.split([held_out, len(task.train) - held_out]) for tensor in task.train.tensors]
    (valid, rest) = zip(*parts, strict=True)
    tuning = replace(task, train=TensorDataset(*rest), test=valid)
    config = set_batch(config, tuning, BATCHES[0])
    accuracies = [
        get_last([train_once(set_lr(config, lr), tuning, TUNING_SEED)], "test_accuracy")[0]
        for lr in CANDIDATES
    ]
    best = max(zip(accuracies, CANDIDATES, strict=True))[1]
    return {"lr": best, "candidates": CANDIDATES, "accuracies": accuracies}


def suggest(config: Config, task: Task, steps: int) -> Row:
    """Return the scheduler blocks that an LR range test suggests before and after refinement."""
    torch.manual_seed(TUNING_SEED)
    trainer, _, loader, _ = engine.initialize(
        config=config, model=task.build_model(), training_data=task.train
    )
    refined = engine.lr_range_test(
        trainer,
        loader,
        loss_fn=lambda trainer, batch: cross_entropy(trainer(batch[0]), batch[1]),
        min_lr=1e-5,
        max_lr=1.0,
        steps=steps,
        refine=True,
        training_steps=count_steps(config, task),
    )
    first = replace(refined, refinement=None)
    return {
        "1Cycle": first.block(config["scheduler"]),
        "refined": refined.block(config["scheduler"]),
    }


def run_all(experiment: Experiment, name: str) -> None:
    results = experiment.results
    steps = SMOKE_STEPS if experiment.is_smoke else SWEEP_STEPS
    task = experiment.load_images(NETS[name], pooling=2)
    configs = {method: experiment.read_config(file) for method, file in CONFIGS.items()}
    configs["AutoWU 1/4"]["scheduler"]["params"]["max_warmup_fraction"] = 0.25
    tuned = results.get(f"{name} tuned", lambda: tune(configs["fixed"], task))["lr"]
    for size in BATCHES:
        of_size = {method: set_batch(config, task, size) for method, config in configs.items()}
        for method in ("scaled", "cosine"):
            of_size[method] = set_lr(of_size[method], tuned * size / BATCHES[0])
        of_size["fixed"] = set_lr(of_size["fixed"], tuned)
        find = partial(suggest, of_size["1Cycle"], task, steps)
        blocks = results.get(f"{name} {size} bounds", find)
        for method in ("1Cycle", "refined"):
            of_size[method]["scheduler"] = blocks[method]
        if size == BATCHES[0]:
            of_size = {key: config for key, config in of_size.items() if key not in ONLY_LARGE}
        for seed in experiment.seeds:
            for method, config in of_size.items():
                run = partial(train_once, config, task, seed)
                results.get(f"{name} {size} {method} {seed}", run)


def report(experiment: Experiment, names: list[str]) -> None:
    results = experiment.results
    figure, panels = build_figure(len(names))
    tables = []
    for name, panel in zip(names, panels, strict=True):
        table = []
        for number, method in enumerate(CONFIGS):
            rows = {size: results.select(f"{name} {size} {method}") for size in BATCHES}
            values = {size: get_last(found, "test_accuracy") for size, found in rows.items()}
            table.append([method, *map(format_values, values.values())])
            means = {size: sum(each) / len(each) for size, each in values.items() if each}
            panel.plot(list(means), list(means.values()), color=f"C{number}", label=method)
            for size, each in values.items():
                panel.plot([size] * len(each), each, ".", color=f"C{number}")
        tables.append(format_table((name, *(f"{size:,}" for size in BATCHES)), table))
        panel.set(xlabel="batch size", ylabel="test accuracy", xscale="log", title=name)
        panel.set_xticks(BATCHES, [f"{size:,}" for size in BATCHES])
        panel.set_xticks([], minor=True)
        panel.legend(fontsize="small")
    save_figure(figure, experiment.output / f"{experiment.name}.png")
    write_page(experiment, *tables)


def main() -> None:
    experiment = Experiment.from_arguments("autowu_large_batch", __doc__)
    names = ["LeNet"] if experiment.is_smoke else list(NETS)
    for name in names:
        run_all(experiment, name)
    report(experiment, names)


if __name__ == "__main__":
    main()
