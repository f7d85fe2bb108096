"""A launcher that is stopped for a while, or whose output nobody reads, keeps its job running."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from engine.launch import runner
from engine.launch.failure import Failure, format_failure
from engine.launch.hosts import Host
from engine.launch.plan import LaunchPlan, build_plan
from engine.launch.request import LaunchRequest
from engine.launch.state_machine import Outcome

AGENT = """
import sys
from engine.launch import agent
agent._MAX_SILENCE = float(sys.argv[1])
sys.exit(agent.main())
"""


def plan_jobs(*jobs, max_silence=2):
    """Return a plan with a host per job, which is Python code. Agents wait 2 s for a ping."""
    transport = (sys.executable, "-c", AGENT, str(max_silence))
    nodes = []
    for index, job in enumerate(jobs):
        request = LaunchRequest(script=("x",), hosts=(Host(f"h{index}", (0,)),), is_local=True)
        node = build_plan(request, {}, {}).nodes[0]
        argv = (sys.executable, "-c", job)
        nodes.append(dataclasses.replace(node, transport=transport, argv=argv, grace=1))
    return LaunchPlan(tuple(nodes), len(nodes), len(nodes))


class UnreadOutput(io.StringIO):
    """Blocks for some seconds, or until a file exists, before it accepts the first line."""

    def __init__(self, seconds, path=None):
        super().__init__()
        self.end, self.path = time.monotonic() + seconds, path

    def write(self, text):
        while time.monotonic() < self.end and not (self.path and self.path.exists()):
            time.sleep(0.05)
        return super().write(text)


@pytest.mark.slow
def test_run_whose_output_is_not_read_keeps_the_job_running(monkeypatch):
    monkeypatch.setattr(runner, "_PING_INTERVAL", 0.2)
    out = UnreadOutput(5)
    plan = plan_jobs("import time; print('hello', flush=True); time.sleep(4)")
    assert runner.run(plan, "all", out).status == 0
    assert out.getvalue() == "hello\n"


@pytest.mark.parametrize(
    ("console", "rank", "is_same_file", "newer_lines", "is_repeated"),
    [
        ("rank0", 0, True, 0, False),
        ("rank0", 0, False, 0, True),
        ("rank0", 1, True, 0, True),
        ("all", 1, True, 0, False),
        ("all", 1, True, 20, False),
        ("all", 1, True, 21, True),
        ("none", 0, True, 0, True),
    ],
)
def test_run_repeats_the_last_lines_unless_they_end_the_console(
    tmp_path, monkeypatch, console, rank, is_same_file, newer_lines, is_repeated
):
    line = f"[h0:r{rank}] ValueError: no"
    failure = format_failure(Failure(rank, 1, time.time()))
    script = f"print({line!r}); print('[h0:r2] lost\\n' * {newer_lines}, end='')"
    plan = plan_jobs(f"{script}; print({failure!r}); raise SystemExit(1)")
    path = tmp_path / "output"
    with path.open("w") as out, (tmp_path / "errors").open("w") as errors:
        monkeypatch.setattr(sys, "stderr", out if is_same_file else errors)
        outcome = runner.run(plan, console, out)
    assert outcome.last_lines == ((line,) if is_repeated else ())
    is_printed = console == "all" or (console, rank) == ("rank0", 0)
    assert (line in path.read_text()) == is_printed


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        (Outcome(), ""),
        (Outcome(3, "node1 exited with status 3", "node1"), "first failure: node1 exited"),
        (Outcome(130, "stopped by SIGINT"), "onecycle launch: stopped by SIGINT"),
    ],
)
def test_report_outcome_calls_only_a_failed_rank_or_host_a_failure(capsys, outcome, message):
    assert runner.report_outcome(outcome) == outcome.status
    printed = capsys.readouterr().err
    assert message in printed
    assert bool(printed) == bool(message)


def test_run_keeps_lines_that_are_mixed_with_others(tmp_path, monkeypatch):
    failure = format_failure(Failure(1, 1, time.time()))
    script = f"""
        for line in range(15):
            print('[h0:r1] line', line)
            print('[h0:r2] line', line)
            print('[h0:r3] line', line)
        print({failure!r})
        raise SystemExit(1)
    """
    with (tmp_path / "output").open("w") as out:
        monkeypatch.setattr(sys, "stderr", out)
        outcome = runner.run(plan_jobs(textwrap.dedent(script)), "all", out)
    assert outcome.last_lines == tuple(f"[h0:r1] line {line}" for line in range(15))


def test_run_whose_output_is_not_read_still_stops_the_other_hosts(tmp_path):
    stopped = tmp_path / "stopped"
    waiting = f"""
        import pathlib, signal, sys, time
        signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(stopped)!r}).touch(), exit()))
        print('hello', flush=True)
        time.sleep(20)
    """
    failing = "import time; time.sleep(0.5); raise SystemExit(3)"
    begin = time.monotonic()
    out = UnreadOutput(20, stopped)
    plan = plan_jobs(textwrap.dedent(waiting), failing, max_silence=30)
    assert runner.run(plan, "all", out).status == 3
    assert time.monotonic() - begin < 15


LAUNCHER = """
import sys
from engine.launch import runner
from tests.engine.launch.test_runner import plan_jobs
runner._PING_INTERVAL = 0.2
job = "import sys, time; print('running', flush=True); time.sleep(4)"
sys.exit(runner.run(plan_jobs(job), "all", sys.stdout).status)
"""


@pytest.mark.slow
def test_run_that_is_stopped_and_continued_keeps_the_job_running():
    with subprocess.Popen([sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout.readline() == b"running\n"
        launcher.send_signal(signal.SIGSTOP)
        time.sleep(3)
        launcher.send_signal(signal.SIGCONT)
        assert launcher.wait() == 0


def test_run_that_is_killed_ends_the_job():
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER.replace("print(", "import os; print(os.getpid(), ")],
        stdout=subprocess.PIPE,
    ) as launcher:
        job = int(launcher.stdout.readline().split()[0])
        launcher.kill()
        for _ in range(40):
            try:
                os.kill(job, 0)
            except ProcessLookupError:
                return
            time.sleep(0.05)
    raise AssertionError("the job is still running")


@pytest.mark.slow
def test_agent_that_is_stopped_and_continued_keeps_the_job_running():
    spec = {"argv": ["sleep", "4"], "env": {}, "cwd": "/", "grace": 1}
    command = [sys.executable, "-c", AGENT, "2"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as agent:
        agent.stdin.write(json.dumps(spec).encode() + b"\n")
        agent.stdin.flush()
        time.sleep(0.5)
        agent.send_signal(signal.SIGSTOP)
        time.sleep(3)
        agent.send_signal(signal.SIGCONT)
        assert agent.wait() == 0
