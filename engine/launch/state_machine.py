"""State machine that decides how the launcher reacts to events.

The state machine does not start processes or read the clock. The runner reports each event and its
time, and executes the actions that the state machine returns. The dict `_TRANSITIONS`, at the end
of `LaunchStateMachine`, lists all transitions.
"""

from __future__ import annotations

import math
import signal
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, Literal, NamedTuple

from engine.distributed.environment import NODE_LOST, OK, SSH_FAILED, to_exit_status
from engine.launch.failure import Failure
from engine.launch.plan import LaunchPlan, NodePlan

__all__ = [
    "RECONNECT_INTERVAL",
    "Action",
    "HostState",
    "LaunchState",
    "LaunchStateMachine",
    "Outcome",
]

RECONNECT_INTERVAL = 2.0
"""Time in seconds between attempts to reconnect to a lost host."""

_KILL_MARGIN = 5.0  # seconds after the grace period in which an agent must exit


class LaunchState(Enum):
    """The state of the whole launch."""

    RUNNING = "the job is running; the launcher tries to reconnect to lost hosts"
    FINISHING = "a host has succeeded; the launcher no longer reconnects to lost hosts"
    STOPPING = "the job failed or was interrupted; all hosts are stopping"


class HostState(Enum):
    """The state of one host."""

    RUNNING = "the agent is running"
    LOST = "the connection was lost; the launcher will reconnect"
    RECONNECTING = "the launcher is reconnecting; the job has not restarted on this host yet"
    DISMISSED = "the host reconnected too late; its agent is killed, and its exit status ignored"
    ENDED = "the agent has exited and will not be restarted"


class _Event(Enum):
    """An event that can change the launch state or cause actions; see `_TRANSITIONS`."""

    HOST_STARTED = "a reconnected host has started the job"
    HOST_SUCCEEDED = "an agent exited with status 0"
    HOST_FAILED = "an agent exited with a nonzero status"
    HOST_LOST = "the connection to a host was lost, and the launcher will reconnect"
    HOST_GIVEN_UP = "a host was lost permanently, but enough hosts are left to continue"
    TOO_FEW_HOSTS = "a host was lost permanently, and too few hosts are left to continue"
    RECONNECT_DUE = "it is time to reconnect to a lost host"
    SIGNAL = "the launcher received a signal"
    OVERDUE = "the grace period for stopping the hosts is over"


class Action(NamedTuple):
    """An action that the runner executes for one host."""

    verb: Literal["start", "send", "kill", "print"]
    """What to do: start the agent, send it `text`, kill the launcher's child process (the agent or
    its ssh client), or print `text`."""
    host: str
    text: str = ""


@dataclass(frozen=True)
class Outcome:
    """The result of a launch."""

    status: int = OK
    """The launcher's exit status: 0 if the job succeeded, 128 + n if the launcher received signal
    n, or otherwise the exit status of the first failed rank or host."""
    reason: str = ""
    source: str = ""
    """The host (`node0`) or the rank (`node0:r1`) whose output explains the failure."""
    last_lines: tuple[str, ...] = ()
    """The last output lines of ``source``, unless the console has just shown them."""


class _Details(NamedTuple):
    now: float
    host: str = ""
    outcome: Outcome = Outcome()
    failed_at: float = math.inf


_Step = Callable[["LaunchStateMachine", _Details], Iterable[Action]]
_RUNNING, _FINISHING, _STOPPING = LaunchState


@dataclass
class _Host:
    plan: NodePlan
    state: HostState = HostState.RUNNING
    lost_since: float | None = None
    reconnect_at: float = math.inf

    @property
    def has_process(self) -> bool:
        return self.state not in (HostState.LOST, HostState.ENDED)


def _describe_end(host: str, returncode: int, failure: Failure | None) -> Outcome:
    status = to_exit_status(returncode)
    if failure is None:
        return Outcome(status, f"{host} {_describe_status(status)}", host)
    if failure.rank is None:
        return Outcome(status, f"{host}: {failure.reason}", host)
    reason = f"rank {failure.rank} on {host} {_describe_status(failure.status)}"
    return Outcome(failure.status, reason, f"{host}:r{failure.rank}")


def _describe_status(status: int) -> str:
    """Describe how a process ended, for example "exited with status 143 (SIGTERM)"."""
    try:
        name = signal.Signals(status - 128).name
    except ValueError:  # no signal has this number
        return f"exited with status {status}"
    hint = ", the signal that Linux sends when memory runs out" if name == "SIGKILL" else ""
    return f"exited with status {status} ({name}{hint})"


