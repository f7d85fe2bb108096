"""The same run on one process and on two, accumulated or not: every update is the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from schedules import trace

SCRIPT = Path(__file__).parents[2] / "testing" / "trace_run.py"
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


def launch(folder, world_size, **changes):
    config = {
        "train_batch_size": 8,
        "optimizer": {"type": "AdamW"},
        "scheduler": SCHEDULER,
    }
    path, output = folder / "ds_config.json", folder / f"run{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps(config | changes))
    command = [sys.executable, SCRIPT, path, output, str(UPDATES)]
    if world_size > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
        command[1:1] = torchrun
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("alone"), 1)


def test_one_process_follows_the_trace(alone):
    expected = trace(SCHEDULER, UPDATES)
    assert not alone["ddp"]
    assert [lr for *_, lr, _ in alone["rows"]] == expected["lr"][:, 0].tolist()
    assert [momentum for *_, momentum in alone["rows"]] == expected["momentum"][:, 0].tolist()


@pytest.mark.parametrize(
    ("world_size", "micro"),
    [
        pytest.param(4, 2, marks=pytest.mark.slow, id="4 ranks"),
        pytest.param(1, 2, id="accumulated"),
        pytest.param(2, 1, id="both"),
    ],
)
def test_every_update_is_the_same(tmp_path, alone, world_size, micro):
    run = launch(tmp_path, world_size, train_micro_batch_size_per_gpu=micro)
    assert run["ddp"] == (world_size > 1)
    assert [row[2:] for row in run["rows"]] == [row[2:] for row in alone["rows"]]
    losses = [row[1] for row in alone["rows"]]
    assert [row[1] for row in run["rows"]] == pytest.approx(losses, rel=2e-5)


def test_an_overflow_on_two_ranks_skips_on_both(tmp_path):
    # 2 ** 40 overflows float16 until the scale has come down far enough.
    fp16 = {"enabled": True, "initial_scale_power": 40, "hysteresis": 1}
    run = launch(tmp_path, 2, fp16=fp16)
    applied = [row[0] for row in run["rows"]]
    assert applied.index(True) > 3
    expected = trace(SCHEDULER, UPDATES)
    updates = [sum(applied[:at]) for at in range(UPDATES)]
    assert [row[2] for row in run["rows"]] == expected["lr"][updates, 0].tolist()
