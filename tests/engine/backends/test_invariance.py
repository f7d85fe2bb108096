"""A run takes the same steps on one rank and on several, with and without accumulation."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import engine
from schedules import trace
from tests.testing.distributed import run_distributed_test

STEPS = 24
SCHEDULER = {
    "type": "OneCycle",
    "params": {
        "cycle_min_lr": 0.01,
        "cycle_max_lr": 0.05,
        "cycle_first_step_size": 8,
        "cycle_first_stair_count": 4,
        "cycle_min_mom": 0.85,
        "cycle_max_mom": 0.95,
        "decay_step_size": 4,
        "decay_lr_rate": 1.0,
    },
}


def train(sections):
    """Train from a config and return each step's (applied, mean loss, lr, momentum)."""
    config = {"train_batch_size": 8, "optimizer": {"type": "AdamW"}, "scheduler": SCHEDULER}
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    x = torch.randn(100, 16, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(x, x[:, :4].argmax(1))
    trainer, _, loader, _ = engine.initialize(
        config=config | sections, model=net, training_data=data
    )
    rows, losses = [], []
    while trainer.global_steps < STEPS:
        for x, y in loader:
            used = (trainer.get_lr()[0], trainer.get_momentum()[0])
            loss = cross_entropy(trainer(x).float(), y)
            trainer.backward(loss)
            losses.append(trainer.mean(loss.item()))
            trainer.step()
            if len(losses) == trainer.gradient_accumulation_steps():
                rows.append((trainer.was_step_applied(), sum(losses) / len(losses), *used))
                losses.clear()
            if trainer.global_steps == STEPS:
                break
    return rows


@pytest.fixture(scope="module")
def one_rank():
    return run_distributed_test(train, 1, {})[0]


def test_run_in_one_process_follows_the_trace(one_rank):
    expected = trace(SCHEDULER, STEPS)
    assert [lr for *_, lr, _ in one_rank] == expected["lr"][:, 0].tolist()
    assert [momentum for *_, momentum in one_rank] == expected["momentum"][:, 0].tolist()


@pytest.mark.parametrize(
    ("world_size", "micro"),
    [
        pytest.param(4, 2, id="4 ranks"),
        pytest.param(1, 2, id="accumulated"),
        pytest.param(2, 1, id="both"),
    ],
)
def test_run_split_over_ranks_and_micro_batches_takes_the_same_steps(one_rank, world_size, micro):
    sections = {"train_micro_batch_size_per_gpu": micro}
    for rows in run_distributed_test(train, world_size, sections):
        assert [row[2:] for row in rows] == [row[2:] for row in one_rank]
        losses = [row[1] for row in one_rank]
        assert [row[1] for row in rows] == pytest.approx(losses, rel=2e-5)


def test_overflow_on_two_ranks_skips_the_step_on_both():
    # A scale of 2 ** 40 overflows float16 until it has been halved often enough.
    fp16 = {"enabled": True, "initial_scale_power": 40, "hysteresis": 1}
    first, second = run_distributed_test(train, 2, {"fp16": fp16})
    assert first == second
    applied = [row[0] for row in first]
    assert applied.index(True) > 3
    expected = trace(SCHEDULER, STEPS)
    steps = [sum(applied[:at]) for at in range(STEPS)]
    assert [row[2] for row in first] == expected["lr"][steps, 0].tolist()
