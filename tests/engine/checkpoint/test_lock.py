"""Two jobs cannot write to one checkpoint directory, and a dead job does not keep it."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from engine.checkpoint import lock, storage
from engine.checkpoint.lock import DirectoryLock
from engine.errors import CheckpointError
from tests.engine.checkpoint.test_pruning import start, train

HOLD = """
    import sys, time
    from pathlib import Path
    from engine.checkpoint.lock import DirectoryLock
    held = DirectoryLock(Path(sys.argv[1]))
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other_process(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(HOLD), tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def read_owner(directory):
    return json.loads((directory / ".lock").read_text())


def change_owner(directory, **values):
    (directory / ".lock").write_text(json.dumps(read_owner(directory) | values))


def test_directory_of_a_running_process_is_refused_until_it_ends(tmp_path, other_process):
    with pytest.raises(CheckpointError, match=f"in use: process {other_process.pid} on host"):
        DirectoryLock(tmp_path)
    other_process.kill()
    other_process.wait()
    held = DirectoryLock(tmp_path)
    assert read_owner(tmp_path)["pid"] == os.getpid()
    held.release()
    assert not list(tmp_path.iterdir())


def test_number_of_a_dead_process_that_is_used_again_does_not_keep_the_lock(
    tmp_path, other_process
):
    change_owner(tmp_path, start="1")
    DirectoryLock(tmp_path).release()


def test_another_engine_of_the_same_process_takes_the_lock_over(tmp_path):
    first, second = DirectoryLock(tmp_path), DirectoryLock(tmp_path)
    first.release()
    assert read_owner(tmp_path)["pid"] == os.getpid()
    second.release()
    assert not list(tmp_path.iterdir())


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """A lock of another host, in a time that passes a hundred times faster."""
    monkeypatch.setattr(lock, "_STALE_SECONDS", 0.6)
    held = DirectoryLock(tmp_path)
    change_owner(tmp_path, host="elsewhere", id="other", slurm_job="7")
    held.release()
    return tmp_path


def test_lock_of_another_host_without_a_heartbeat_is_taken_over(foreign):
    DirectoryLock(foreign).release()
    assert not list(foreign.iterdir())


def test_lock_of_another_host_with_a_heartbeat_is_refused(foreign):
    beat = threading.Timer(0.2, change_owner, (foreign,), {"beats": 1})
    beat.start()
    with pytest.raises(CheckpointError, match="on host elsewhere"):
        DirectoryLock(foreign)
    beat.join()


def test_requeued_slurm_job_takes_its_lock_over_at_once(foreign, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(lock, "_STALE_SECONDS", 1e9)
    DirectoryLock(foreign).release()


def test_heartbeat_changes_the_lock_until_it_is_released(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_BEAT_SECONDS", 0.01)
    held = DirectoryLock(tmp_path)
    while read_owner(tmp_path)["beats"] < 2:
        pass
    held.release()
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"pid": "x"}'])
def test_damaged_lock_is_taken_over(tmp_path, monkeypatch, text):
    monkeypatch.setattr(lock, "_WRITE_SECONDS", 0.1)
    monkeypatch.setattr(lock, "_STALE_SECONDS", 0.1)
    (tmp_path / ".lock").write_text(text)
    DirectoryLock(tmp_path).release()


def test_renewed_lock_of_a_deleted_directory_is_held_and_keeps_its_heartbeat(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_BEAT_SECONDS", 0.05)
    directory = tmp_path / "checkpoints"
    directory.mkdir()
    held = DirectoryLock(directory)
    shutil.rmtree(directory)
    held.renew()
    first = read_owner(directory)
    time.sleep(0.3)
    assert read_owner(directory)["beats"] > first.get("beats", 0)
    held.release()
    assert not (directory / ".lock").exists()


def test_directory_that_another_process_uses_after_its_deletion_is_refused(tmp_path, other_process):
    directory = tmp_path / "own"
    directory.mkdir()
    held = DirectoryLock(directory)
    shutil.copy(tmp_path / ".lock", directory)  # the directory was deleted and locked again
    with pytest.raises(CheckpointError, match=f"process {other_process.pid}"):
        held.renew()
    held.release()


def test_save_after_the_directory_was_deleted_writes_a_complete_checkpoint(tmp_path):
    trainer = train(start(tmp_path / "checkpoints", keep=None), 4)
    shutil.rmtree(tmp_path / "checkpoints")
    train(trainer, 2).destroy()
    [(path, manifest)] = storage.list_checkpoints(tmp_path / "checkpoints")
    assert (path.name, manifest.step) == ("global_step6", 6)
