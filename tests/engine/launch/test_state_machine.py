"""The state machine of a launch: the actions, states and outcome for each sequence of events."""

import math
from dataclasses import replace

import pytest

from engine.launch.failure import FAILURE_PREFIX, Failure, format_failure, parse_failure
from engine.launch.plan import LaunchPlan, NodePlan
from engine.launch.state_machine import (
    RECONNECT_INTERVAL,
    Action,
    HostState,
    LaunchState,
    LaunchStateMachine,
)

GRACE = 10
KILL_AFTER = GRACE + 5
SSH_LOST = 255
FIXED = LaunchPlan(
    tuple(NodePlan(name, ("ssh", name), (), {}, "/", (), (), GRACE) for name in "abc"), 3, 3
)
ELASTIC = replace(FIXED, min_nodes=2)
REJOIN = replace(FIXED, patience=60)
LOCAL = replace(FIXED, nodes=(replace(FIXED.nodes[0], transport=("python",)),), min_nodes=1)

RUNNING, FINISHING, STOPPING = LaunchState
ORDERS = {"term": ("send", "term"), "kill": ("send", "kill"), "drop": ("kill", ""),
          "start": ("start", "")}  # fmt: skip


def orders(word, hosts):
    """Return the same action for several hosts; "drop" kills the local ssh process."""
    verb, text = ORDERS[word]
    return [Action(verb, host, text) for host in hosts]


def report(host, text):
    return [Action("print", host, f"{host} was lost; {text}")]


WAIT = "trying to reconnect for up to 60 s"


def started(host, at=0.0):
    return lambda machine: machine.host_started(host, at)


def ended(host, returncode, failure=None, at=0.0):
    return lambda machine: machine.host_ended(host, returncode, failure, at)


def interrupted(number, at=0.0):
    return lambda machine: machine.signal_received(number, at)


def time_is(at):
    return lambda machine: machine.time_passed(at)


