"""Run many child processes from one thread.

A selector waits for all pipes at once, so the launcher does not need a thread per host.
"""

from __future__ import annotations

import itertools
import os
import selectors
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import IO, NamedTuple

from engine.errors import LaunchError
from engine.launch.open_files import raise_open_file_limit

__all__ = ["MAX_CONNECTING", "Child", "Children", "Finished", "run_commands"]

MAX_CONNECTING = 512
"""Maximum number of ssh clients that connect at the same time.

The key exchange of a connection takes 10 to 20 ms of the launcher's CPU time. With this limit, two
cores complete all key exchanges within the 8 seconds of ssh's ``ConnectTimeout``.
"""

_BURST = 16  # processes to start before output is read again
_CHUNK = 65536
_PIPES = 2  # per child: standard output, and standard input or error
_EXIT_TICK = 0.01  # seconds between two checks of a child that has closed its output


class Child:
    """A child process with non-blocking pipes. `Children.start` creates it."""

    def __init__(
        self, name: str, command: Sequence[str], selector: selectors.BaseSelector, *, is_agent: bool
    ) -> None:
        self.name = name
        self.errors = bytearray()
        self._selector = selector
        self._unsent = bytearray()
        self._process = subprocess.Popen(  # noqa: S603  # the user's own ssh
            command,
            bufsize=0,
            stdin=subprocess.PIPE if is_agent else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if is_agent else subprocess.PIPE,
            start_new_session=True,  # so that Ctrl-C interrupts only the launcher
        )
        self._input = self._process.stdin
        self._outputs: dict[int, IO[bytes]] = {}
        for stream in filter(None, (self._process.stdout, self._process.stderr)):
            os.set_blocking(stream.fileno(), False)
            selector.register(stream, selectors.EVENT_READ, self)
            self._outputs[stream.fileno()] = stream
        if self._input:
            os.set_blocking(self._input.fileno(), False)

    @property
    def returncode(self) -> int | None:
        """The return code at the most recent `poll`; None if the process was still running then."""
        return self._process.returncode

    @property
    def input_descriptor(self) -> int:
        """The file descriptor of the pipe to the standard input of the process."""
        assert self._input is not None
        return self._input.fileno()

    @property
    def has_closed_output(self) -> bool:
        """Whether the process has closed its output and all of that output has been read."""
        return not self._outputs

    def poll(self) -> int | None:
        """Return the return code, or None if the process is still running."""
        return self._process.poll()

    def send(self, data: bytes) -> None:
        """Send data to the standard input of the process, unless the pipe is closed."""
        self._unsent += data
        self.write()

    def write(self) -> None:
        """Write unsent data to the standard input of the process without blocking."""
        assert self._input is not None
        if self._input.closed:
            return
        try:
            del self._unsent[: os.write(self._input.fileno(), self._unsent)]
        except BlockingIOError:
            pass
        except OSError:
            self._unsent.clear()
        is_registered = self._input in self._selector.get_map()
        if self._unsent and not is_registered:
            self._selector.register(self._input, selectors.EVENT_WRITE, self)
        elif is_registered and not self._unsent:
            self._selector.unregister(self._input)

    def read(self, descriptor: int) -> bytes:
        """Read available data from an output pipe.

        If the pipe is standard output, return the data. If the pipe is standard error, append the
        data to `errors`, and return b"".

        Args:
            descriptor: file descriptor of the pipe.
        """
        stream = self._outputs[descriptor]
        try:
            data = os.read(descriptor, _CHUNK)
        except BlockingIOError:
            return b""
        if not data:
            self._selector.unregister(stream)
            stream.close()
            del self._outputs[descriptor]
        if stream is self._process.stdout:
            return data
        self.errors += data
        return b""

    def kill(self) -> None:
        """Kill the process, but not its descendants."""
        self._process.kill()

    def close(self) -> None:
        """Close all pipes, and wait until the process has exited."""
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None and not stream.closed:
                if stream in self._selector.get_map():
                    self._selector.unregister(stream)
                stream.close()
        self._outputs = {}
        self._process.wait()


