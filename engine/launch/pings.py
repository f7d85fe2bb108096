"""Send pings to the launcher's agents on all hosts from a separate process.

An agent that receives no input for a while stops its job. The separate process does not receive
signals from the terminal, so it sends pings even while the launcher is suspended (Ctrl-Z). When the
launcher exits, the separate process also exits, which closes the standard input of every agent.

The separate process runs this file without importing onecycle, so it starts quickly.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import time

__all__ = ["Pinger", "main"]

_PING = b"ping\n"
_PASSED_AT_ONCE = 64


class Pinger:
    """A handle to the process that sends the pings."""

    def __init__(self, interval: float) -> None:
        """Start the process that sends the pings.

        Args:
            interval: time between pings, in seconds.
        """
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603  # this file
                [sys.executable, "-I", "-S", __file__, str(interval)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )

    def add(self, descriptor: int) -> None:
        """Start sending pings to a pipe. Pings stop when the reader of the pipe exits.

        Args:
            descriptor: file descriptor of the pipe. The caller may close the descriptor afterward.
        """
        with contextlib.suppress(OSError):  # the process was killed; the agents end their jobs
            socket.send_fds(self._socket, [b"."], [descriptor])

    def close(self) -> None:
        """End the process that sends the pings."""
        self._socket.close()
        self._process.kill()
        self._process.wait()


def main() -> None:
    """Send pings to the pipes that the launcher passes, until the launcher exits."""
    interval = float(sys.argv[1])
    pipes: list[int] = []
    next_time = time.monotonic() + interval
    with socket.socket(fileno=0) as launcher:
        while True:
            wait = max(0.0, next_time - time.monotonic())
            if select.select([launcher], [], [], wait)[0]:
                data, descriptors, *_ = socket.recv_fds(launcher, _PASSED_AT_ONCE, _PASSED_AT_ONCE)
                if not data:
                    return
                pipes += descriptors
            if time.monotonic() >= next_time:
                pipes = [pipe for pipe in pipes if _write_ping(pipe)]
                next_time = time.monotonic() + interval


def _write_ping(pipe: int) -> bool:
    """Write a ping to a pipe, and return whether the pipe still has a reader."""
    try:
        os.write(pipe, _PING)
    except BlockingIOError:  # the agent does not read, but it has input
        return True
    except OSError:
        os.close(pipe)
        return False
    return True


if __name__ == "__main__":
    main()
