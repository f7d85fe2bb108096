"""A host's end of a launch: runs one group of workers, and leaves nothing behind.

The first line of standard input is the job as JSON; after it come ``ping`` and ``term``. The agent
stops the job on ``term``, on a signal, when its input ends (the launcher died) and after 30 seconds
of silence (the launcher cannot be reached). Its output is the job's, line by line.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["main"]

_SILENCE = 30.0
_SUBREAPER, _PARENT_DEATH = 36, 1  # prctl's


class _Job:
    """The workers, by way of the process that started them."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._grace = float(spec["grace"])
        self._stopping_since: float | None = None
        self.process = subprocess.Popen(  # noqa: S603  # what the launcher asks for
            spec["argv"],
            env=os.environ | spec["env"],
            cwd=spec["cwd"],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_dies_with_parent,  # noqa: PLW1509  # no threads are here
        )

    def stop(self) -> None:
        """Ask it to end; workers may save."""
        if self._stopping_since is None:
            self._stopping_since = time.monotonic()
            with contextlib.suppress(ProcessLookupError):
                self.process.terminate()

    def hurry(self) -> None:
        """Kill what is left once its time is over."""
        since = self._stopping_since
        if since is not None and time.monotonic() - since > self._grace:
            self.kill()

    def kill(self) -> None:
        """Kill all that has come from this process, its own sessions included."""
        while left := _descendants(os.getpid()):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
            self.process.poll()
            for pid in left:
                if pid != self.process.pid:  # whose status is wanted
                    with contextlib.suppress(ChildProcessError):
                        os.waitpid(pid, os.WNOHANG)


def main() -> int:
    """Run the job that standard input describes; return its status."""
    _prctl(_SUBREAPER)
    told, words = _first_line(sys.stdin.fileno())
    spec = json.loads(told)
    with _alone(spec.get("lock")):
        return _run(spec, words)


def _run(spec: dict[str, Any], words: bytes) -> int:
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda caught, _: asked.append(caught))
    job = _Job(spec)
    heard = time.monotonic()
    listens_to = [sys.stdin.fileno()]
    while job.process.poll() is None:
        if b"term" in words:
            job.stop()
        if b"kill" in words:
            job.kill()
        words = b""
        ready, _, _ = select.select(listens_to, [], [], 0.1)
        if ready:
            heard = time.monotonic()
            words = os.read(ready[0], 4096)
            if not words:  # the launcher is gone
                job.stop()
                listens_to = []
        if asked or time.monotonic() - heard > _SILENCE:
            job.stop()
        job.hurry()
    status = job.process.returncode
    job.kill()
    return status if status >= 0 else 128 - status


@contextlib.contextmanager
def _alone(lock: str | None) -> Iterator[None]:
    """Wait until the agent that this host had before, cut off from the launcher, has ended."""
    if lock is None:
        yield
        return
    path = Path(tempfile.gettempdir(), f"{lock}.lock")
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        path.unlink(missing_ok=True)


def _first_line(descriptor: int) -> tuple[bytes, bytes]:
    """Return the first line and what came behind it; no buffer may keep a word from `select`."""
    read = b""
    while b"\n" not in read:
        more = os.read(descriptor, 65536)
        if not more:
            break
        read += more
    line, _, rest = read.partition(b"\n")
    return line, rest


def _dies_with_parent() -> None:
    _prctl(_PARENT_DEATH, signal.SIGTERM)


def _prctl(option: int, value: int = 1) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _descendants(root: int) -> list[int]:
    """Return all processes below one, of whatever session."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if fields[0] != "Z":
                    parents[int(entry.name)] = int(fields[1])
    found = {root}
    grown = True
    while grown:
        below = {pid for pid, parent in parents.items() if parent in found} - found
        grown = bool(below)
        found |= below
    return sorted(found - {root})


if __name__ == "__main__":
    sys.exit(main())
