"""The launcher's threads, processes, connections and work do not grow faster than the hosts."""

import dataclasses
import io
import resource
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from engine.errors import LaunchError
from engine.launch import plan as planning
from engine.launch import preflight, processes, runner
from engine.launch.agent import STARTED
from engine.launch.failure import Failure
from engine.launch.hosts import Host, read_hostfile
from engine.launch.plan import LaunchPlan, NodePlan, build_plan
from engine.launch.probe import find_free_port, probe
from engine.launch.processes import run_commands
from engine.launch.reachability import connect
from engine.launch.request import LaunchRequest
from engine.launch.state_machine import LaunchStateMachine
from tests.engine.launch.test_plan import write_commands
from tests.engine.test_many_groups import count_lines

ANNOUNCE = f"printf '{STARTED}\\n'"


def build_hosts(count):
    return tuple(Host(f"node{index}", (0,)) for index in range(count))


def run_hosts(directory, monkeypatch, count, script, out=None, job="x"):
    """Run a job on a fake ssh that executes a script, whose first argument is the host."""
    monkeypatch.setenv("PATH", write_commands(directory, ssh=f"cd {directory}; {script}")["PATH"])
    plan = build_plan(LaunchRequest((job,), build_hosts(count), is_local=False), {}, {})
    nodes = (dataclasses.replace(node, transport=("ssh", node.host)) for node in plan.nodes)
    return runner.run(LaunchPlan(tuple(nodes), count, count), "all", out or io.StringIO())


class Census(io.StringIO):
    """Counts the threads and the child processes of this process at each line."""

    def __init__(self):
        super().__init__()
        self.threads, self.processes = [], []

    def write(self, text):
        self.threads.append(threading.active_count())
        tasks = Path("/proc/self/task").glob("*/children")
        self.processes.append(sum(len(task.read_text().split()) for task in tasks))
        return super().write(text)


def test_run_has_one_process_per_host_and_no_thread_per_host(tmp_path, monkeypatch):
    before = Census()
    before.write("")
    script = f"read -r job; {ANNOUNCE}; echo up > $1; echo $1"
    script += "; until [ $(ls | grep -c ^node) = 40 ]; do sleep 0.1; done; sleep 0.3; echo $1"
    out = Census()
    assert run_hosts(tmp_path, monkeypatch, 40, script, out).status == 0
    assert len(out.getvalue().split()) == 80
    assert max(out.threads) - before.threads[0] == 1, "the thread that prints"
    assert 40 <= max(out.processes) - before.processes[0] <= 41, "the hosts, and the pings"


def test_run_limits_the_hosts_that_connect_at_the_same_time(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "MAX_CONNECTING", 4)
    script = "touch connecting.$1; ls | grep -c ^connecting >> counts; sleep 0.2; rm connecting.$1"
    script += f"; read -r job; {ANNOUNCE}; sleep 1"
    assert run_hosts(tmp_path, monkeypatch, 12, script).status == 0
    counts = [int(line) for line in (tmp_path / "counts").read_text().split()]
    assert len(counts) == 12
    assert 2 <= max(counts) <= 4


def test_run_failure_stops_the_hosts_that_are_still_waiting_to_start(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "MAX_CONNECTING", 1)
    outcome = run_hosts(tmp_path, monkeypatch, 5, "touch started.$1; read -r job; exit 7")
    assert outcome.status == 7
    assert outcome.reason == "node0 exited with status 7"
    assert [path.name for path in tmp_path.glob("started.*")] == ["started.node0"]


def test_run_job_larger_than_a_pipe_does_not_block_the_other_hosts(tmp_path, monkeypatch):
    script = (
        "[ $1 = node1 ] && { echo quick; touch quick; }; until [ -e quick ]; do sleep 0.1; done"
    )
    script += "; read -r job; echo ${#job}"
    out = io.StringIO()
    assert run_hosts(tmp_path, monkeypatch, 2, script, out, job="x" * 200_000).status == 0
    sizes = [int(line) for line in out.getvalue().split() if line != "quick"]
    assert len(sizes) == 2
    assert min(sizes) > 200_000


def test_run_commands_limits_the_processes_and_keeps_the_results(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "MAX_CONNECTING", 3)
    script = f"cd {tmp_path}; touch up.$0; ls | grep -c ^up; sleep 0.2; rm up.$0; echo $0 >&2"
    names = [f"node{index}" for index in range(9)]
    found = run_commands({name: ["sh", "-c", script, name] for name in names}, timeout=30)
    assert [done.errors.strip() for done in found.values()] == names
    assert 2 <= max(int(done.output) for done in found.values()) <= 3


