"""A host's end of a launch: runs one group of workers, and leaves nothing behind.

The first line of standard input is the job as JSON; after it come ``ping`` and ``term``. The agent
stops the job on ``term``, on a signal, when its input ends (the launcher died) and after 30 seconds
of silence (the launcher cannot be reached). Its output is the job's, line by line.
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

__all__ = ["BEGUN", "descendants", "main"]

BEGUN = "\x1eonecycle-begun"
"""A line that says that a job that may come back has begun."""

_SILENCE = 30.0
_MASK = "CUDA_VISIBLE_DEVICES"
_SUBREAPER, _PARENT_DEATH = 36, 1  # prctl's


class _Job:
    """The workers, by way of the process that started them."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._grace = float(spec["grace"])
        self._stopping_since: float | None = None
        self.process = subprocess.Popen(  # noqa: S603  # what the launcher asks for
            spec["argv"],
            env=os.environ | _with_own_mask(spec["env"]),
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
        while left := descendants(os.getpid()):
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
    if not told:
        return 128 + signal.SIGTERM  # the launcher has ended before it said anything
    spec = json.loads(told)
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda caught, _: asked.append(caught))
    lock = _lock(spec.get("lock"), asked)
    if asked:
        return 128 + asked[0]
    if lock is not None:
        # Whole, and before the job has said a word.
        os.write(sys.stdout.fileno(), f"{BEGUN}\n".encode())
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


def _lock(name: str | None, asked: list[int]) -> IO[str] | None:
    """Wait until the agent that this host had before, cut off from the launcher, has ended.

    The file stays: a lock on one that is gone would keep nobody out.

    Args:
        name: of the lock; None: there is nobody to wait for.
        asked: signals; SIGTERM is added when the launcher wants an end meanwhile, or is gone.
    """
    if name is None:
        return None
    file = Path(tempfile.gettempdir(), f"{name}.lock").open("w")  # noqa: SIM115  # held to the end
    while not asked and not _is_ours(file):
        ready, _, _ = select.select([sys.stdin.fileno()], [], [], 0.1)
        words = os.read(ready[0], 4096) if ready else b"ping"
        if not words or b"term" in words or b"kill" in words:
            asked.append(signal.SIGTERM)
    return file


def _with_own_mask(env: dict[str, str]) -> dict[str, str]:
    """Return an environment whose slots are those of the devices that this host lets be seen."""
    own = [each.strip() for each in os.environ.get(_MASK, "").split(",") if each.strip()]
    if not own or _MASK not in env:
        return env
    slots = [int(slot) for slot in env[_MASK].split(",")]
    if max(slots) >= len(own):
        raise SystemExit(
            f"slot {max(slots)} must be one of the {len(own)} devices that {_MASK} of this host "
            f"shows ({', '.join(own)}); include fewer, or unset it there."
        )
    return env | {_MASK: ",".join(own[slot] for slot in slots)}


def _is_ours(file: IO[str]) -> bool:
    import fcntl  # not on Windows, where others read this file

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


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


def descendants(root: int) -> list[int]:
    """Return all processes below one, of whatever session; none where there is no ``/proc``."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
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
