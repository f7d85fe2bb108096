"""Kill runs 200 times at random moments; `test_checkpoint` does the same six times."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "kill_matrix.py"


@pytest.mark.long
def test_kill_matrix_200_kills_lose_nothing():
    command = [sys.executable, SCRIPT, "--kills", "200"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
