"""Runs that are interrupted at random steps continue like uninterrupted runs."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "random_cuts.py"


@pytest.mark.slow
def test_interrupted_runs_continue_like_uninterrupted_runs():
    command = [sys.executable, SCRIPT, "--cuts", "5", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "5 interruptions: 0 steps differ" in done.stdout, done.stdout + done.stderr
