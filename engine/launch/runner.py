"""Starts the agents of a plan, passes on what they print, and stops all of them when one fails."""

from __future__ import annotations

import contextlib
import json
import math
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, Literal

from engine.launch.agent import BEGUN
from engine.launch.plan import LaunchPlan, NodePlan
from engine.launch.torchrun import FAILURE

__all__ = ["NODE_LOST", "Outcome", "run"]

NODE_LOST = 75
"""Exit status of a launch that lost a host (EX_TEMPFAIL): it can be started again."""

_SSH_FAILED = 255
_PING = 5.0
_AGAIN = 2.0  # seconds until a lost host is called again
_KEPT = 20  # last lines of each rank
# Windows lacks the last.
_SIGNALS = tuple(
    signal.Signals[name] for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
)

Console = Literal["all", "rank0", "none"]


@dataclass(frozen=True)
class Outcome:
    """How a launch ended."""

    status: int
    """0 if all ranks were well, else that of the first rank that failed; 128 + n for a signal."""
    reason: str = ""
    last_lines: tuple[str, ...] = ()
    """Of the rank that failed first."""


class _Node:
    """An agent at work, and what it has printed."""

    def __init__(self, plan: NodePlan, events: queue.Queue[tuple[str, _Node, Any]]) -> None:
        self.plan = plan
        self.failure: dict[str, Any] | None = None
        self._events = events
        self.process = subprocess.Popen(  # noqa: S603  # what the plan says
            plan.transport,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the launcher, which asks the agents to end
        )
        self.tell(json.dumps(plan.spec()))
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def tell(self, word: str) -> None:
        """Send a line to the agent, if it is still there."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self.process.stdin.write(word.encode() + b"\n")
            self.process.stdin.flush()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for raw in self.process.stdout:
            line = raw.decode(errors="replace").rstrip("\n")
            if line == BEGUN:
                self._events.put(("begun", self, None))
            elif FAILURE in line:
                with contextlib.suppress(ValueError):  # a line that was cut off tells nothing
                    self.failure = json.loads(line.partition(FAILURE)[2])
            else:
                self._events.put(("line", self, line))
        status = self.process.wait()
        with contextlib.suppress(OSError):  # the rest of a word that nobody will read
            self.process.stdout.close()
            if self.process.stdin is not None:
                self.process.stdin.close()
        self._events.put(("end", self, status))


def run(plan: LaunchPlan, console: Console, out: IO[str]) -> Outcome:
    """Run a plan to its end.

    Args:
        plan: what to start.
        console: whose lines to print as they come; those of the others are kept for a failure.
        out: where to print.
    """
    return _Run(plan, console, out).outcome()


class _Run:
    def __init__(self, plan: LaunchPlan, console: Console, out: IO[str]) -> None:
        self._plan = plan
        self._console = console
        self._out = out
        self._events: queue.Queue[tuple[str, _Node, Any]] = queue.Queue()
        self._kept: dict[str, deque[str]] = defaultdict(lambda: deque(maxlen=_KEPT))
        self._asked: list[int] = []
        self._outcome: Outcome | None = None
        self._stopping = 0.0
        self._failed_at = -math.inf  # a signal to the launcher comes before all
        self._lost: dict[str, float] = {}  # since when
        self._calls: list[tuple[float, NodePlan]] = []  # when to call a lost host again
        self._given_up: set[str] = set()
        self._is_over = False  # a host has ended well, and with it the job

    def outcome(self) -> Outcome:
        with self._signals():
            store = _store(self._plan.store_port)
            alive = [_Node(node, self._events) for node in self._plan.nodes]
            pinged = time.monotonic()
            while alive or self._calls:
                with contextlib.suppress(queue.Empty):
                    kind, node, value = self._events.get(timeout=0.1)
                    if kind == "line":
                        self._print(value, node.plan.host)
                    elif kind == "begun":
                        self._lost.pop(node.plan.host, None)
                    else:
                        alive.remove(node)
                        self._ended(node, value, alive)
                if time.monotonic() - pinged > _PING:
                    pinged = time.monotonic()
                    for node in alive:
                        node.tell("ping")
                self._answer(alive)
                self._call_back(alive)
            del store  # the hosts needed it until here
        return self._outcome or Outcome(0)

    def _call_back(self, alive: list[_Node]) -> None:
        """Call lost hosts again, unless all is to end."""
        if self._outcome is not None or self._is_over:
            self._calls.clear()
        for call in [call for call in self._calls if call[0] <= time.monotonic()]:
            self._calls.remove(call)
            alive.append(_Node(call[1], self._events))

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            number: signal.signal(number, lambda caught, _: self._asked.append(caught))
            for number in _SIGNALS
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _answer(self, alive: list[_Node]) -> None:
        """Pass a signal on, and a second one with no patience."""
        if not self._asked:
            if self._stopping and time.monotonic() - self._stopping > self._patience:
                for node in alive:
                    node.process.kill()  # its host stops by itself when it hears no more
            return
        number = self._asked.pop(0)
        again = self._stopping > 0
        if self._outcome is None:
            name = signal.Signals(number).name
            self._outcome = Outcome(128 + number, f"the launcher got {name}")
        self._stop(alive, "kill" if again else "term")

    @property
    def _patience(self) -> float:
        return max(node.grace for node in self._plan.nodes) + 5.0

    def _stop(self, alive: list[_Node], word: str = "term") -> None:
        self._stopping = self._stopping or time.monotonic()
        for node in alive:
            node.tell(word)

    def _ended(self, node: _Node, status: int, alive: list[_Node]) -> None:
        if status == 0:
            self._is_over = True
            for other in alive:
                if other.plan.host in self._lost:
                    other.tell("kill")  # it has come back too late
            return
        if self._is_over and node.plan.host in self._lost:
            return
        if self._outcome is not None:
            # A host may end later than another that its failing rank has brought down.
            if (node.failure or {}).get("time", math.inf) < self._failed_at:
                self._outcome = self._verdict(node, status, lost=False)
                self._failed_at = (node.failure or {})["time"]
            return
        lost = status == _SSH_FAILED and node.failure is None and node.plan.transport[0] == "ssh"
        if lost and self._waits_for(node.plan):
            return
        if lost:
            self._given_up.add(node.plan.host)
            left = len(self._plan.nodes) - len(self._given_up)
            if left >= self._plan.least_nodes:
                self._print(f"{node.plan.host} was lost; {left} hosts go on", node.plan.host)
                return
        self._outcome = self._verdict(node, status, lost=lost)
        self._failed_at = (node.failure or {}).get("time", math.inf)
        self._stop(alive)

    def _waits_for(self, node: NodePlan) -> bool:
        """Note that a host was lost, and whether it is going to be called again."""
        now = time.monotonic()
        if self._is_over:
            return False
        if self._plan.patience and node.host not in self._lost:
            self._print(
                f"{node.host} was lost; it has {self._plan.patience} s to come back", node.host
            )
        if now - self._lost.setdefault(node.host, now) >= self._plan.patience:
            return False
        self._calls.append((now + _AGAIN, node))
        return True

    def _verdict(self, node: _Node, status: int, *, lost: bool) -> Outcome:
        host = node.plan.host
        if lost:
            return Outcome(NODE_LOST, f"{host} was lost: ssh ended", tuple(self._kept[host]))
        status = status if status > 0 else 128 - status
        failure = node.failure
        if failure is None:
            return Outcome(status, f"{host} ended with status {status}", tuple(self._kept[host]))
        if failure["rank"] is None:
            return Outcome(status, f"{host}: {failure['why']}", tuple(self._kept[host]))
        rank = failure["rank"]
        lines = tuple(self._kept[f"{host}:r{rank}"])
        return Outcome(failure["status"], f"rank {rank} on {host} ended with {status}", lines)

    def _print(self, line: str, host: str) -> None:
        source = line[1:].partition("]")[0] if line.startswith("[") else ""
        self._kept[source if ":r" in source else host].append(line)
        first = source.endswith(":r0") or ":r" not in source
        if self._console == "all" or (self._console == "rank0" and first):
            print(line, file=self._out, flush=True)


def _store(port: int | None) -> object:
    """Keep the rendezvous here, for as long as the result is kept."""
    if port is None:
        return None
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public all the same

    return TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)


def ends_with(outcome: Outcome) -> int:
    """Print why a launch failed, the failing rank's lines last but one; return the exit status."""
    for line in outcome.last_lines:
        print(line, file=sys.stderr)
    if outcome.reason:
        print(f"onecycle launch: first failure: {outcome.reason}", file=sys.stderr, flush=True)
    return outcome.status
