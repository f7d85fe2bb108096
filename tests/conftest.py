"""What every test may rely on: no test leaves an environment variable or a process group behind."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

# Two threads that wait for each other by spinning make a small test crawl on a busy machine: one
# does, here and in what the tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


# What pytest, torch and DeepSpeed set for themselves when they are first used.
SET_BY_OTHERS = {
    "KINETO_LOG_LEVEL",
    "PYTEST_CURRENT_TEST",
    "PYTORCH_NVML_BASED_CUDA_CHECK",
    "TORCHINDUCTOR_CACHE_DIR",
}


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    before = dict(os.environ)
    yield
    changed = {
        name
        for name in before.keys() | os.environ.keys()
        if before.get(name) != os.environ.get(name)
    } - SET_BY_OTHERS
    assert not changed, f"the test left other values in {sorted(changed)}"
    if "torch" in sys.modules:
        import torch.distributed as dist

        left = dist.is_available() and dist.is_initialized()
        if left:
            dist.destroy_process_group()
        assert not left, "the test left a process group behind"
