"""Train models from configs, and store the results.

The scripts in this directory share this module. Each script stores the result of a run in
``docs/results/NAME.json`` as soon as the run ends, and reuses stored results. Running a script
again therefore only redraws its plot and its table.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import logging
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy
from torch.utils.data import TensorDataset

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "fashion_mnist")]

import images

import engine
from engine.range_test.report import LRRangeReport

CONFIGS = Path(__file__).parent / "configs"
PLOTTED_VALUES = 240
SMOKE_SAMPLES, SMOKE_STEPS = 64, 150

Config = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A model, its training data and its test data.

    Args:
        build_model: function that builds the model.
        train: dataset of inputs and targets.
        test: inputs and targets on which accuracy is measured.
        source: name of the dataset.
    """

    build_model: Callable[[], nn.Module]
    train: TensorDataset
    test: tuple[Tensor, Tensor]
    source: str


@dataclass(frozen=True)
class Experiment:
    """An experiment's settings and stored results.

    Args:
        name: name shared by the config directory, the Markdown page, the plot and the JSON file.
        seeds: random seeds of the runs.
        is_smoke: whether to use only a few samples and steps, to check that the script works.
        output: directory for the Markdown page, the plot and the JSON file.
        results: stored rows of the runs that have completed.
    """

    name: str
    seeds: range
    is_smoke: bool
    output: Path
    results: Results

    @classmethod
    def from_arguments(cls, name: str, description: str | None) -> Experiment:
        """Parse a script's command line, and return the experiment.

        ``description`` is the script's docstring, which ``--help`` prints.
        """
        parser = argparse.ArgumentParser(
            description=description, formatter_class=argparse.RawTextHelpFormatter
        )
        parser.add_argument(
            "--seeds", type=int, default=3, help="number of seeds per setting (default: 3)"
        )
        parser.add_argument("--first-seed", type=int, default=0, help="first seed (default: 0)")
        parser.add_argument("--rerun", action="store_true", help="discard the stored results")
        parser.add_argument("--smoke", action="store_true", help="use only a few samples and steps")
        parser.add_argument(
            "--output",
            type=Path,
            default=ROOT / "docs" / "results",
            help="directory for the Markdown page, plot and JSON file (default: docs/results)",
        )
        arguments = parser.parse_args()
        # Models of this size train fastest on one thread.
        torch.set_num_threads(1)
        logging.getLogger("onecycle").setLevel(logging.WARNING)
        return cls(
            name,
            range(arguments.first_seed, arguments.first_seed + arguments.seeds),
            arguments.smoke,
            arguments.output,
            Results(arguments.output / f"{name}.json", rerun=arguments.rerun),
        )

    def read_config(self, name: str) -> Config:
        """Read one of the script's configs."""
        path = CONFIGS / self.name / f"{name}.json"
        config: Config = json.loads(path.read_text(encoding="utf-8"))
        if self.is_smoke:
            config["train_batch_size"] = SMOKE_SAMPLES
        return config

    def load_images(self, build_model: Callable[[], nn.Module], *, pooling: int = 1) -> Task:
        """Return the Fashion-MNIST task, or scikit-learn's digits if Fashion-MNIST is unavailable.

        Args:
            build_model: function that builds the model.
            pooling: factor by which average pooling shrinks the width and height of the images.
        """
        found = images.load()
        size = SMOKE_SAMPLES if self.is_smoke else None
        (inputs, targets), (test_inputs, test_targets) = (
            (avg_pool2d(x[:size], pooling), y[:size])
            for x, y in (found.train.tensors, found.test.tensors)
        )
        source = re.split(r" from| \(", found.source)[0]
        train = TensorDataset(inputs, targets)
        return Task(build_model, train, (test_inputs, test_targets), source)

    def suggest_bounds(self, config: Config, task: Task) -> Row:
        """Run the LR range test, as ``onecycle lr-test --repeat 3 --min 1e-4`` does.

        In these experiments with SGD, the loss falls only at learning rates above 1e-3. The
        default sweep, which starts at 1e-6, has too few steps in that range.

        Args:
            config: config with a OneCycle schedule, whose bounds are ignored.
            task: model and data.

        Returns:
            A row with the config's scheduler block, updated with the suggested bounds.

        Raises:
            RuntimeError: the LR range test could not suggest a learning rate.
        """
        reports = []
        for seed in range(1000, 1003):
            torch.manual_seed(seed)
            trainer, _, loader, _ = engine.initialize(
                config=config, model=task.build_model(), training_data=task.train
            )
            reports.append(
                engine.lr_range_test(
                    trainer,
                    loader,
                    loss_fn=lambda trainer, batch: cross_entropy(trainer(batch[0]), batch[1]),
                    min_lr=1e-4,
                    steps=SMOKE_STEPS if self.is_smoke else 250,
                )
            )
        report = LRRangeReport(tuple(run for each in reports for run in each.runs))
        if report.max_lr is None:
            raise RuntimeError(
                f"The LR range test could not suggest a learning rate: {report.suggestion.reason}."
            )
        return {"scheduler": report.block(config["scheduler"]), "of_each_run": report.max_lrs}


