"""The GPU tests and the GPU benchmark run on the CPU, so that they work on their first GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def run(*command):
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_dry_run_of_the_gpu_tests_passes_without_skips():
    done = run("-m", "pytest", "-q", "tests/gpu", "--dry-run", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout[-4000:]
    assert "skipped" not in done.stdout
    assert " passed" in done.stdout


def test_dry_run_of_the_gpu_benchmark_measures_every_contender(tmp_path):
    path = tmp_path / "gpu.json"
    done = run("benchmarks/gpu.py", "--dry-run", "--out", str(path))
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(path.read_text())
    assert report["is_dry_run"]
    assert report["errors"] == {}
    for name, results in report["tasks"].items():
        for contender in ("onecycle", "raw loop", "DeepSpeed, stage 0", "DeepSpeed, stage 3"):
            result = results[contender]
            assert result["step_ms"] > 0, (name, contender)
            assert result["tokens_per_s" if "GPT" in name else "samples_per_s"] > 0
            assert result["syncs_per_step"] >= 0


def test_gpu_tests_are_not_selected_with_the_tests_for_the_cpu():
    done = run("-m", "pytest", "-q", "tests/gpu", "-m", "not gpu", "--collect-only")
    assert "no tests collected" in done.stdout or "deselected" in done.stdout
    assert "test_training.py::" not in done.stdout


def test_gpu_tests_without_a_gpu_are_skipped_with_a_hint():
    test = "tests/gpu/test_training.py::test_device_cpu_does_not_use_the_gpu"
    done = run("-m", "pytest", "-q", test, "-p", "no:cacheprovider")
    import torch

    if not torch.cuda.is_available():
        assert "pass --dry-run" in done.stdout
