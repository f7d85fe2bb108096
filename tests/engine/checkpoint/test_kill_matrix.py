"""200 kills at random moments; `test_checkpoint` has a sample of six."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "kill_matrix.py"


@pytest.mark.long
def test_200_killed_runs_lose_nothing():
    command = [sys.executable, SCRIPT, "--kills", "200"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