class Results:
    """Rows that are saved as JSON after each run, so that an interrupted script can continue.

    Args:
        path: JSON file.
        rerun: whether to discard the rows in the file.
    """

    def __init__(self, path: Path, *, rerun: bool = False) -> None:
        self.path = path
        self.rows: dict[str, Row] = {}
        self._discarded: dict[str, Row] = {}
        self.machine = describe_machine()
        self._load()
        if rerun:
            self._discarded, self.rows = self.rows, {}

    def get(self, key: str, run: Callable[[], Row]) -> Row:
        """Return the row for a key. If it is not stored yet, call ``run`` and store the result."""
        if key not in self.rows:
            started, cpu = time.monotonic(), time.process_time()
            row = run() | {"seconds": round(time.process_time() - cpu, 1)}
            self._load()  # another process may have added rows
            self.rows[key] = row
            self.machine = describe_machine()
            self._save()
            print(f"{key}: {time.monotonic() - started:.0f} s", flush=True)
        return self.rows[key]

    def select(self, prefix: str) -> list[Row]:
        """Return the rows whose keys consist of the prefix and a seed."""
        return [row for key, row in self.rows.items() if re.fullmatch(f"{prefix} \\d+", key)]

    @property
    def seeds(self) -> list[int]:
        """The seeds of the rows, in ascending order."""
        found = (re.search(r" (\d+)$", key) for key in self.rows)
        return sorted({int(match[1]) for match in found if match})

    @property
    def minutes(self) -> float:
        """Total CPU time of the stored runs, in minutes."""
        seconds: float = sum(row["seconds"] for row in self.rows.values())
        return seconds / 60

    def _load(self) -> None:
        if self.path.is_file():
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            self.machine = stored["machine"]
            rows = stored["rows"].items()
            self.rows |= {key: row for key, row in rows if row != self._discarded.get(key)}

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = ",\n".join(f"{json.dumps(key)}: {json.dumps(row)}" for key, row in self.rows.items())
        text = f'{{"machine": {json.dumps(self.machine)}, "rows": {{\n{rows}\n}}}}\n'
        self.path.write_text(text, encoding="utf-8")


def train(
    config: Config,
    task: Task,
    seed: int,
    *,
    every: int | None = None,
    stop: Callable[[Row], bool] = lambda row: False,
    args: argparse.Namespace | None = None,
) -> Row:
    """Train a new model, and return its history and learning rates.

    Args:
        config: config of the run.
        task: model and data.
        seed: random seed for the weights and the order of the samples.
        every: number of optimizer steps between evaluations; None to evaluate once per epoch.
        stop: function that receives the newest history entry and returns whether to end the run.
        args: parsed command-line arguments that override values of the config.

    Returns:
        A row with the history and the learning rates. The history has one entry per evaluation:
        the accuracy on the test data, and the mean training loss and accuracy since the previous
        evaluation. The learning rates are stored at intervals of "lr_stride" steps.
    """
    torch.manual_seed(seed)
    # On a CPU, convolutions are faster with channels last.
    model = task.build_model().to(memory_format=torch.channels_last)
    trainer, _, loader, _ = engine.initialize(
        args=args, config=config, model=model, training_data=task.train
    )
    every = every or len(loader)
    rates: list[float] = []
    history: list[Row] = []
    totals, samples = torch.zeros(2, device=trainer.device), 0
    for inputs, targets in trainer.batches():
        rates.append(trainer.get_lr()[0])
        output = trainer(inputs)
        loss = cross_entropy(output, targets)
        trainer.backward(loss)
        trainer.step()
        with torch.no_grad():
            correct = (output.argmax(1) == targets).sum()
            totals += torch.stack([loss * len(targets), correct])
            samples += len(targets)
        if trainer.global_steps % every == 0 or trainer.run_is_over:
            train_loss, train_accuracy = (totals / samples).tolist()
            totals, samples = torch.zeros_like(totals), 0
            history.append({
                "step": trainer.global_steps,
                "train_loss": round(train_loss, 5),
                "train_accuracy": round(train_accuracy, 5),
                "test_accuracy": round(measure_accuracy(trainer, task.test), 5),
            })  # fmt: skip
            if stop(history[-1]):
                break
    stride = -(-len(rates) // PLOTTED_VALUES)
    return {
        "data": task.source,
        "history": history,
        "lr": [float(f"{rate:.5g}") for rate in rates[::stride]],
        "lr_stride": stride,
    }


def measure_accuracy(trainer: engine.Engine, test: tuple[Tensor, Tensor]) -> float:
    """Return the fraction of targets that the model predicts correctly."""
    batches = zip(*(tensor.split(1000) for tensor in test), strict=True)
    return trainer.evaluate(
        list(batches), lambda batch: (trainer(batch[0]).argmax(1) == batch[1]).float().mean()
    )


def describe_machine() -> str:
    """Return a line with the device, the versions of Python and PyTorch, and the date."""
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else f"one of {os.cpu_count()} CPU cores"
    return (
        f"{device} ({platform.machine()}), Python {platform.python_version()}, "
        f"torch {torch.__version__}, {dt.datetime.now(tz=dt.UTC):%Y-%m-%d}"
    )
