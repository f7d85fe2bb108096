"""Run a launch plan: start the agents, print their output, and stop them if a rank fails."""

from __future__ import annotations

import contextlib
import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import IO, Literal, NamedTuple

from engine.launch.agent import STARTED
from engine.launch.failure import FAILURE_PREFIX, Failure, parse_failure
from engine.launch.plan import LaunchPlan, NodePlan
from engine.launch.state_machine import Action, LaunchStateMachine, Outcome

__all__ = ["report_outcome", "run"]

_PING_INTERVAL = 5.0
_PING = """import os, select, sys
while not select.select([0], [], [], float(sys.argv[1]))[0]:
    os.write(1, b"ping\\n")
"""
"""Program that writes pings to an agent until the launcher exits, which closes standard input."""
_TICK = 0.1
_KEPT_LINES = 50  # last lines of output that are kept per rank: a whole traceback
# SIGHUP does not exist on Windows.
_SIGNALS = tuple(
    signal.Signals[name] for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
)

Console = Literal["all", "rank0", "none"]


class _Report(NamedTuple):
    kind: Literal["started", "line", "ended"]
    host: str
    line: str = ""
    returncode: int = 0
    failure: Failure | None = None


class _Agent:
    """The local process for one host: the agent, or the ssh client that runs the agent there."""

    def __init__(self, plan: NodePlan, reports: queue.Queue[_Report]) -> None:
        self._host = plan.host
        self._reports = reports
        self._process = subprocess.Popen(  # noqa: S603  # the plan's command
            plan.transport,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that Ctrl-C interrupts only the launcher
        )
        self.send(json.dumps(plan.to_dict()))
        # The agent stops the job if it receives no pings. A separate process sends them even
        # while the launcher is stopped (Ctrl-Z), and does not receive signals of the terminal.
        self._pings = subprocess.Popen(  # noqa: S603  # the program above
            [sys.executable, "-I", "-S", "-c", _PING, str(_PING_INTERVAL)],
            stdin=subprocess.PIPE,
            stdout=self._process.stdin,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def send(self, line: str) -> None:
        """Send a line to the standard input of the agent. Do nothing if the agent has exited."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()

    def kill(self) -> None:
        """Kill the local process: the agent itself, or the ssh client."""
        self._process.kill()

    def _read(self) -> None:
        assert self._process.stdout is not None
        failure = None
        for raw in self._process.stdout:
            line = raw.decode(errors="replace").rstrip("\n")
            if line == STARTED:
                self._reports.put(_Report("started", self._host))
            elif FAILURE_PREFIX in line:
                failure = parse_failure(line) or failure
            else:
                self._reports.put(_Report("line", self._host, line))
        returncode = self._process.wait()
        self._pings.kill()
        self._pings.communicate()
        with contextlib.suppress(OSError):  # closing stdin flushes it, which can fail
            self._process.stdout.close()
            if self._process.stdin is not None:
                self._process.stdin.close()
        self._reports.put(_Report("ended", self._host, returncode=returncode, failure=failure))


class _Output:
    """Writer that prints the selected ranks' output and keeps the last lines of each rank and host.

    A separate thread prints the lines. The launcher can therefore react to events even if its
    output is a pipe that is read slowly.
    """

    def __init__(self, console: Console, out: IO[str]) -> None:
        self._console = console
        self._out = out
        self._kept: dict[str, deque[str]] = defaultdict(lambda: deque(maxlen=_KEPT_LINES))
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._print_lines, daemon=True)
        self._thread.start()

    def print(self, line: str, host: str) -> None:
        """Store an output line, and print it if the output of its rank is selected.

        Args:
            line: output line. A line of a rank starts with a prefix such as ``[node0:r1]``; a line
                of the agent has no prefix.
            host: host that the line comes from.

        Raises:
            OSError: if an earlier line could not be printed.
        """
        prefix = line[1:].partition("]")[0] if line.startswith("[") else ""
        source = prefix if ":r" in prefix else host
        self._kept[source].append(line)
        is_first = source == host or source.endswith(":r0")
        if self._console == "all" or (self._console == "rank0" and is_first):
            self._raise_error()
            self._lines.put(line)

    def close(self) -> None:
        """Wait until all lines have been printed.

        Raises:
            OSError: if a line could not be printed.
        """
        self._lines.put(None)
        self._thread.join()
        self._raise_error()

    def _print_lines(self) -> None:
        try:
            while (line := self._lines.get()) is not None:
                print(line, file=self._out, flush=True)
        except OSError as error:
            self._error = error

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def get_last_lines(self, source: str) -> tuple[str, ...]:
        """Return the last lines that a rank (``node0:r1``) or an agent (``node0``) printed."""
        return tuple(self._kept[source])


class _Runner:
    """Runner that reports events to the state machine and executes the actions that it returns."""

    def __init__(self, plan: LaunchPlan, console: Console, out: IO[str]) -> None:
        self._machine = LaunchStateMachine(plan)
        self._nodes = {node.host: node for node in plan.nodes}
        self._agents: dict[str, _Agent] = {}
        self._reports: queue.Queue[_Report] = queue.Queue()
        self.output = _Output(console, out)

    def run(self, signals: queue.SimpleQueue[int]) -> Outcome:
        """Start the agents of all hosts, and handle events until every agent has exited.

        Args:
            signals: queue of the numbers of the signals that the launcher receives.
        """
        self._execute(Action("start", host) for host in self._nodes)
        while not self._machine.is_over:
            with contextlib.suppress(queue.Empty):
                self._handle(self._reports.get(timeout=_TICK))
            now = time.monotonic()
            with contextlib.suppress(queue.Empty):
                self._execute(self._machine.signal_received(signals.get_nowait(), now))
            self._execute(self._machine.time_passed(now))
        outcome = self._machine.outcome
        return replace(outcome, last_lines=self.output.get_last_lines(outcome.source))

    def _handle(self, report: _Report) -> None:
        now = time.monotonic()
        if report.kind == "line":
            self.output.print(report.line, report.host)
        elif report.kind == "started":
            self._execute(self._machine.host_started(report.host, now))
        else:
            ended = self._machine.host_ended(report.host, report.returncode, report.failure, now)
            self._execute(ended)

    def _execute(self, actions: Iterable[Action]) -> None:
        for verb, host, text in actions:
            if verb == "start":
                self._agents[host] = _Agent(self._nodes[host], self._reports)
            elif verb == "send":
                self._agents[host].send(text)
            elif verb == "kill":
                self._agents[host].kill()
            else:
                self.output.print(text, host)


def run(plan: LaunchPlan, console: Console, out: IO[str]) -> Outcome:
    """Run a launch plan until the agent of every host has exited, and return the outcome.

    Args:
        plan: plan to run.
        console: ranks whose output is printed: "all", "rank0" or "none". In any case, the outcome
            contains the last lines of the first failed rank.
        out: stream to which the output of the ranks is printed.
    """
    runner = _Runner(plan, console, out)
    with _catch_signals() as signals, _serve_store(plan.store_port):
        outcome = runner.run(signals)
    runner.output.close()  # after the handlers are restored: a signal ends the wait for a reader
    return outcome


def report_outcome(outcome: Outcome) -> int:
    """Print why a launch failed and the last output lines, and return the exit status."""
    for line in outcome.last_lines:
        print(line, file=sys.stderr)
    if outcome.reason:
        print(f"onecycle launch: first failure: {outcome.reason}", file=sys.stderr, flush=True)
    return outcome.status


@contextlib.contextmanager
def _catch_signals() -> Iterator[queue.SimpleQueue[int]]:
    """Collect signals in a queue inside this context, so that they do not end this process.

    In threads other than the main thread, the queue stays empty, because Python does not allow
    signal handlers there.
    """
    caught: queue.SimpleQueue[int] = queue.SimpleQueue()
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    handlers = {
        number: signal.signal(number, lambda caught_number, _: caught.put(caught_number))
        for number in _SIGNALS
    }
    try:
        yield caught
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _serve_store(port: int | None) -> Iterator[None]:
    """Serve the rendezvous store on ``port`` inside this context, unless ``port`` is None."""
    store = None
    if port is not None:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but missing from the stubs

        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    yield
    del store
