"""The schedules of this package in accelerate and transformers, which build DeepSpeed."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from schedules import trace

HERE = Path(__file__).parent
BLOCK = {"type": "CosineAnnealingWithWarmupScheduler", "params": {"t_warmup": 2, "t_max": 6}}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["accelerate_run.py", "transformers_run.py"])
def test_library_on_deepspeed_follows_the_schedule(script, tmp_path):
    one_rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    run = subprocess.run(
        [sys.executable, HERE / script, tmp_path],
        capture_output=True,
        text=True,
        env=os.environ | one_rank | {"MASTER_PORT": str(free_port())},
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    lrs = json.loads(run.stdout.splitlines()[-1])
    assert lrs == trace(BLOCK, 5, base={"lr": (0.5,)})["lr"][:, 0].tolist()
