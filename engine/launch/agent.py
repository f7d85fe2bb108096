"""Run a job on this host. When the job ends, kill its remaining processes.

The launcher starts this agent on each host. The agent reads the job as JSON from the first line of
standard input. Each later line is ``ping``, ``term`` or ``kill``. On ``kill``, the agent kills the
job immediately. In the following cases, the agent sends SIGTERM to the job, and kills the job after
a grace period:

- it reads ``term`` or receives a signal;
- standard input is closed, because the launcher has exited;
- it receives no input for 30 seconds, because the launcher is unreachable.

The job writes its output to the standard output of the agent.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from engine.distributed.environment import to_exit_status
from engine.launch.torchrun import remove_directory

__all__ = ["STARTED", "find_descendants", "main", "map_slots_to_devices"]

STARTED = "\x1eonecycle-started"
"""Line that the agent prints immediately before it starts the job."""

_MAX_SILENCE = 30.0
_MASK = "CUDA_VISIBLE_DEVICES"
_SUBREAPER, _PARENT_DEATH = 36, 1  # PR_SET_CHILD_SUBREAPER and PR_SET_PDEATHSIG of prctl


class _Commands:
    """The commands that the launcher writes to the standard input of this agent.

    Args:
        descriptor: file descriptor of the standard input.
        unread: bytes that have been read from the descriptor, but not yet parsed.
    """

    def __init__(self, descriptor: int, unread: bytes) -> None:
        self._inputs = [descriptor]
        self._unread = unread
        self._silence = 0.0  # seconds

    @property
    def is_launcher_lost(self) -> bool:
        """Whether the launcher has exited, or has sent nothing for 30 seconds."""
        return not self._inputs or self._silence > _MAX_SILENCE

    def read(self) -> set[bytes]:
        """Wait up to 0.1 seconds for input, and return the commands that are complete."""
        before = time.monotonic()
        ready, _, _ = select.select(self._inputs, [], [], 0.1)
        # Do not count the time during which this host was suspended.
        self._silence += min(time.monotonic() - before, 1.0)
        if ready:
            self._silence = 0.0
            more = os.read(ready[0], 4096)
            self._unread += more
            if not more:
                self._inputs = []  # the launcher has exited
        *lines, self._unread = self._unread.split(b"\n")
        return set(lines)


class _Job:
    """The torchrun process of this host, and the ranks that it starts."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._grace = float(spec["grace"])
        self._stopping_since: float | None = None
        self.process = subprocess.Popen(  # noqa: S603  # the launcher's command
            spec["argv"],
            env=os.environ | map_slots_to_devices(spec["env"]),
            cwd=spec["cwd"],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_die_with_parent,  # noqa: PLW1509  # this process has no threads
        )

    def stop(self) -> None:
        """Send SIGTERM to the job, so that the ranks can save a checkpoint before they exit."""
        if self._stopping_since is None:
            self._stopping_since = time.monotonic()
            with contextlib.suppress(ProcessLookupError):
                self.process.terminate()

    def kill_if_overdue(self) -> None:
        """Kill the job if the grace period after `stop` has ended."""
        since = self._stopping_since
        if since is not None and time.monotonic() - since > self._grace:
            self.kill()

    def kill(self) -> None:
        """Kill all descendants of this process, including processes in other sessions."""
        while left := find_descendants(os.getpid()):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
            self.process.poll()
            for pid in left:
                if pid != self.process.pid:  # `Popen` must read its exit status
                    with contextlib.suppress(ChildProcessError):
                        os.waitpid(pid, os.WNOHANG)


def main() -> int:
    """Read a job from standard input and run it. Return the exit status of the job."""
    _prctl(_SUBREAPER)
    line, rest = _read_first_line(sys.stdin.fileno())
    if not line:
        return to_exit_status(-signal.SIGTERM)  # the launcher exited before it sent the job
    spec = json.loads(line)
    commands = _Commands(sys.stdin.fileno(), rest)
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda caught, _: signals.append(caught))
    lock = _wait_for_lock(spec.get("lock"), commands, signals)  # noqa: F841  # held until this process exits
    if signals:
        return to_exit_status(-signals[0])
    # Write without buffering, so that the job's output cannot come before or inside this line.
    os.write(sys.stdout.fileno(), f"{STARTED}\n".encode())
    job = _Job(spec)
    _watch(job, commands, signals)
    status = to_exit_status(job.process.returncode)
    job.kill()
    remove_directory(job.process.pid)
    return status


