"""A lock that prevents two jobs from writing to the same checkpoint directory."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError

__all__ = ["DirectoryLock"]

_NAME = ".lock"
_BEAT_SECONDS = 10.0
_STALE_SECONDS = 60.0
_WRITE_SECONDS = 5.0


class DirectoryLock:
    """Lock on a directory, held until `release` is called or the process exits.

    The file ``.lock`` identifies the process that owns the lock. Another process can acquire the
    lock after the owner has exited.

    A process on another host cannot see whether the owner has exited. Therefore, the process
    watches the file for 60 seconds, and acquires the lock only if the owner does not update the
    file. If the process and the owner belong to the same Slurm job, the process skips the wait and
    assumes that the owner has exited.

    Reading checkpoints does not require the lock.

    Args:
        directory: existing directory.

    Raises:
        CheckpointError: if another process holds the lock.
        OSError: if the directory is not writable.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / _NAME
        self._owner = _describe_process()
        self._stop = threading.Event()
        self._finalizer = weakref.finalize(self, _release, self._path, self._owner, self._stop)
        self._lock()

    def renew(self) -> None:
        """Lock the directory again if the directory or the lock file was deleted.

        Raises:
            CheckpointError: another process holds the lock.
            OSError: the directory cannot be created, or is not writable.
        """
        if not _is_owner(self._path, self._owner):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._lock()

    def _lock(self) -> None:
        _acquire(self._path, self._owner)
        arguments = self._path, self._owner, self._stop
        self._thread = threading.Thread(
            target=_beat, args=arguments, name="checkpoint lock", daemon=True
        )
        self._thread.start()

    def release(self) -> None:
        """Remove the lock, unless another process has acquired it."""
        self._stop.set()
        self._thread.join()
        self._finalizer()


def _acquire(path: Path, own: Mapping[str, Any]) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            json.dump(own, file)
    except FileExistsError:
        owner = _read(path)
        if owner is not None and not _is_stale(path, owner, own):
            raise CheckpointError(
                f"{path.parent} is in use: process {owner.get('pid')} on host "
                f"{owner.get('host')} is writing checkpoints to this directory. Use another "
                "directory, or stop that process."
            ) from None
        _write(path, own)
        time.sleep(0.05)  # if two processes acquire the lock together, the last one owns it
        if not _is_owner(path, own):
            _acquire(path, own)


def _beat(path: Path, own: Mapping[str, Any], stop: threading.Event) -> None:
    """Rewrite the lock file regularly to show other hosts that this process is running."""
    beats = 0
    while not stop.wait(_BEAT_SECONDS):
        beats += 1
        try:
            if not _is_owner(path, own):
                return
            _write(path, {**own, "beats": beats})
        except OSError:  # the disk is full or the directory is gone; saving reports it
            continue


def _release(path: Path, own: Mapping[str, Any], stop: threading.Event) -> None:
    stop.set()
    if _is_owner(path, own):
        path.unlink(missing_ok=True)


def _describe_process() -> dict[str, Any]:
    return {
        "id": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "boot": _read_text("/proc/sys/kernel/random/boot_id"),
        "pid": os.getpid(),
        "start": _find_start_time(os.getpid()),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "beats": 0,
    }


def _is_stale(path: Path, owner: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    """Return whether the process that owns a lock has exited. The check takes up to 60 seconds."""
    if not owner:  # its process is writing the file, or was killed while it did
        time.sleep(_WRITE_SECONDS)
        return not _read(path)
    if owner.get("host") == own["host"] and os.name == "posix":
        return (
            owner.get("boot") != own["boot"]
            or owner.get("pid") == own["pid"]  # another engine of this process
            or not _is_running(owner)
        )
    if own["slurm_job"] is not None and owner.get("slurm_job") == own["slurm_job"]:
        return True
    end = time.monotonic() + _STALE_SECONDS
    while time.monotonic() < end:
        time.sleep(_STALE_SECONDS / 60)
        if _read(path) != owner:
            return False
    return True


def _is_running(owner: Mapping[str, Any]) -> bool:
    pid = owner.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # the process belongs to another user
    return _find_start_time(pid) == owner.get("start")  # otherwise, the ID was reused


def _find_start_time(pid: int) -> str | None:
    """Return the start time of a process in clock ticks since boot, or None if it is unknown."""
    stat = _read_text(f"/proc/{pid}/stat")
    fields = stat.rpartition(")")[2].split()  # the name in parentheses can contain spaces
    # A zombie has ended, but its parent has not read the exit status yet.
    return fields[19] if len(fields) > 19 and fields[0] != "Z" else None


def _is_owner(path: Path, own: Mapping[str, Any]) -> bool:
    owner = _read(path)
    return owner is not None and owner.get("id") == own["id"]


def _read(path: Path) -> dict[str, Any] | None:
    """Return the contents of a lock file, None if it does not exist, or {} if it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, own: Mapping[str, Any]) -> None:
    temporary = path.with_name(f"{_NAME}.{own['id']}")
    temporary.write_text(json.dumps(own), encoding="utf-8")
    temporary.replace(path)


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""
