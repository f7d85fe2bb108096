"""The number of times per step that the host waits for a value of the device."""

import os

import pytest
import torch
from torch.nn.functional import cross_entropy

import engine
from tests.testing.distributed import run_distributed_test
from tests.testing.host_reads import HostReads

CYCLE = {
    "type": "OneCycle",
    "params": {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-3, "cycle_first_step_size": 50},
}
STEPS = 10


def count_reads(
    *, deferred=True, precision="fp32", clipping=1.0, monitors=None, checkpoints=None, **sections
):
    """Return the host reads per step after the first steps, by operation and place."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    config = {
        "train_batch_size": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "scheduler": CYCLE,
        "gradient_clipping": clipping,
        "steps_per_print": 1000,
        "engine": {"backend": "torch", "deferred_step": deferred},
        **sections,
    }
    if precision != "fp32":
        config[precision] = {"enabled": True}
    if monitors is not None:
        config["csv_monitor"] = {"enabled": True, "output_path": str(monitors)}
    if checkpoints is not None:
        config["engine"] |= {"checkpoint": {"dir": str(checkpoints), "every": 1000}}
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(2))
    model = torch.nn.Sequential(*layers, torch.nn.Linear(16, 4))
    trainer, *_ = engine.initialize(config=config, model=model)
    x, y = torch.randn(8 // ranks, 16), torch.randint(0, 4, (8 // ranks,))

    def step():
        trainer.backward(cross_entropy(trainer(x).float(), y))
        return trainer.step()

    for _ in range(5):
        step()
    with HostReads() as reads:
        for _ in range(STEPS):
            step()
    trainer.destroy()
    return {place: count / STEPS for place, count in reads.found.items()}


def test_host_reads_counts_reads_of_values_and_no_other_operations():
    with HostReads() as reads:
        x = torch.ones(2, 2) @ torch.ones(2, 2)
        float(x.sum())
        bool(x[0, 0])
        torch.nonzero(x)
        x.tolist()
    assert sum(reads.found.values()) == 4


@pytest.mark.parametrize("clipping", [0.0, 1.0])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_deferred_step_reads_nothing(precision, clipping, tmp_path):
    assert count_reads(precision=precision, clipping=clipping) == {}
    found = count_reads(
        precision=precision, clipping=clipping, monitors=tmp_path, checkpoints=tmp_path
    )
    assert found == {}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_step_that_waits_reads_the_norm(precision):
    found = count_reads(deferred=False, precision=precision)
    assert sum(found.values()) == 1, found


def count_on_rank(settings, directory):
    for precision in ("fp32", "bf16", "fp16"):
        for clipping in (0.0, 1.0):
            found = count_reads(precision=precision, clipping=clipping, **settings)
            assert found == {}, (precision, clipping)
    return count_reads(monitors=f"{directory}/m", checkpoints=f"{directory}/c", **settings)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deferred_step_on_two_ranks_reads_nothing(stage, tmp_path):
    settings = {"zero_optimization": {"stage": stage}}
    assert run_distributed_test(count_on_rank, 2, settings, str(tmp_path)) == [{}, {}]


@pytest.mark.parametrize("stage", [0, 3])
def test_step_that_waits_on_two_ranks_reads_several_values(stage, tmp_path):
    found = run_distributed_test(count_waiting_on_rank, 2, stage, str(tmp_path))
    assert found == [4, 4]


def count_waiting_on_rank(stage, directory):
    found = count_reads(
        deferred=False,
        monitors=f"{directory}/m",
        checkpoints=f"{directory}/c",
        zero_optimization={"stage": stage},
    )
    return sum(found.values())