def _watch(job: _Job, commands: _Commands, signals: list[int]) -> None:
    """Wait until the job exits. Stop it on request or if the launcher is unreachable.

    Args:
        job: running job.
        commands: commands from the launcher.
        signals: received signals. The signal handlers append to this list.
    """
    while job.process.poll() is None:
        received = commands.read()
        if b"term" in received or commands.is_launcher_lost or signals:
            job.stop()
        if b"kill" in received:
            job.kill()
        job.kill_if_overdue()


def _wait_for_lock(name: str | None, commands: _Commands, signals: list[int]) -> IO[str] | None:
    """Acquire a lock. If an earlier agent holds the lock, wait until that agent exits.

    The lock file is never deleted: if it were, another process could create and lock a new file
    with the same name while this process still holds the lock on the deleted file.

    Args:
        name: name of the lock; None if no lock is needed.
        commands: commands from the launcher.
        signals: received signals. Any signal ends the wait. If the launcher stops the job or is
            unreachable, SIGTERM is appended.

    Returns:
        The open lock file, or None if no lock is needed. If a signal ended the wait, the file might
        not be locked.
    """
    if name is None:
        return None
    file = Path(tempfile.gettempdir(), f"{name}.lock").open("w")  # noqa: SIM115  # the lock is held until this process exits
    while not signals and not _try_lock(file):
        received = commands.read()
        if commands.is_launcher_lost or b"term" in received or b"kill" in received:
            signals.append(signal.SIGTERM)
    return file


def map_slots_to_devices(env: dict[str, str]) -> dict[str, str]:
    """Replace each slot number in the job's `CUDA_VISIBLE_DEVICES` with a device of this host.

    Slot n is entry n, counted from 0, of the host's own `CUDA_VISIBLE_DEVICES`. If the host does
    not set this variable, slot n is device n.

    Args:
        env: environment variables of the job.

    Returns:
        The environment variables with the updated `CUDA_VISIBLE_DEVICES`.

    Raises:
        SystemExit: if a slot refers to a device that is not visible.
    """
    own = [each.strip() for each in os.environ.get(_MASK, "").split(",") if each.strip()]
    if not own or _MASK not in env:
        return env
    slots = [int(slot) for slot in env[_MASK].split(",")]
    if max(slots) >= len(own):
        raise SystemExit(
            f"Slot {max(slots)} does not exist on this host, because {_MASK} is {','.join(own)}. "
            f"Select only slots below {len(own)}, or unset {_MASK} on this host."
        )
    return env | {_MASK: ",".join(own[slot] for slot in slots)}


def _try_lock(file: IO[str]) -> bool:
    import fcntl  # fcntl does not exist on Windows, where `lr-test` imports this module

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read_first_line(descriptor: int) -> tuple[bytes, bytes]:
    """Read the first line from a file descriptor. Return it and any bytes read beyond it.

    The function does not use Python's buffered input, because `select` does not detect buffered
    data.
    """
    read = b""
    while b"\n" not in read:
        more = os.read(descriptor, 65536)
        if not more:
            break
        read += more
    line, _, rest = read.partition(b"\n")
    return line, rest


def _die_with_parent() -> None:
    _prctl(_PARENT_DEATH, signal.SIGTERM)


def _prctl(option: int, value: int = 1) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def find_descendants(root: int) -> list[int]:
    """Return the IDs of all descendants of a process, including processes in other sessions.

    Without ``/proc``, the list is empty.
    """
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if fields[0] != "Z":
                parents[int(entry.name)] = int(fields[1])
    found = {root}
    grown = True
    while grown:
        children = {pid for pid, parent in parents.items() if parent in found} - found
        grown = bool(children)
        found |= children
    return sorted(found - {root})


if __name__ == "__main__":
    sys.exit(main())
