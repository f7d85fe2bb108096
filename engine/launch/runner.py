"""Run a launch plan: start an agent on each host, and stop all agents if a rank fails."""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import signal
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import IO, Literal

from engine.launch.agent import STARTED
from engine.launch.failure import FAILURE_PREFIX, Failure, parse_failure
from engine.launch.open_files import raise_open_file_limit
from engine.launch.pings import Pinger
from engine.launch.plan import LaunchPlan
from engine.launch.processes import MAX_CONNECTING, Child, Children
from engine.launch.state_machine import Action, LaunchStateMachine, Outcome

__all__ = ["report_outcome", "run"]

_PING_INTERVAL = 5.0
_TICK = 0.1
_BURST = 16  # agents to start before events are handled again
_FILES_PER_HOST = 4  # two pipes, and two connections to the store
_KEPT_LINES = 50  # last lines of output that are kept per rank: a whole traceback
_VISIBLE_LINES = 20  # lines that are still easy to find, with as many others between or after them
# SIGHUP does not exist on Windows.
_SIGNALS = tuple(
    signal.Signals[name] for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
)

Console = Literal["all", "rank0", "none"]


class _Agent:
    """Child process that runs the agent of one host, locally or over ssh."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self.failure: Failure | None = None
        self._line: list[bytes] = []

    def split_lines(self, data: bytes) -> Iterator[str]:
        """Buffer new output, and yield each line that is complete.

        Args:
            data: new output. Pass b"" at the end to also yield an incomplete last line.
        """
        first, *others = data.split(b"\n")
        self._line.append(first)
        for part in others or ([b""] if not data and any(self._line) else []):
            yield b"".join(self._line).decode(errors="replace")
            self._line = [part]


class _Output:
    """Writer that prints the output of ranks and agents, and stores the last lines of each.

    A separate thread prints the lines, so the launcher can react to events while printing is
    blocked.
    """

    def __init__(self, console: Console, out: IO[str]) -> None:
        self._console = console
        self._out = out
        # Each line is stored with the number of lines sent to the console before it.
        self._kept: dict[str, deque[tuple[float, str]]] = defaultdict(
            lambda: deque(maxlen=_KEPT_LINES)
        )
        self._sent = 0  # number of lines sent to the console
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._print_lines, daemon=True)
        self._thread.start()

    def print(self, line: str, host: str) -> None:
        """Store an output line, and print it unless the console setting excludes it.

        Args:
            line: output line. Lines from ranks start with a prefix such as ``[node0:r1]``. All
                other lines are from the agent.
            host: host that the line comes from.

        Raises:
            OSError: if an earlier line could not be printed.
        """
        prefix = line[1:].partition("]")[0] if line.startswith("[") else ""
        source = prefix if ":r" in prefix else host
        is_rank0 = ":r" not in source or source.endswith(":r0")
        is_sent = self._console == "all" or (self._console == "rank0" and is_rank0)
        self._kept[source].append((self._sent if is_sent else -math.inf, line))
        if is_sent:
            self._raise_error()
            self._sent += 1
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
        """Return the last output lines of a rank (``node0:r1``) or an agent (``node0``).

        Return no lines if the console has just shown them, with few other lines between or after
        the last of them. If standard error is redirected to another file, return the lines anyway.
        """
        kept = list(self._kept[source])
        last = kept[-_VISIBLE_LINES:]
        others = self._sent - last[0][0] - len(last) if last else 0
        is_visible = others <= _VISIBLE_LINES and _is_same_file(self._out, sys.stderr)
        return () if is_visible else tuple(line for _, line in kept)


def _is_same_file(first: IO[str], second: IO[str]) -> bool:
    """Return whether two streams write to the same file, terminal or pipe."""
    try:
        return os.path.sameopenfile(first.fileno(), second.fileno())
    except (OSError, ValueError):  # a stream without a file, or a closed one
        return False


class _Runner:
    """Runner that reports events to a `LaunchStateMachine` and executes the actions it returns."""

    def __init__(self, plan: LaunchPlan, console: Console, out: IO[str]) -> None:
        self._machine = LaunchStateMachine(plan)
        self._nodes = {node.host: node for node in plan.nodes}
        self._children = Children(len(plan.nodes))
        self._waiting = dict.fromkeys(self._nodes)  # hosts whose agent must be started, in order
        self._connecting: set[str] = set()  # hosts whose agent has not started its job yet
        self._agents: dict[str, _Agent] = {}
        self.output = _Output(console, out)

    def run(self, signals: queue.SimpleQueue[int], pinger: Pinger) -> Outcome:
        """Start all agents, handle events until every agent has exited, and return the outcome.

        Args:
            signals: queue with the number of each signal that the launcher receives.
            pinger: handle to the process that sends pings to the agents.
        """
        while not self._machine.is_over:
            is_starting = self._start_agents()
            for child, data in self._children.wait(0.0 if is_starting else _TICK):
                self._handle(self._agents[child.name], data, pinger)
            now = time.monotonic()
            with contextlib.suppress(queue.Empty):
                self._execute(self._machine.signal_received(signals.get_nowait(), now))
            self._execute(self._machine.time_passed(now))
        outcome = self._machine.outcome
        return replace(outcome, last_lines=self.output.get_last_lines(outcome.source))

    def _start_agents(self) -> bool:
        """Start the next few agents, and return whether any agent was started.

        Each call starts only a few agents, so that the launcher can handle events between calls.
        """
        free = MAX_CONNECTING - len(self._connecting)
        hosts = list(islice(self._waiting, min(_BURST, free)))
        for host in hosts:
            node = self._nodes[host]
            child = self._children.start(host, node.transport, is_agent=True)
            child.send(json.dumps(node.to_dict()).encode() + b"\n")
            self._agents[host] = _Agent(child)
            self._connecting.add(host)
            del self._waiting[host]
        return bool(hosts)

    def _handle(self, agent: _Agent, data: bytes, pinger: Pinger) -> None:
        host, now = agent.child.name, time.monotonic()
        for line in agent.split_lines(data):
            if line == STARTED:
                self._connecting.discard(host)
                pinger.add(agent.child.input_descriptor)
                self._execute(self._machine.host_started(host, now))
            elif FAILURE_PREFIX in line:
                agent.failure = parse_failure(line) or agent.failure
            else:
                self.output.print(line, host)
        if not data:
            self._connecting.discard(host)
            returncode = agent.child.returncode
            assert returncode is not None
            self._execute(self._machine.host_ended(host, returncode, agent.failure, now))

    def _execute(self, actions: Iterable[Action]) -> None:
        for verb, host, text in actions:
            if verb == "start":
                self._waiting[host] = None
            elif verb == "print":
                self.output.print(text, host)
            elif host in self._waiting:  # there is no process to stop yet
                del self._waiting[host]
                now = time.monotonic()
                self._execute(self._machine.host_ended(host, -signal.SIGTERM, None, now))
            elif verb == "send":
                self._agents[host].child.send(text.encode() + b"\n")
            else:
                self._agents[host].child.kill()


def run(plan: LaunchPlan, console: Console, out: IO[str]) -> Outcome:
    """Run a launch plan until the agent of every host has exited, and return the outcome.

    The outcome contains the last output lines of the rank or agent that failed first. The lines
    are omitted if the console has just shown them.

    Args:
        plan: plan to run.
        console: ranks whose output to print: "all", "rank0" or "none".
        out: stream to print the output to.

    Raises:
        LaunchError: if the limit on open files or processes is too low for this many hosts.
    """
    runner = _Runner(plan, console, out)
    with (
        _catch_signals() as signals,
        _serve_store(plan.store_port, len(plan.nodes)),
        contextlib.closing(Pinger(_PING_INTERVAL)) as pinger,
    ):
        outcome = runner.run(signals, pinger)
    runner.output.close()  # after the handlers are restored: a signal ends the wait for a reader
    return outcome


def report_outcome(outcome: Outcome) -> int:
    """If the launch failed, report the failure on standard error. Return the exit status."""
    for line in outcome.last_lines:
        print(line, file=sys.stderr)
    if outcome.reason:
        label = "first failure: " if outcome.source else ""  # a signal has no source
        print(f"onecycle launch: {label}{outcome.reason}", file=sys.stderr, flush=True)
    return outcome.status


@contextlib.contextmanager
def _catch_signals() -> Iterator[queue.SimpleQueue[int]]:
    """Inside this context, put termination signals in a queue instead of ending the process.

    Outside the main thread, the queue stays empty, because Python lets only the main thread set
    signal handlers.
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
def _serve_store(port: int | None, hosts: int) -> Iterator[None]:
    """Serve the rendezvous store on ``port`` inside this context, unless ``port`` is None."""
    store = None
    if port is not None:
        raise_open_file_limit(_FILES_PER_HOST * hosts)
        from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but missing from the stubs

        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    yield
    del store
