"""Checks that every test cleans up after itself, and the selection of long tests."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.testing import distributed

# Threads that busy-wait for each other slow small tests down on a busy machine. So the test process
# and every process that it starts use one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

settings.register_profile("long", max_examples=20 * settings.default.max_examples, deadline=None)

ROOT = Path(__file__).parent.parent
SET_BY_LIBRARIES = {
    "CUDA_MODULE_LOADING",
    "KINETO_LOG_LEVEL",
    "KMP_DUPLICATE_LIB_OK",
    "KMP_INIT_AT_FORK",
    "PYTEST_CURRENT_TEST",
    "PYTORCH_NVML_BASED_CUDA_CHECK",
    "TORCHINDUCTOR_CACHE_DIR",
}
"""Environment variables that pytest, torch, DeepSpeed and scikit-learn set on first use."""
LIBRARY_THREADS = {"_AsyncWriterThread"}  # TensorBoard's writer, which the engine keeps alive
CACHES = {".hypothesis", ".mypy_cache", ".pytest_cache", ".ruff_cache", "__pycache__"}
PATIENCE = 2.0  # seconds after a test within which its threads and processes must end


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option ``--dry-run`` of the tests in ``tests/gpu``."""
    parser.addoption(
        "--dry-run",
        action="store_true",
        help="run the GPU tests on the CPU, with smaller sizes",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests marked ``long`` unless ``-m`` names them."""
    if "long" in config.getoption("markexpr"):
        return
    long = [item for item in items if item.get_closest_marker("long")]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item not in long]


@pytest.fixture
def caplog(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Delete the engines of earlier tests first, because an engine logs when it is deleted."""
    gc.collect()
    return caplog


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail a test that leaves variables, files, threads, processes or a process group behind."""
    variables, files = dict(os.environ), set(ROOT.iterdir())
    threads, processes = set(threading.enumerate()), distributed.child_pids()
    yield
    changed = {
        name
        for name in variables.keys() | os.environ.keys()
        if variables.get(name) != os.environ.get(name)
    }
    assert changed <= SET_BY_LIBRARIES, f"the test changed the environment: {sorted(changed)}"
    written = {path.name for path in set(ROOT.iterdir()) - files} - CACHES
    assert not written, f"the test left files in {ROOT}: {sorted(written)}"
    _check_process_group()
    deadline = time.monotonic() + PATIENCE
    while running := _list_running(threads, processes):
        assert time.monotonic() < deadline, f"the test left running: {running}"
        time.sleep(0.01)


def _check_process_group() -> None:
    if "torch" not in sys.modules:
        return
    import torch.distributed as dist

    is_left = dist.is_available() and dist.is_initialized()
    if is_left:
        dist.destroy_process_group()
    assert not is_left, "the test left a process group behind"


def _list_running(threads: set[threading.Thread], processes: set[int]) -> list[str]:
    """Return the new threads and child processes, except those of the test server."""
    started = distributed.child_pids() - processes - distributed.server_pids
    names = [
        repr(thread)
        for thread in threading.enumerate()
        if thread not in threads
        and type(thread).__name__ not in LIBRARY_THREADS
        and thread.name != "checkpoint lock"  # an engine locks its directory until `destroy`
    ]
    return names + [f"process {pid}" for pid in sorted(started)]
