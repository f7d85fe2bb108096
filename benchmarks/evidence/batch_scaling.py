"""Count the samples needed to reach a target accuracy with batch sizes of 64 and 512.

    python benchmarks/evidence/batch_scaling.py

The script reproduces the "Batch Scaling Example" of DeepSpeed's 1Cycle tutorial on a small scale,
with an MLP on Fashion-MNIST images downsampled to 14 x 14. The target is a test accuracy of 0.84.
The script trains with a batch size of 64 and each of three base learning rates, which are similarly
good for it. It then trains with a batch size of 512 and each of four schedules:

- Fixed: the base learning rate;
- LinearScale: eight times the base learning rate;
- 1Cycle above Fixed: a cycle whose learning rate is at least that of Fixed and briefly larger than
  that of LinearScale, as in the tutorial's plot;
- 1Cycle: a cycle between the bounds that the LR range test suggests for the batch size of 512. It
  does not depend on the base learning rate.
"""

from __future__ import annotations

import copy
from functools import partial

from experiment import Config, Experiment, Row, Task, train
from pages import (
    build_figure,
    format_mean,
    format_table,
    plot_history,
    plot_lr,
    save_figure,
    write_page,
)
from torch import nn

BATCH_FACTOR = 8
PEAK_FACTOR = 1.25
"""Ratio of the peak of "1Cycle above Fixed" to the learning rate of LinearScale."""
BASE_LRS = (0.02, 0.04, 0.08)
PLOTTED_LR = 0.04
"""The base learning rate of the runs in the plot."""
TARGET = 0.84
INTERVAL = 6144
"""Number of training samples between evaluations."""
BASE_LR_RUNS = ("small batch", "Fixed", "LinearScale", "1Cycle above Fixed")
"""The runs that depend on the base learning rate."""


def build_mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(196, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def set_batch(config: Config, size: int, lr: float) -> Config:
    changed = copy.deepcopy(config)
    changed["train_batch_size"] = size
    changed["optimizer"]["params"]["lr"] = lr
    return changed


def train_to_target(config: Config, task: Task, seed: int) -> Row:
    """Train a model until it reaches the target accuracy or the run ends, and return the results.

    In the results, ``"samples"`` is the number of training samples processed before the first
    evaluation that reached the target, or None if the target was not reached.
    """
    size = config["train_batch_size"]
    row = train(
        config,
        task,
        seed,
        every=max(1, INTERVAL // size),
        stop=lambda entry: entry["test_accuracy"] >= TARGET,
    )
    last = row["history"][-1]
    reached = last["test_accuracy"] >= TARGET
    return row | {"batch": size, "samples": last["step"] * size if reached else None}


def build_configs(fixed: Config, one_cycle: Config, base: float) -> list[Config]:
    """Return the configs of the runs in ``BASE_LR_RUNS``, in the same order."""
    large, scaled = fixed["train_batch_size"], BATCH_FACTOR * base
    above = copy.deepcopy(one_cycle)
    above["scheduler"]["params"] |= {"cycle_min_lr": base, "cycle_max_lr": PEAK_FACTOR * scaled}
    return [
        set_batch(fixed, large // BATCH_FACTOR, base),
        set_batch(fixed, large, base),
        set_batch(fixed, large, scaled),
        above,
    ]


def run_all(experiment: Experiment) -> None:
    results = experiment.results
    task = experiment.load_images(build_mlp, pooling=2)
    fixed, one_cycle = (experiment.read_config(name) for name in ("fixed", "one_cycle"))
    bounds = results.get("bounds", lambda: experiment.suggest_bounds(one_cycle, task))
    one_cycle["scheduler"] = bounds["scheduler"]
    configs = {"1Cycle": one_cycle}
    for base in BASE_LRS:
        for name, config in zip(BASE_LR_RUNS, build_configs(fixed, one_cycle, base), strict=True):
            configs[f"{name} {base}"] = config
    for seed in experiment.seeds:
        for name, config in configs.items():
            results.get(f"{name} {seed}", partial(train_to_target, config, task, seed))


def report(experiment: Experiment) -> None:
    results = experiment.results
    figure, (accuracies, lrs) = build_figure(2)
    runs = [(str(base), name, f"{name} {base}") for base in BASE_LRS for name in BASE_LR_RUNS]
    table = []
    for base, name, key in [*runs, ("none", "1Cycle", "1Cycle")]:
        rows = results.select(key)
        size, rates = rows[0]["batch"], rows[0]["lr"]
        reached = [row["samples"] for row in rows if row["samples"] is not None]
        highest = [max(entry["test_accuracy"] for entry in row["history"]) for row in rows]
        table.append([
            base,
            name,
            str(size),
            " to ".join(f"{rate:.3g}" for rate in sorted({min(rates), max(rates)})),
            f"{len(reached)} of {len(rows)}",
            format_mean(reached, digits=0),
            format_mean(highest),
        ])  # fmt: skip
        if base in (str(PLOTTED_LR), "none"):
            style = {"color": f"C{len(lrs.lines)}", "label": f"{name}, batch {size}"}
            plot_history(accuracies, rows, scale=size / 1000, **style)
            plot_lr(lrs, rows[0], scale=size / 1000, **style)
    accuracies.axhline(TARGET, color="black", linestyle=":", linewidth=1)
    accuracies.set(xlabel="thousand samples", ylabel="test accuracy")
    if not experiment.is_smoke:
        accuracies.set_ylim(0.7, None)
    lrs.set(xlabel="thousand samples", ylabel="learning rate", yscale="log")
    lrs.legend(fontsize="small")
    save_figure(figure, experiment.output / f"{experiment.name}.png")
    header = (
        "base learning rate",
        "run",
        "batch",
        "learning rate",
        "runs that reach the target",
        "samples to the target",
        "highest accuracy",
    )
    write_page(experiment, format_table(header, table))


def main() -> None:
    experiment = Experiment.from_arguments("batch_scaling", __doc__)
    run_all(experiment)
    report(experiment)


if __name__ == "__main__":
    main()
