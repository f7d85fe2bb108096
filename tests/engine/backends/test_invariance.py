"""The same run on one rank and on several, accumulated or not: every update is the same."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import engine
from schedules import trace
from tests.testing.distributed import run_distributed_test

UPDATES = 24
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
    """Train from a config, and return each update's (applied, mean loss, lr, momentum)."""
    config = {"train_batch_size": 8, "optimizer": {"type": "AdamW"}, "scheduler": SCHEDULER}
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    x = torch.randn(100, 16, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(x, x[:, :4].argmax(1))
    trainer, _, loader, _ = engine.initialize(
        config=config | sections, model=net, training_data=data
    )
    rows, losses = [], []
    while trainer.global_steps < UPDATES:
        for x, y in loader:
            used = (trainer.get_lr()[0], trainer.get_momentum()[0])
            loss = cross_entropy(trainer(x).float(), y)
            trainer.backward(loss)
            losses.append(trainer.mean(loss.item()))
            trainer.step()
            if len(losses) == trainer.gradient_accumulation_steps():
                rows.append((trainer.was_step_applied(), sum(losses) / len(losses), *used))
                losses.clear()
            if trainer.global_steps == UPDATES:
                break
    return rows


@pytest.fixture(scope="module")
def alone():
    return run_distributed_test(train, 1, {})[0]


def test_one_process_follows_the_trace(alone):
    expected = trace(SCHEDULER, UPDATES)
    assert [lr for *_, lr, _ in alone] == expected["lr"][:, 0].tolist()
    assert [momentum for *_, momentum in alone] == expected["momentum"][:, 0].tolist()


@pytest.mark.parametrize(
    ("world_size", "micro"),
    [
        pytest.param(4, 2, id="4 ranks"),
        pytest.param(1, 2, id="accumulated"),
        pytest.param(2, 1, id="both"),
    ],
)
def test_every_update_is_the_same(alone, world_size, micro):
    sections = {"train_micro_batch_size_per_gpu": micro}
    for rows in run_distributed_test(train, world_size, sections):
        assert [row[2:] for row in rows] == [row[2:] for row in alone]
        losses = [row[1] for row in alone]
        assert [row[1] for row in rows] == pytest.approx(losses, rel=2e-5)


def test_an_overflow_on_two_ranks_skips_on_both():
    # 2 ** 40 overflows float16 until the scale has come down far enough.
    fp16 = {"enabled": True, "initial_scale_power": 40, "hysteresis": 1}
    first, second = run_distributed_test(train, 2, {"fp16": fp16})
    assert first == second
    applied = [row[0] for row in first]
    assert applied.index(True) > 3
    expected = trace(SCHEDULER, UPDATES)
    updates = [sum(applied[:at]) for at in range(UPDATES)]
    assert [row[2] for row in first] == expected["lr"][updates, 0].tolist()