class Children:
    """A group of child processes that are managed from one thread."""

    def __init__(self, most: int) -> None:
        """Raise the open-file limit, so that pipes can be opened for all child processes.

        Args:
            most: maximum number of child processes that run at the same time.

        Raises:
            LaunchError: if the hard limit on open files is too low.
        """
        raise_open_file_limit(_PIPES * most)
        self._selector = selectors.DefaultSelector()
        self._exiting: list[Child] = []  # children that have closed their output

    def start(self, name: str, command: Sequence[str], *, is_agent: bool = False) -> Child:
        """Start a child process, and return it.

        Args:
            name: name by which the caller identifies the process.
            command: command with its arguments.
            is_agent: whether the process is a launcher agent. An agent reads what `Child.send`
                sends, and its standard error is merged into standard output. Other processes have
                an empty standard input and a separate standard error.

        Raises:
            LaunchError: if the limit on the number of processes is reached.
        """
        try:
            return Child(name, command, self._selector, is_agent=is_agent)
        except BlockingIOError:
            raise LaunchError(
                f"Cannot start the process for {name}, because the process limit has been reached. "
                "Raise the limit with `ulimit -u`, or launch on fewer hosts."
            ) from None

    def wait(self, timeout: float) -> list[tuple[Child, bytes]]:
        """Wait until a child process prints output or exits.

        Args:
            timeout: maximum time in seconds.

        Returns:
            A pair (child, output) for each child that printed output or exited. The output is b""
            if the child has exited and all of its output has been read.
        """
        events = []
        for key, _ in self._selector.select(_EXIT_TICK if self._exiting else timeout):
            child: Child = key.data
            if key.events == selectors.EVENT_WRITE:
                child.write()
            elif data := child.read(key.fd):
                events.append((child, data))
            elif child.has_closed_output:
                self._exiting.append(child)
        exited = [each for each in self._exiting if each.poll() is not None]
        if exited:
            self._exiting = [each for each in self._exiting if each.returncode is None]
        for child in exited:
            child.close()
        return events + [(child, b"") for child in exited]

    def abandon(self, child: Child) -> None:
        """Kill a child process, and discard the rest of its output."""
        child.kill()
        child.close()
        self._exiting = [each for each in self._exiting if each is not child]


class Finished(NamedTuple):
    """Result of a command that `run_commands` has run."""

    returncode: int | None
    """The return code, as in `subprocess`; None if the command was killed after the timeout."""
    output: str
    errors: str


def run_commands(commands: Mapping[str, Sequence[str]], timeout: float) -> dict[str, Finished]:
    """Run commands, at most `MAX_CONNECTING` at the same time, and return their results by name.

    Args:
        commands: commands with their arguments, by name.
        timeout: time in seconds after which a command is killed.

    >>> run_commands({"a": ["echo", "x"], "b": ["sh", "-c", "echo y >&2; exit 3"]}, timeout=10)["b"]
    Finished(returncode=3, output='', errors='y\\n')
    """
    results = dict.fromkeys(commands, Finished(None, "", ""))
    waiting = iter(commands.items())
    running: dict[Child, tuple[float, bytearray]] = {}  # in the order of their deadlines
    children = Children(min(len(commands), MAX_CONNECTING))
    try:
        while True:
            started = list(itertools.islice(waiting, min(_BURST, MAX_CONNECTING - len(running))))
            for name, command in started:
                running[children.start(name, command)] = (time.monotonic() + timeout, bytearray())
            if not running:
                return results
            deadline, _ = next(iter(running.values()))
            patience = 0.0 if started else max(0.0, deadline - time.monotonic())
            for child, data in children.wait(patience):
                output = running[child][1]
                output += data
                if not data:
                    texts = (part.decode(errors="replace") for part in (output, child.errors))
                    results[child.name] = Finished(child.returncode, *texts)
                    del running[child]
            while running and next(iter(running.values()))[0] < time.monotonic():
                children.abandon(overdue := next(iter(running)))
                del running[overdue]
    finally:
        for child in running:
            children.abandon(child)