# name: (plan, [(event, actions)], launch state, whether it is over, status, reason)
CASES = {
    "all hosts succeed": (
        FIXED,
        [(ended("a", 0), []), (ended("b", 0), []), (ended("c", 0), [])],
        FINISHING, True, 0, "",
    ),
    "some hosts still run": (
        FIXED,
        [(ended("a", 0), []), (time_is(1e6), [])],
        FINISHING, False, 0, "",
    ),
    "the first failed rank gives the status and stops the others": (
        FIXED,
        [(ended("b", 7, Failure(1, 7, 100.0)), orders("term", "ac")),
         (ended("a", 143), []), (ended("c", 143), [])],
        STOPPING, True, 7, "rank 1 on b exited with status 7",
    ),
    "a later report of an earlier failure replaces the first report": (
        FIXED,
        [(ended("a", 1, Failure(0, 1, 200.0)), orders("term", "bc")),
         (ended("b", 3, Failure(1, 3, 100.0)), []),
         (ended("c", 4, Failure(2, 4, 150.0)), [])],
        STOPPING, True, 3, "rank 1 on b exited with status 3",
    ),
    "a later failure does not replace the first": (
        FIXED,
        [(ended("a", 1, Failure(0, 1, 100.0)), orders("term", "bc")),
         (ended("b", 3, Failure(1, 3, 200.0)), []), (ended("c", 4), [])],
        STOPPING, True, 1, "rank 0 on a exited with status 1",
    ),
    "a reported failure replaces one without a time": (
        FIXED,
        [(ended("a", -9), orders("term", "bc")),
         (ended("b", 3, Failure(1, 3, 100.0)), [])],
        STOPPING, False, 3, "rank 1 on b exited with status 3",
    ),
    "an agent killed without a report": (
        FIXED,
        [(ended("a", -9), orders("term", "bc"))],
        STOPPING, False, 137,
        "a exited with status 137 (SIGKILL, the signal that Linux sends when memory runs out)",
    ),
    "torchrun itself fails": (
        FIXED,
        [(ended("a", 124, Failure(None, 124, reason="Timeout: x")), orders("term", "bc"))],
        STOPPING, False, 124, "a: Timeout: x",
    ),
    "a failure after a host has succeeded": (
        FIXED,
        [(ended("a", 0), []),
         (ended("b", 7, Failure(1, 7, 1.0)), orders("term", "c")),
         (ended("c", 0), [])],
        STOPPING, True, 7, "rank 1 on b exited with status 7",
    ),
    "the first signal stops the job and a second one kills it": (
        FIXED,
        [(interrupted(2), orders("term", "abc")), (interrupted(2), orders("kill", "abc")),
         (interrupted(15), orders("kill", "abc"))],
        STOPPING, False, 130, "stopped by SIGINT",
    ),
    "a rank that fails after a signal does not change the outcome": (
        FIXED,
        [(interrupted(15), orders("term", "abc")),
         (ended("a", 7, Failure(0, 7, -1.0)), [])],
        STOPPING, False, 143, "stopped by SIGTERM",
    ),
    "a signal after a failure kills and keeps the outcome": (
        FIXED,
        [(ended("a", 7, Failure(0, 7, 1.0)), orders("term", "bc")),
         (interrupted(2), orders("kill", "bc"))],
        STOPPING, False, 7, "rank 0 on a exited with status 7",
    ),
    "a signal after a host has succeeded": (
        FIXED,
        [(ended("a", 0), []), (interrupted(1), orders("term", "bc"))],
        STOPPING, False, 129, "stopped by SIGHUP",
    ),
    "hosts that do not stop in time are disconnected, remaining hosts only": (
        FIXED,
        [(interrupted(2, at=5.0), orders("term", "abc")),
         (ended("a", 143, at=6.0), []),
         (time_is(5.0 + KILL_AFTER), []),
         (time_is(5.1 + KILL_AFTER), orders("drop", "bc")),
         (ended("b", -9, at=21.0), []),
         (time_is(5.2 + KILL_AFTER), orders("drop", "c"))],
        STOPPING, False, 130, "stopped by SIGINT",
    ),
    "a second signal does not extend the time": (
        FIXED,
        [(interrupted(2, at=0.0), orders("term", "abc")),
         (interrupted(2, at=KILL_AFTER - 1), orders("kill", "abc")),
         (time_is(KILL_AFTER + 1), orders("drop", "abc"))],
        STOPPING, False, 130, "stopped by SIGINT",
    ),
    "a lost host ends the launch without --rejoin": (
        FIXED,
        [(ended("b", SSH_LOST), orders("term", "ac"))],
        STOPPING, False, 75, "b was lost: the ssh connection ended",
    ),
    "status 255 with a report of a failure is that failure": (
        FIXED,
        [(ended("b", 255, Failure(1, 255, 1.0)), orders("term", "ac"))],
        STOPPING, False, 255, "rank 1 on b exited with status 255",
    ),
    "status 255 without ssh is not a lost host": (
        LOCAL,
        [(ended("a", 255), [])],
        STOPPING, True, 255, "a exited with status 255",
    ),
    "a host lost while the others stop changes nothing": (
        REJOIN,
        [(ended("a", 7, Failure(0, 7, 1.0)), orders("term", "bc")),
         (ended("b", SSH_LOST, at=1.0), []), (time_is(10.0), []), (ended("c", 143), [])],
        STOPPING, True, 7, "rank 0 on a exited with status 7",
    ),
    "enough hosts are left, then too few": (
        ELASTIC,
        [(ended("b", SSH_LOST), report("b", "continuing with 2 of 3 hosts")),
         (ended("c", SSH_LOST), orders("term", "a"))],
        STOPPING, False, 75, "c was lost: the ssh connection ended",
    ),
    "enough hosts are left, and they succeed": (
        ELASTIC,
        [(ended("b", SSH_LOST), report("b", "continuing with 2 of 3 hosts")),
         (ended("a", 0), []), (ended("c", 0), [])],
        FINISHING, True, 0, "",
    ),
    "a host is lost permanently after another has succeeded, and enough are left": (
        ELASTIC,
        [(ended("a", 0), []), (ended("b", SSH_LOST), report("b", "continuing with 2 of 3 hosts")),
         (ended("c", 0), [])],
        FINISHING, True, 0, "",
    ),
    "a host that still runs is lost after another has succeeded": (
        REJOIN,
        [(ended("a", 0), []), (ended("b", SSH_LOST), orders("term", "c"))],
        STOPPING, False, 75, "b was lost: the ssh connection ended",
    ),
    "a lost host comes back": (
        REJOIN,
        [(ended("b", SSH_LOST, at=10.0), report("b", WAIT)),
         (time_is(10.0 + RECONNECT_INTERVAL - 0.1), []),
         (time_is(10.0 + RECONNECT_INTERVAL), orders("start", "b")),
         (time_is(100.0), []),
         (started("b", at=100.0), []),
         (ended("a", 0), []), (ended("b", 0), []), (ended("c", 0), [])],
        FINISHING, True, 0, "",
    ),
    "the launcher reconnects to two lost hosts together": (
        REJOIN,
        [(ended("b", SSH_LOST, at=0.0), report("b", WAIT)),
         (ended("c", SSH_LOST, at=0.5), report("c", WAIT)),
         (time_is(5.0), orders("start", "bc"))],
        RUNNING, False, 0, "",
    ),
    "a host that comes back too late is lost permanently": (
        REJOIN,
        [(ended("b", SSH_LOST, at=0.0), report("b", WAIT)),
         (time_is(2.0), orders("start", "b")), (ended("b", SSH_LOST, at=59.9), []),
         (time_is(62.0), orders("start", "b")),
         (ended("b", SSH_LOST, at=62.1), orders("term", "ac"))],
        STOPPING, False, 75, "b was lost: the ssh connection ended",
    ),
    "a host that comes back too late, with enough hosts left": (
        replace(REJOIN, min_nodes=2),
        [(ended("b", SSH_LOST, at=0.0), report("b", WAIT)),
         (time_is(2.0), orders("start", "b")),
         (ended("b", SSH_LOST, at=60.0), report("b", "continuing with 2 of 3 hosts")),
         (time_is(70.0), [])],
        RUNNING, False, 0, "",
    ),
    "each loss has its own time once the host has started the job again": (
        REJOIN,
        [(ended("b", SSH_LOST, at=0.0), report("b", WAIT)),
         (time_is(2.0), orders("start", "b")), (started("b", at=50.0), []),
         (ended("b", SSH_LOST, at=70.0), report("b", WAIT)),
         (time_is(72.0), orders("start", "b"))],
        RUNNING, False, 0, "",
    ),
    "a host that fails after it came back": (
        REJOIN,
        [(ended("b", SSH_LOST, at=0.0), report("b", WAIT)), (time_is(2.0), orders("start", "b")),
         (ended("b", 1, at=3.0), orders("term", "ac"))],
        STOPPING, False, 1, "b exited with status 1",
    ),
    "a signal with every host lost ends the launch at once": (
        REJOIN,
        [(ended(host, SSH_LOST), report(host, WAIT)) for host in "abc"] + [(interrupted(2), [])],
        STOPPING, True, 130, "stopped by SIGINT",
    ),
    "a signal while the launcher reconnects to a lost host": (
        REJOIN,
        [(ended("b", SSH_LOST), report("b", WAIT)), (time_is(2.0), orders("start", "b")),
         (interrupted(2, at=3.0), orders("term", "abc")), (started("b", at=3.1), [])],
        STOPPING, False, 130, "stopped by SIGINT",
    ),
    "the launcher does not reconnect to a lost host once another has succeeded": (
        REJOIN,
        [(ended("b", SSH_LOST), report("b", WAIT)), (ended("a", 0), []), (time_is(10.0), []),
         (ended("c", 0), [])],
        FINISHING, True, 0, "",
    ),
    "a host that came back after another has succeeded is killed, and its status is ignored": (
        REJOIN,
        [(ended("b", SSH_LOST), report("b", WAIT)), (time_is(2.0), orders("start", "b")),
         (ended("a", 0), orders("kill", "b")), (ended("c", 0), []), (ended("b", 137), [])],
        FINISHING, True, 0, "",
    ),
    "a late host that starts the job just before it is killed does not fail the launch": (
        REJOIN,
        [(ended("b", SSH_LOST), report("b", WAIT)), (time_is(2.0), orders("start", "b")),
         (ended("a", 0), orders("kill", "b")), (started("b"), []), (ended("b", 137), []),
         (ended("c", 0), [])],
        FINISHING, True, 0, "",
    ),
    "a host that is back while the others stop is killed once one of them has succeeded": (
        REJOIN,
        [(ended("b", SSH_LOST), report("b", WAIT)), (time_is(2.0), orders("start", "b")),
         (interrupted(2), orders("term", "abc")), (ended("a", 0), orders("kill", "b"))],
        STOPPING, False, 130, "stopped by SIGINT",
    ),
    "a host that starts the job while the others stop has time to save": (
        REJOIN,
        [(ended("b", SSH_LOST), report("b", WAIT)), (time_is(2.0), orders("start", "b")),
         (interrupted(2), orders("term", "abc")), (started("b"), []), (ended("a", 0), [])],
        STOPPING, False, 130, "stopped by SIGINT",
    ),
    "a late host is stopped with the others": (
        REJOIN,
        [(ended("b", SSH_LOST), report("b", WAIT)), (time_is(2.0), orders("start", "b")),
         (ended("a", 0), orders("kill", "b")), (interrupted(2), orders("term", "bc"))],
        STOPPING, False, 130, "stopped by SIGINT",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_state_machine_case_gives_the_actions_and_the_outcome(case):
    plan, rows, state, is_over, status, reason = case
    machine = LaunchStateMachine(plan)
    for number, (event, actions) in enumerate(rows):
        assert event(machine) == actions, f"event {number}"
    assert (machine.state, machine.is_over) == (state, is_over)
    assert (machine.outcome.status, machine.outcome.reason) == (status, reason)


def test_state_machine_rejoining_host_passes_through_its_states():
    machine = LaunchStateMachine(REJOIN)
    states = []
    for event in (ended("b", SSH_LOST), time_is(2.0), started("b"), ended("b", SSH_LOST, at=5.0),
                  time_is(9.0), ended("a", 0), ended("b", 137)):  # fmt: skip
        event(machine)
        states.append(machine.get_host_state("b"))
    assert states == [
        HostState.LOST,
        HostState.RECONNECTING,
        HostState.RUNNING,
        HostState.LOST,
        HostState.RECONNECTING,
        HostState.DISMISSED,
        HostState.ENDED,
    ]


@pytest.mark.parametrize(
    ("event", "source"),
    [
        (ended("a", 7, Failure(2, 7, 1.0)), "a:r2"),
        (ended("a", 1), "a"),
        (ended("a", SSH_LOST), "a"),
        (interrupted(2), ""),
    ],
)
def test_state_machine_outcome_names_the_output_that_explains_it(event, source):
    machine = LaunchStateMachine(FIXED)
    event(machine)
    assert machine.outcome.source == source


@pytest.mark.parametrize("line", [FAILURE_PREFIX, FAILURE_PREFIX + '{"rank": 1', "[1, 2]"])
def test_parse_failure_incomplete_line_is_none(line):
    assert parse_failure(line) is None


def test_parse_failure_reads_what_format_failure_writes():
    failure = Failure(None, 124, reason="RendezvousTimeoutError: x")
    assert failure.time == math.inf
    assert parse_failure("noise " + format_failure(failure)) == failure
