"""The work of `validate` grows linearly with the config, and a late step costs as much as an early
one; see benchmarks/growth.py."""

import itertools
import tracemalloc
from functools import partial

import pytest
import torch

import engine
import schedules
from benchmarks.growth import build_config
from tests.engine.test_many_groups import count_lines

FEW, MANY = 50, 200
pytestmark = pytest.mark.filterwarnings("ignore:AutoWU's warmup")


@pytest.mark.parametrize("kind", ["param groups", "phases", "unknown keys", "comments"])
def test_validate_executes_lines_in_proportion_to_the_config(kind):
    engine.validate(build_config(kind, 2))
    few, many = (
        count_lines(partial(engine.validate, build_config(kind, count))) for count in (FEW, MANY)
    )
    assert many <= MANY / FEW * few


AUTOWU = {"steps_per_epoch": 10_000, "total_epochs": 11, "test": "robust"}
CONSTANT = AUTOWU | {"decay_phase_stat": "loss", "max_warmup_fraction": 0.0}


def count_lines_of_the_cheapest_step(trainer, last):
    """Train until a step, and return the fewest lines of the last five steps."""
    x = torch.ones(4, 2)
    lines = []
    for step in range(trainer.global_steps, last):

        def train():
            trainer.backward(trainer(x).square().mean() + 1.0)
            trainer.step()

        if step < last - 5:
            train()
        else:
            lines.append(count_lines(train))
    return min(lines)


@pytest.mark.parametrize("params", [AUTOWU, CONSTANT], ids=["warmup", "constant"])
def test_step_with_autowu_and_monitor_executes_as_many_lines_late_as_early(tmp_path, params):
    config = build_config("comments", 0) | {
        "scheduler": {"type": "AutoWU", "params": params},
        "csv_monitor": {"enabled": True, "output_path": str(tmp_path)},
    }
    trainer = engine.initialize(config=config, model=torch.nn.Linear(2, 1))[0]
    early, late = (count_lines_of_the_cheapest_step(trainer, last) for last in (20, 300))
    assert early == late


def test_autowu_update_does_not_copy_the_losses_of_the_epoch():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = schedules.attach(schedules.AutoWU(**CONSTANT), optimizer)
    optimizer.step()
    for _ in range(5000):
        scheduler.step(loss=1.0)
    peaks = []
    for _ in itertools.repeat(None, 5):  # at most one of them enlarges the list
        tracemalloc.start()
        scheduler.step(loss=1.0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert sorted(peaks)[-2] < 5000, "a copy of 5,000 losses has 40,000 bytes"
    assert len(scheduler.state_dict()["state"]["epoch"]) == 5005