def test_run_commands_kills_a_command_after_the_timeout():
    sleep = ["sleep", "41.5"]
    found = run_commands({"slow": sleep, "fast": ["echo", "done"]}, timeout=1)
    assert found["slow"].returncode is None
    assert found["fast"] == (0, "done\n", "")
    assert subprocess.run(["pgrep", "-fx", " ".join(sleep)], check=False).returncode == 1


def test_check_hosts_runs_no_thread_and_finds_the_differing_host(tmp_path, monkeypatch):
    (tmp_path / "c.json").write_text("{}")
    answer = str(probe(str(tmp_path / "c.json"))).replace("'", '"').replace("None", "null")
    ssh = f"""while [ $# -gt 2 ]; do shift; done
        case $2 in
        *probe*) [ $1 = node7 ] && echo broken >&2 && exit 255; echo '{answer}' ;;
        *127.0.0.1*) [ $1 = node8 ] && echo refused ;;
        *) echo listening; read -r end ;;
        esac; exit 0"""
    monkeypatch.setenv("PATH", write_commands(tmp_path, ssh=ssh)["PATH"])
    started = []
    monkeypatch.setattr(threading.Thread, "start", started.append)
    request = LaunchRequest(("x",), build_hosts(20), is_local=False)
    checks = preflight.check_hosts(request, str(tmp_path / "c.json"))
    problems = {check.host: check.problem for check in checks if check.problem}
    assert problems == {"node7": "cannot be reached: broken"}
    healthy = dataclasses.replace(request, hosts=request.hosts[:7] + request.hosts[8:])
    checks = preflight.check_hosts(healthy, str(tmp_path / "c.json"))
    [(host, problem)] = [(check.host, check.problem) for check in checks if check.problem]
    assert host == "node8"
    assert "cannot connect to the rendezvous at 127.0.0.1" in problem
    assert "refused" in problem
    assert started == []


def test_reachability_listener_accepts_more_hosts_than_fit_in_its_queue():
    port = find_free_port()
    code = "from engine.launch import reachability; reachability._BACKLOG = 1; reachability.main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as listener:
        assert listener.stdout.readline() == b"listening\n"
        assert [connect("127.0.0.1", port) for _ in range(20)] == [""] * 20
        listener.stdin.close()
        assert listener.wait(20) == 0
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)


LIMIT = """
import resource, sys
from engine.launch.open_files import raise_open_file_limit
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 1000))
raise_open_file_limit(50)
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
raise_open_file_limit(500)
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
raise_open_file_limit(5000)
"""


def test_raise_open_file_limit_changes_a_low_limit_and_reports_the_hard_one():
    done = subprocess.run(
        [sys.executable, "-c", LIMIT], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["200", "628"]
    assert "The hard limit on open files must be >= 5128, got 1000." in done.stderr


def test_run_too_many_hosts_for_the_limit_of_open_files_starts_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 256))
    with pytest.raises(LaunchError, match="limit on open files must be >= 328, got 256"):
        run_hosts(tmp_path, monkeypatch, 100, "touch started.$1")
    assert list(tmp_path.glob("started.*")) == []


def test_build_plan_selects_the_environment_once(monkeypatch):
    calls = []
    match = planning.fnmatch
    monkeypatch.setattr(planning, "fnmatch", lambda *args: calls.append(args) or match(*args))
    counts = []
    for count in (2, 50):
        calls.clear()
        request = LaunchRequest(("x",), build_hosts(count), is_local=False)
        build_plan(request, {}, {"HF_HOME": "/a", "EDITOR": "vi"})
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0


def test_read_hostfile_counts_the_gpus_once(tmp_path, monkeypatch):
    import torch

    counted = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: counted.append(1) or 4)
    (tmp_path / "hosts").write_text("a\nb\nc slots=2\n")
    assert [host.size for host in read_hostfile(tmp_path / "hosts")] == [4, 4, 2]
    assert len(counted) == 1


def test_state_machine_event_costs_the_same_with_many_hosts():
    lines = []
    for count in (20, 200):
        nodes = (NodePlan(f"n{i}", ("ssh",), (), {}, "/", (), (), 1) for i in range(count))
        machine = LaunchStateMachine(LaunchPlan(tuple(nodes), count, count))

        def handle(machine=machine):
            machine.host_started("n3", 1.0)
            machine.host_ended("n1", 0, None, 2.0)
            machine.time_passed(3.0)
            assert not machine.is_over

        lines.append(count_lines(handle))
        assert machine.host_ended("n2", 7, Failure(2, 7, 1.0), 4.0), "the others are stopped"
    assert lines[0] == lines[1]