class LaunchStateMachine:
    """State machine of a launch and its hosts.

    Every host starts in the state `HostState.RUNNING`. The methods that record an event return the
    actions that the caller must execute, in order.
    """

    def __init__(self, plan: LaunchPlan) -> None:
        self.state = LaunchState.RUNNING
        self.outcome = Outcome()
        self._plan = plan
        self._hosts = {node.host: _Host(node) for node in plan.nodes}
        # Events must not take longer with more hosts, so count the hosts in each state.
        self._counts = Counter({HostState.RUNNING: len(self._hosts)})
        self._left = len(plan.nodes)  # number of hosts that were not lost permanently
        self._failed_at = math.inf
        self._kill_at = math.inf

    @property
    def is_over(self) -> bool:
        """Whether the agent of every host has exited."""
        return self._counts[HostState.ENDED] == len(self._hosts)

    def get_host_state(self, name: str) -> HostState:
        """Return the state of a host."""
        return self._hosts[name].state

    def host_started(self, name: str, now: float) -> list[Action]:
        """Record that the agent of a host is starting the job."""
        if self._hosts[name].state is not HostState.RECONNECTING:
            return []
        return self._apply(_Event.HOST_STARTED, _Details(now, name))

    def host_ended(
        self, name: str, returncode: int, failure: Failure | None, now: float
    ) -> list[Action]:
        """Record that the agent of a host has exited, or that the connection to the host was lost.

        Args:
            name: name of the host.
            returncode: return code of the agent or its ssh client, as reported by `subprocess`.
            failure: failure that the host reported; None if it reported no failure.
            now: time of the event in seconds, from a monotonic clock.
        """
        host = self._hosts[name]
        was_dismissed = host.state is HostState.DISMISSED
        self._set_state(name, HostState.ENDED)
        if was_dismissed:
            return []
        outcome = _describe_end(name, returncode, failure)
        uses_ssh = host.plan.transport[0] == "ssh"
        if returncode == OK:
            event = _Event.HOST_SUCCEEDED
        elif uses_ssh and returncode == SSH_FAILED and failure is None:
            event = self._classify_loss(host, now)
            outcome = Outcome(NODE_LOST, f"{name} was lost: the ssh connection ended", name)
        else:
            event = _Event.HOST_FAILED
        failed_at = failure.time if failure else math.inf
        return self._apply(event, _Details(now, name, outcome, failed_at))

    def signal_received(self, number: int, now: float) -> list[Action]:
        """Record that the launcher received a signal."""
        reason = f"stopped by {signal.Signals(number).name}"
        outcome = Outcome(to_exit_status(-number), reason)
        return self._apply(_Event.SIGNAL, _Details(now, outcome=outcome, failed_at=-math.inf))

    def time_passed(self, now: float) -> list[Action]:
        """Return the actions that are due now, such as reconnecting to a lost host.

        Call this method several times per second.
        """
        if now > self._kill_at:
            return self._apply(_Event.OVERDUE, _Details(now))
        due = [
            name
            for name in self._find_hosts(HostState.LOST)
            if self._hosts[name].reconnect_at <= now
        ]
        return [
            action
            for name in due
            for action in self._apply(_Event.RECONNECT_DUE, _Details(now, name))
        ]

    def _classify_loss(self, host: _Host, now: float) -> _Event:
        elapsed = 0.0 if host.lost_since is None else now - host.lost_since
        if self.state is LaunchState.RUNNING and elapsed < self._plan.patience:
            return _Event.HOST_LOST
        enough = self._left - 1 >= self._plan.min_nodes
        return _Event.HOST_GIVEN_UP if enough else _Event.TOO_FEW_HOSTS

    def _apply(self, event: _Event, details: _Details) -> list[Action]:
        self.state, steps = self._TRANSITIONS.get((self.state, event), (self.state, ()))
        return [action for step in steps for action in step(self, details)]

    def _mark_running(self, details: _Details) -> Iterable[Action]:
        self._set_state(details.host, HostState.RUNNING)
        self._hosts[details.host].lost_since = None
        return ()

    def _wait_to_reconnect(self, details: _Details) -> Iterable[Action]:
        host = self._hosts[details.host]
        is_new = host.lost_since is None
        if is_new:
            host.lost_since = details.now
        host.reconnect_at = details.now + RECONNECT_INTERVAL
        self._set_state(details.host, HostState.LOST)
        text = f"{details.host} was lost; trying to reconnect for up to {self._plan.patience} s"
        return [Action("print", details.host, text)] if is_new else []

    def _reconnect(self, details: _Details) -> Iterable[Action]:
        self._set_state(details.host, HostState.RECONNECTING)
        return [Action("start", details.host)]

    def _give_up(self, details: _Details) -> Iterable[Action]:
        self._left -= 1
        text = f"{details.host} was lost; continuing with {self._left} of {len(self._hosts)} hosts"
        return [Action("print", details.host, text)]

    def _dismiss_late_hosts(self, details: _Details) -> Iterable[Action]:
        del details
        self._forget_lost_hosts()
        late = self._find_hosts(HostState.RECONNECTING)
        for name in late:
            self._set_state(name, HostState.DISMISSED)
        return [Action("send", name, "kill") for name in late]

    def _record_outcome(self, details: _Details) -> Iterable[Action]:
        self.outcome, self._failed_at = details.outcome, details.failed_at
        return ()

    def _record_if_earlier(self, details: _Details) -> Iterable[Action]:
        # Another host may fail because of the first failed rank, but exit before that rank's host.
        return self._record_outcome(details) if details.failed_at < self._failed_at else ()

    def _stop_hosts(self, details: _Details) -> Iterable[Action]:
        self._forget_lost_hosts()
        grace = max(node.grace for node in self._plan.nodes)
        self._kill_at = details.now + grace + _KILL_MARGIN
        return self._order_all("send", "term")

    def _kill_jobs(self, details: _Details) -> Iterable[Action]:
        del details
        return self._order_all("send", "kill")

    def _kill_connections(self, details: _Details) -> Iterable[Action]:
        del details
        return self._order_all("kill")  # an agent stops by itself if its connection is closed

    def _forget_lost_hosts(self) -> None:
        for name in self._find_hosts(HostState.LOST):
            self._set_state(name, HostState.ENDED)

    def _find_hosts(self, state: HostState) -> list[str]:
        if not self._counts[state]:
            return []
        return [name for name, host in self._hosts.items() if host.state is state]

    def _set_state(self, name: str, state: HostState) -> None:
        host = self._hosts[name]
        self._counts[host.state] -= 1
        self._counts[state] += 1
        host.state = state

    def _order_all(self, verb: Literal["send", "kill"], text: str = "") -> list[Action]:
        return [Action(verb, name, text) for name, host in self._hosts.items() if host.has_process]

    # Maps (state, event) to (next state, methods to call). Other events do not change the state.
    _TRANSITIONS: ClassVar[
        dict[tuple[LaunchState, _Event], tuple[LaunchState, tuple[_Step, ...]]]
    ] = {
        (_RUNNING, _Event.HOST_STARTED): (_RUNNING, (_mark_running,)),
        (_RUNNING, _Event.HOST_SUCCEEDED): (_FINISHING, (_dismiss_late_hosts,)),
        (_RUNNING, _Event.HOST_FAILED): (_STOPPING, (_record_outcome, _stop_hosts)),
        (_RUNNING, _Event.HOST_LOST): (_RUNNING, (_wait_to_reconnect,)),
        (_RUNNING, _Event.HOST_GIVEN_UP): (_RUNNING, (_give_up,)),
        (_RUNNING, _Event.TOO_FEW_HOSTS): (_STOPPING, (_record_outcome, _stop_hosts)),
        (_RUNNING, _Event.RECONNECT_DUE): (_RUNNING, (_reconnect,)),
        (_RUNNING, _Event.SIGNAL): (_STOPPING, (_record_outcome, _stop_hosts)),
        (_FINISHING, _Event.HOST_FAILED): (_STOPPING, (_record_outcome, _stop_hosts)),
        (_FINISHING, _Event.HOST_GIVEN_UP): (_FINISHING, (_give_up,)),
        (_FINISHING, _Event.TOO_FEW_HOSTS): (_STOPPING, (_record_outcome, _stop_hosts)),
        (_FINISHING, _Event.SIGNAL): (_STOPPING, (_record_outcome, _stop_hosts)),
        (_STOPPING, _Event.HOST_STARTED): (_STOPPING, (_mark_running,)),
        (_STOPPING, _Event.HOST_SUCCEEDED): (_STOPPING, (_dismiss_late_hosts,)),
        (_STOPPING, _Event.HOST_FAILED): (_STOPPING, (_record_if_earlier,)),
        (_STOPPING, _Event.SIGNAL): (_STOPPING, (_kill_jobs,)),
        (_STOPPING, _Event.OVERDUE): (_STOPPING, (_kill_connections,)),
    }
