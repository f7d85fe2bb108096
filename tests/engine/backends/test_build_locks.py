"""Locks of C++ builds: what `doctor` and the start of a DeepSpeed run report."""

import io
import logging
import os
from pathlib import Path

import pytest
import torch

import engine
from engine.backends.build_locks import find_build_locks
from engine.cli.main import main
from tests.testing.distributed import run_distributed_test


@pytest.fixture
def lock(tmp_path, monkeypatch):
    """Plant the lock that a killed build of DeepSpeed's FusedAdam leaves behind."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    path = tmp_path / "fused_adam" / "lock"
    path.parent.mkdir()
    path.touch()
    return path


def test_doctor_with_stale_lock_names_it(lock):
    out = io.StringIO()
    main(["doctor"], out, io.StringIO())
    (line,) = [line for line in out.getvalue().splitlines() if str(lock) in line]
    assert line.strip().startswith("no ")
    assert "no process on this host has it open" in line
    assert "Delete that file" in line


def test_build_lock_that_a_process_has_open_names_the_process(lock):
    with lock.open():
        (found,) = find_build_locks()
    assert (found.path, found.holder) == (lock, os.getpid())
    assert f"Process {os.getpid()} is building" in str(found)


def test_build_locks_in_the_default_directory_are_found(tmp_path, monkeypatch):
    from torch.utils import cpp_extension

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setattr(cpp_extension, "get_default_build_root", lambda: str(tmp_path))
    directory = cpp_extension._get_build_directory("some_op", verbose=False)
    lock = Path(directory, "lock")
    assert find_build_locks() == []
    lock.touch()
    assert [found.path for found in find_build_locks()] == [lock]


def train_muon(lock):
    """Start a run with Muon, which waits for the lock; check that a message precedes the wait."""
    from torch.utils.file_baton import FileBaton

    errors = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: errors.append(record.getMessage())
    logging.getLogger("onecycle").addHandler(handler)

    def wait(baton):
        assert baton.lock_file_path == lock
        assert any(lock in error for error in errors), "the run waits without a message"
        raise InterruptedError

    FileBaton.wait = wait
    config = {
        "train_batch_size": 4,
        "optimizer": {"type": "Muon", "params": {"lr": 0.01}},
        "zero_optimization": {"stage": 1},
        "engine": {"backend": "deepspeed"},
    }
    with pytest.raises(InterruptedError):
        engine.initialize(config=config, model=torch.nn.Linear(2, 1))


def test_start_of_muon_with_stale_lock_logs_it_before_waiting(lock):
    run_distributed_test(train_muon, 1, str(lock))
