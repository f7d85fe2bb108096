"""Launch plans, hostfiles, options, agents and sbatch scripts, tested without hosts."""

import dataclasses
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.cli.main import main
from engine.errors import LaunchError
from engine.launch import state_machine
from engine.launch.agent import STARTED, map_slots_to_devices
from engine.launch.failure import Failure, format_failure
from engine.launch.hosts import Host, read_hostfile, select_hosts
from engine.launch.plan import HostFacts, LaunchPlan, build_plan
from engine.launch.request import LaunchRequest
from engine.launch.runner import run
from engine.launch.slurm import build_sbatch
from engine.launch.torchrun import LOCAL_RANK_ARGUMENT
from tests.testing.lab import ROOT

HOSTS = (Host("node0", (0, 1)), Host("node1", (0, 1)))
REQUEST = LaunchRequest(
    script=("train.py", "-4C"), hosts=HOSTS, is_local=False, cwd="/work", python="py"
)
FACTS = {
    "node0": HostFacts("10.0.0.1", "eth0", 4242),
    "node1": HostFacts("10.0.0.2", "eth0", 5555),
}


def request_with(**changes):
    return dataclasses.replace(REQUEST, **changes)


def flags(node):
    """Return the options of torchrun that precede the script."""
    argv = list(node.argv)
    return dict(zip(argv[4::2], argv[5::2], strict=False))


def launch(*arguments):
    out, err = io.StringIO(), io.StringIO()
    status = main(["launch", *map(str, arguments)], out, err)
    return status, out.getvalue() + err.getvalue()


def write_commands(directory, **texts):
    """Write bash commands to a directory; return an environment with it first in PATH."""
    for name, content in texts.items():
        (directory / name).write_text(f"#!/bin/bash\n{content}\n")
        (directory / name).chmod(0o755)
    return os.environ | {"PATH": f"{directory}:{os.environ['PATH']}"}


def test_build_plan_gives_each_host_its_ranks_and_addresses():
    plan = build_plan(REQUEST, FACTS, {})
    assert plan.world_size == 4
    assert [node.ranks for node in plan.nodes] == [(0, 1), (2, 3)]
    first, second = (flags(node) for node in plan.nodes)
    assert first["--rdzv-endpoint"] == second["--rdzv-endpoint"] == "10.0.0.1:4242"
    assert first["--rdzv-conf"].startswith("is_host=true")
    assert second["--rdzv-conf"].startswith("is_host=false")
    assert (first["--local-addr"], second["--local-addr"]) == ("10.0.0.1", "10.0.0.2")
    assert first["--nnodes"] == "2"
    for node in plan.nodes:
        assert node.env["GLOO_SOCKET_IFNAME"] == "eth0"
        assert node.argv[-2:] == ("train.py", "-4C")
        assert node.transport[0] == "ssh"
        assert node.transport[-2:] == (node.host, "py -m onecycle.isolated engine.launch.agent")


def test_build_plan_local_launch_is_standalone():
    plan = build_plan(request_with(hosts=(Host("localhost", (0, 1)),), is_local=True), {}, {})
    [node] = plan.nodes
    assert "--standalone" in node.argv
    assert node.transport == ("py", "-m", "onecycle.isolated", "engine.launch.agent")
    assert "GLOO_SOCKET_IFNAME" not in node.env


def test_build_plan_with_restarts_disables_the_shared_store():
    env = build_plan(request_with(max_restarts=2), FACTS, {}).nodes[0].env
    assert env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" not in build_plan(REQUEST, FACTS, {}).nodes[0].env


def test_build_plan_rejoin_uses_a_rendezvous_on_the_launcher():
    launcher = {"node0": "127.0.0.1", "node1": "10.0.0.9"}  # node0 runs on the launcher's machine
    facts = {
        name: dataclasses.replace(fact, launcher=launcher[name]) for name, fact in FACTS.items()
    }
    request = request_with(store=("hub", 4000), max_restarts=2, rendezvous_timeout=60)
    plan = build_plan(request, facts, {})
    for node in plan.nodes:
        assert flags(node)["--rdzv-endpoint"] == f"{launcher[node.host]}:4000"
        assert "is_host=false" in flags(node)["--rdzv-conf"]
    assert (plan.store_port, plan.patience) == (4000, 60)
    assert len({node.to_dict()["lock"] for node in plan.nodes}) == 2
    with pytest.raises(LaunchError, match="`--rejoin` requires `--max-restarts`"):
        build_plan(request_with(store=("hub", 4000)), facts, {})


def test_build_plan_min_nodes_is_elastic():
    plan = build_plan(request_with(min_nodes=1), FACTS, {})
    assert plan.min_nodes == 1
    assert flags(plan.nodes[0])["--nnodes"] == "1:2"
    assert plan.nodes[0].env["ONECYCLE_ELASTIC"] == "1"
    with pytest.raises(LaunchError, match="must be between 1 and the number of hosts .2., got 3"):
        build_plan(request_with(min_nodes=3), FACTS, {})


def test_build_plan_passes_selected_variables_only():
    own = {"NCCL_DEBUG": "INFO", "CUDA_VISIBLE_DEVICES": "3", "HOME": "/root", "MINE": "1"}
    env = build_plan(request_with(pass_env=("MI*",), env={"ODD": "a b"}), FACTS, own).nodes[0].env
    assert env["NCCL_DEBUG"] == "INFO"
    assert (env["MINE"], env["ODD"]) == ("1", "a b")
    assert not {"CUDA_VISIBLE_DEVICES", "HOME"} & env.keys()


def test_build_plan_selected_slots_set_visible_devices():
    chosen = (Host("node0", (1, 3)), Host("node1", (0, 1)))
    first, second = build_plan(request_with(hosts=chosen), FACTS, {}).nodes
    assert first.env["CUDA_VISIBLE_DEVICES"] == "1,3"
    assert "CUDA_VISIBLE_DEVICES" not in second.env


SECRETS = {"HF_TOKEN": "s3cret", "AWS_SECRET_KEY": "s3cret", "DB_PASS": "s3cret"}


def test_plan_masks_secrets_only_in_printed_output():
    plan = build_plan(request_with(env=SECRETS), FACTS, {})
    assert "s3cret" not in plan.describe()
    assert "s3cret" not in json.dumps(plan.to_json())
    assert plan.nodes[0].to_dict()["env"]["HF_TOKEN"] == "s3cret"
    assert not any("s3cret" in word for word in plan.nodes[0].transport)


def test_plan_printed_command_runs_with_the_secrets_of_the_shell(tmp_path):
    show = write_commands(tmp_path, show='echo "$HF_TOKEN $TOKENIZERS_PARALLELISM"')
    request = request_with(
        hosts=HOSTS[:1],
        python="show",
        cwd=str(tmp_path),
        env={"HF_TOKEN": "s3cret", "TOKENIZERS_PARALLELISM": "false"},
    )
    command = build_plan(request, FACTS, {}).describe()

    def paste(env):
        return subprocess.run(
            ["bash", "-c", command], env=env, capture_output=True, text=True, check=False
        )

    assert paste(show | {"HF_TOKEN": "mine"}).stdout == "mine false\n"
    failed = paste({"PATH": show["PATH"]})
    assert failed.returncode != 0
    assert "HF_TOKEN" in failed.stderr
    assert failed.stdout == ""


CONFIG = "../launch/ds_config.json"

text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
names = st.from_regex(r"X[A-Z0-9_]{1,8}", fullmatch=True)


@given(argv=st.lists(text, max_size=5), env=st.dictionaries(names, text, max_size=3))
@settings(deadline=None, max_examples=settings.default.max_examples * 3 // 5)
def test_plan_printed_command_and_spec_keep_argv_and_environment(argv, env):
    odd = request_with(script=("train.py", *argv), env=env)
    node = build_plan(odd, FACTS, {}).nodes[0]
    spec = json.loads(json.dumps(node.to_dict()))
    assert tuple(spec["argv"][-len(argv) :] if argv else ()) == tuple(argv)
    assert env.items() <= spec["env"].items()
    command = build_plan(odd, FACTS, {}).describe().partition("# node0")[2].partition(" && ")[2]
    words = shlex.split(command.rpartition("\n\n# node1")[0])
    assert tuple(words[-len(argv) :] if argv else ()) == tuple(argv)
    assert {f"{name}={value}" for name, value in env.items()} <= set(words)


def start_agent():
    command = [sys.executable, "-m", "engine.launch.agent"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, text=True)


@given(
    argv=st.lists(text.filter(lambda word: "\n" not in word), max_size=4),
    env=st.dictionaries(names, text, max_size=2),
)
@settings(deadline=None, max_examples=15)
def test_agent_passes_argv_and_environment_unchanged(argv, env):
    show = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))"
    spec = {"host": "h", "argv": [sys.executable, "-c", show, *argv], "env": env}
    spec |= {"cwd": str(Path.cwd()), "grace": 1}
    with start_agent() as started:
        started.stdin.write(json.dumps(spec) + "\n")
        started.stdin.flush()
        assert started.stdout.readline() == f"{STARTED}\n"
        seen_argv, seen_env = json.loads(started.stdout.readline())
    assert seen_argv == argv
    assert env.items() <= seen_env.items()


@pytest.mark.parametrize("parts", [["kill\n"], ["", "ki", "ll\n"], ["ping\nte", "rm\n"]])
def test_agent_obeys_commands_at_any_border_of_its_reads(parts):
    spec = {"host": "h", "argv": ["sleep", "60"], "env": {}, "cwd": str(Path.cwd()), "grace": 1}
    with start_agent() as started:
        for part in [f"{json.dumps(spec)}\n{parts[0]}", *parts[1:]]:
            started.stdin.write(part)
            started.stdin.flush()
            time.sleep(0.5)
        assert started.wait(20) in (128 + signal.SIGKILL, 128 + signal.SIGTERM)


def test_agent_waits_for_the_previous_agent_of_its_host(tmp_path):
    path = tmp_path / "order"
    first, second = (
        {"argv": ["sh", "-c", f"{wait} echo {name} >> {path}"], "env": {}, "cwd": str(tmp_path)}
        | {"host": "h", "grace": 1, "lock": f"test-{os.getpid()}"}
        for name, wait in (("first", "echo up; sleep 1;"), ("second", ""))
    )
    with start_agent() as old, start_agent() as new:
        old.stdin.write(json.dumps(first) + "\n")
        old.stdin.flush()
        assert [old.stdout.readline() for _ in range(2)] == [f"{STARTED}\n", "up\n"]
        new.stdin.write(json.dumps(second) + "\n")
        new.stdin.flush()
        assert (new.wait(20), old.wait(20)) == (0, 0)
    assert path.read_text().split() == ["first", "second"]


@given(argv=st.lists(text, max_size=4), env=st.dictionaries(names, text, max_size=2))
@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_sbatch_script_passes_argv_and_environment_unchanged(tmp_path, argv, env):
    """Two fake commands replace Slurm's; the rest is the real script."""
    show = "import json, os, sys; print(json.dumps([sys.argv, dict(os.environ)]))"
    python = tmp_path / "shows"
    slurm = write_commands(
        tmp_path,
        scontrol="echo localhost",
        srun='while [[ $1 == --* ]]; do shift; done; exec "$@"',
        shows=f'exec {sys.executable} -c {shlex.quote(show)} "$@"',
    ) | {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_NODEID": "0",
        "SLURMD_NODENAME": "localhost",
    }
    job = build_sbatch(
        request_with(script=("train.py", *argv), env=env, python=str(python), cwd=str(tmp_path)), {}
    )
    done = subprocess.run(
        ["bash", "-s"], input=job, text=True, capture_output=True, check=True, env=slurm
    )
    seen_argv, seen_env = json.loads(done.stdout)
    assert seen_argv[-len(argv) - 1 :] == ["train.py", *argv]
    assert env.items() <= seen_env.items()


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "lists no hosts"),
        ("# comment\n\n", "lists no hosts"),
        ("node0 slots\n", ":1: invalid line 'node0 slots'"),
        ("node0 slots=2 speed=3\n", ":1: invalid line 'node0 slots=2 speed=3'"),
        ("node0:2\n", ":1: Invalid host name 'node0:2'"),
        ("-oProxyCommand=id slots=2\n", ":1: Invalid host name '-oProxyCommand=id'"),
        ("me@-oProxyCommand=id slots=2\n", "Invalid host name 'me@-oProxyCommand=id'"),
        ("node$(id) slots=2\n", "Invalid host name 'node$(id)'"),
        ("node0 slots=2\nnode0 slots=1\n", ":2: node0 is listed more than once"),
        ("node0 slots=0\n", "node0 must have at least 1 slot, got 0"),
        ("node0 slots=-1\n", "node0 must have at least 1 slot, got -1"),
        ("node0 slots=two\n", "Use the form `host slots=N`"),
    ],
)
def test_read_hostfile_invalid_file_is_an_error(tmp_path, content, message):
    path = tmp_path / "hostfile"
    path.write_text(content)
    with pytest.raises(LaunchError, match=re.escape(message)):
        read_hostfile(path)
    status, output = launch("--hostfile", path, "--dry-run", __file__)
    assert status == 2
    assert "hostfile" in output


def test_select_hosts_filter_can_repeat_a_host():
    (left,) = select_hosts([Host("node0", (0, 1, 2))], exclude="node0:0@node0:1")
    assert left == Host("node0", (2,))


def test_read_hostfile_accepts_comments_and_spaces(tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("# all\n  node0   slots = 2  # two\nnode1 slots=1\n")
    assert read_hostfile(path) == [Host("node0", (0, 1)), Host("node1", (0,))]


def test_read_hostfile_accepts_files_of_open_mpi_and_windows(tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("\ufeffnode0 slots=2 max_slots=4\r\nfe80::1 max-slots=8 # IPv6\r\nme@node2\r\n")
    hosts = read_hostfile(path, "3")
    assert [(host.name, host.size) for host in hosts] == [
        ("node0", 2),
        ("fe80::1", 3),
        ("me@node2", 3),
    ]


@pytest.mark.parametrize(
    "filters, message",
    [
        ({"include": "node2"}, "unknown host 'node2'. Use one of node0, node1"),
        ({"include": "node0:5"}, "slot 5, which node0 does not have. Use one of 0, 1"),
        ({"include": "node0:x"}, "invalid slots"),
        ({"include": "node1:1-0"}, "invalid range 1-0"),
        ({"exclude": "node0@node1"}, "leaves no slots"),
        ({"include": "node0", "exclude": "node1"}, "cannot be combined"),
    ],
)
def test_select_hosts_invalid_filter_is_an_error(filters, message):
    with pytest.raises(LaunchError, match=message):
        select_hosts(list(HOSTS), **filters)


@pytest.mark.parametrize(
    "own, slots, expected",
    [
        (None, "1,0", "1,0"),
        ("", "0", "0"),
        ("4,5", "1", "5"),
        ("GPU-ab, GPU-cd", "1,0", "GPU-cd,GPU-ab"),
    ],
)
def test_map_slots_to_devices_uses_visible_devices(monkeypatch, own, slots, expected):
    if own is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", own)
    assert map_slots_to_devices({"CUDA_VISIBLE_DEVICES": slots, "A": "b"}) == {
        "CUDA_VISIBLE_DEVICES": expected,
        "A": "b",
    }
    assert map_slots_to_devices({"A": "b"}) == {"A": "b"}


def test_map_slots_to_devices_hidden_slot_is_an_error(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with pytest.raises(SystemExit, match=r"Slot 2 does not exist .* is 4,5\. .* slots below 2"):
        map_slots_to_devices({"CUDA_VISIBLE_DEVICES": "0,2"})


def test_environment_of_ranks_is_the_same_with_ssh_and_slurm():
    request = request_with(timeout=90, grace=7, max_restarts=1, min_nodes=1)
    env = build_plan(request, FACTS, {}).nodes[0].env
    exports = {
        name: value
        for line in build_sbatch(request, {}).splitlines()
        for name, equals, value in [line.removeprefix("export ").partition("=")]
        if equals and line.startswith("export ")
    }
    expected = {
        "ONECYCLE_TIMEOUT": "90",
        "DEEPSPEED_TIMEOUT": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "7",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "ONECYCLE_ELASTIC": "1",
        "LOCAL_SIZE": "2",
    }
    assert expected.items() <= env.items()
    assert expected.items() <= exports.items()


def test_doctor_and_launch_without_posix_do_not_crash():
    """On Windows, `doctor` works, and `launch` reports that it supports only Linux."""
    code = """
import io, sys
sys.modules["fcntl"] = None
from engine.cli.main import main
assert main(["doctor"], io.StringIO(), io.StringIO()) == 0
sys.platform = "win32"
err = io.StringIO()
assert main(["launch", sys.argv[1]], io.StringIO(), err) == 2
assert "supports only Linux" in err.getvalue(), err.getvalue()
"""
    subprocess.run([sys.executable, "-c", code, __file__], check=True)


def test_launch_invalid_config_starts_nothing(tmp_path):
    config = tmp_path / "ds_config.json"
    config.write_text('{"train_batch_size": 3, "optimiser": {}}')
    status, output = launch("--nproc", 2, __file__, f"--deepspeed_config={config}")
    assert status == 1
    assert "train_batch_size" in output


def test_launch_dry_run_json_prints_the_plan():
    status, output = launch("--dry-run", "--json", "--nproc", 2, __file__, "a b")
    assert status == 0
    plan = json.loads(output)
    assert plan["world_size"] == 2
    assert plan["nodes"][0]["argv"][-1] == "a b"


def test_write_sbatch_equals_the_example_script(tmp_path):
    written = tmp_path / "train.sbatch"
    arguments = ("--nnodes", 2, "--nproc", 1, "--slurm-opt", "requeue", "--slurm-opt", "time=30")
    arguments += ("--python", "python", "--cwd", "examples/fashion_mnist")
    status, _ = launch(*arguments, "--write-sbatch", written, "train.py", "--config", CONFIG)
    assert status == 0
    example = (ROOT / "examples" / "launch" / "train.sbatch").read_text()
    lines = written.read_text().splitlines()
    written_lines = [line for line in lines if not line.startswith("cd ")]
    assert written_lines == [line for line in example.splitlines() if not line.startswith("cd ")]
    assert subprocess.run(["bash", "-n", str(written)], check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["single_node.sh", "torchrun.sh"])
def test_example_scripts_of_one_host_succeed(tmp_path, name):
    script = ROOT / "examples" / "launch" / name
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [script, "--max_steps", "4", "--output", tmp_path], capture_output=True, text=True,
        check=False, env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "TMPDIR": tmp_path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs at least two cores")
def test_bind_cores_gives_each_rank_its_own_cores(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text("import os, sys\nprint(sys.argv[1], sorted(os.sched_getaffinity(0)))\n")
    status, output = launch("--nproc", 2, "--bind-cores", "--console", "all", script, "a b")
    assert status == 0, output
    seen = [json.loads(line.partition("a b ")[2]) for line in output.splitlines() if "a b" in line]
    assert sorted(core for cores in seen for core in cores) == sorted(os.sched_getaffinity(0))
    assert all(seen)


@pytest.mark.slow
def test_launch_local_reports_the_first_failure(tmp_path):
    (tmp_path / "worker.py").write_text(
        "import os, sys, time\n"
        "if os.environ['RANK'] == '1':\n    print('about to fail'); sys.exit(9)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-m", "engine.cli.main", "launch", "--nproc", "2", "worker.py"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 9
    assert "[localhost:r1] about to fail" in done.stderr
    assert "first failure: rank 1 on localhost exited with status 9" in done.stderr
    assert subprocess.run(["pgrep", "-f", str(tmp_path)], check=False).returncode == 1


@pytest.mark.slow
def test_launch_rank_waiting_for_an_exited_rank_is_the_failure(tmp_path, capsys):
    """Rank 1 exits with 0; rank 0 waits for it in a collective, fails, and is reported."""
    worker = Path(__file__).parents[2] / "testing" / "worker.py"
    status, _ = launch("--nproc", 2, "--cwd", tmp_path, worker, "leave")
    assert status == 1
    assert "first failure: rank 0 on localhost exited with status 1" in capsys.readouterr().err


def test_agent_obeys_input_that_arrives_with_the_job():
    spec = {"host": "h", "argv": ["sleep", "30"], "env": {}, "cwd": "/", "grace": 1}
    done = subprocess.run(
        [sys.executable, "-m", "engine.launch.agent"],
        input=json.dumps(spec) + "\nterm\n",
        text=True,
        check=False,
    )
    assert done.returncode == 128 + 15


def test_run_reports_the_earliest_failure_even_if_its_host_exits_last():
    def node(host, rank, status, at, seconds):
        failure = format_failure(Failure(rank, status, at))
        script = (
            f"import time; time.sleep({seconds}); print({failure!r}); raise SystemExit({status})"
        )
        plan = build_plan(request_with(hosts=(Host(host, (0,)),), is_local=True), {}, {}).nodes[0]
        return dataclasses.replace(plan, transport=(sys.executable, "-c", script), grace=10)

    nodes = (node("a", 0, 3, 100.0, 1.0), node("b", 1, 1, 200.0, 0.1))
    outcome = run(LaunchPlan(nodes, 2, 2), "none", io.StringIO())
    assert outcome.status == 3
    assert outcome.reason == "rank 0 on a exited with status 3"


def run_two_hosts(tmp_path, monkeypatch, first, second, **changes):
    """Run a launch on hosts a and b, with a fake ssh that runs `first` for a, `second` for b."""
    ssh = f"read -r job; case $1 in a) {first};; b) {second};; esac"
    monkeypatch.setenv("PATH", write_commands(tmp_path, ssh=ssh)["PATH"])
    monkeypatch.setattr(state_machine, "RECONNECT_INTERVAL", 0.1)
    plan = build_plan(request_with(), {}, {})
    nodes = tuple(
        dataclasses.replace(node, host=host, transport=("ssh", host), grace=1)
        for node, host in zip(plan.nodes, "ab", strict=True)
    )
    out = io.StringIO()
    outcome = run(LaunchPlan(nodes, **{"min_nodes": 2, "world_size": 2} | changes), "rank0", out)
    return outcome, out.getvalue()


WAIT_FOR_TERM = "while read -r word; do [ $word = term ] && exit 143; done"


def test_run_lost_host_that_stays_away_ends_the_launch(tmp_path, monkeypatch):
    outcome, output = run_two_hosts(tmp_path, monkeypatch, WAIT_FOR_TERM, "exit 255", patience=2)
    assert outcome.status == 75
    assert outcome.reason == "b was lost: the ssh connection ended"
    assert output.count("b was lost; trying to reconnect for up to 2 s") == 1


def test_run_that_finishes_without_a_lost_host_succeeds(tmp_path, monkeypatch):
    outcome, _ = run_two_hosts(
        tmp_path, monkeypatch, "sleep 1; exit 0", "exit 255", patience=300, min_nodes=1
    )
    assert outcome.status == 0


def test_run_waits_the_full_time_after_each_loss(tmp_path, monkeypatch):
    lost = tmp_path / "lost"
    starts = (
        f"printf '{STARTED}\\n'; sleep 1; echo >> {lost}; [ $(wc -l < {lost}) = 4 ] || exit 255"
    )
    done = f"until [ -e {lost} ] && [ $(wc -l < {lost}) = 4 ]; do sleep 0.1; done"
    outcome, output = run_two_hosts(tmp_path, monkeypatch, done, starts, patience=2)
    assert outcome.status == 0
    assert output.count("b was lost; trying to reconnect for up to 2 s") == 3


def test_launch_nproc_uses_the_first_selected_slots(tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("node0 slots=4\n")
    arguments = ("--hostfile", path, "--include", "node0:2,3", "--dry-run", "--json")
    status, output = launch(*arguments, "--nproc", 1, __file__)
    assert status == 0
    assert json.loads(output)["nodes"][0]["devices"] == [2]
    status, output = launch(*arguments, "--nproc", 3, __file__)
    assert status == 2
    assert "`--nproc` is 3, but node0 has fewer slots" in output


HOSTILE = "a'b\"c $(touch pwned) `touch pwned` \\ # ; touch pwned"


def test_write_sbatch_hostile_values_are_not_executed(tmp_path, monkeypatch):
    """Fake commands replace Slurm's, and the script prints the command of each task."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".deepspeed_env").write_text(f"MINE={HOSTILE}\n")
    show = 'while [[ $1 == --* ]]; do shift; done; shift 3; printf "%s\\0" "$MINE" "$@"'
    slurm = write_commands(tmp_path, scontrol="echo localhost", srun=show) | {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_NUM_NODES": "1",
    }
    options = ("--log-dir", HOSTILE, "--slurm-opt", f"comment={HOSTILE}", "--iface", HOSTILE)
    status, output = launch("--write-sbatch", "job", "--nproc", 1, *options, __file__, HOSTILE)
    assert status == 0, output
    done = subprocess.run(["bash", "job"], env=slurm, capture_output=True, text=True, check=True)
    assert not (tmp_path / "pwned").exists()
    assert done.stderr == ""
    log_dir = str(tmp_path / HOSTILE)
    expected = [HOSTILE, sys.executable, "--log-dir", log_dir, __file__, HOSTILE]
    assert done.stdout.split("\0")[:-1] == expected


def test_write_sbatch_file_is_private(tmp_path):
    path = tmp_path / "job"
    path.write_text("old")
    path.chmod(0o644)
    arguments = ("--write-sbatch", path, "--nproc", 1, "--env", "HF_TOKEN=s3cret", __file__)
    status, output = launch(*arguments)
    assert status == 0
    assert "contains secret values (HF_TOKEN). Only you have permission to read" in output
    assert path.stat().st_mode & 0o777 == 0o600
    assert "export HF_TOKEN=s3cret\n" in path.read_text()
    status, output = launch("--dry-run", *arguments)
    assert status == 0
    assert 'export HF_TOKEN="${HF_TOKEN:?}"\n' in output
    assert "s3cret" not in output


def test_run_in_allocation_script_is_not_in_the_process_list():
    code = """
from engine.launch.slurm import run_in_allocation
run_in_allocation("export HF_TOKEN=s3cret\\ntr '\\\\0' ' ' < /proc/$$/cmdline\\nexit 7", 1, {})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 7
    assert done.stdout.startswith("bash /dev/fd/")
    assert "s3cret" not in done.stdout


def test_torchrun_passes_arguments_and_removes_its_directory(tmp_path):
    (tmp_path / "tmp").mkdir()
    arguments = [LOCAL_RANK_ARGUMENT, "$$", "${rank}", "$local_rank", "a b"]
    write = f'printf "%s\\n" "$@" > {tmp_path}/$LOCAL_RANK'
    torchrun = [sys.executable, "-m", "engine.launch.torchrun", "--standalone", "--tee", "3"]
    command = [*torchrun, "--nproc-per-node", "2", "--no-python", "sh", "-c", write, "sh"]
    own = os.environ | {"TMPDIR": str(tmp_path / "tmp")}
    subprocess.run([*command, *arguments], env=own, check=True)
    for rank in range(2):
        lines = (tmp_path / str(rank)).read_text().splitlines()
        assert lines == [f"--local_rank={rank}", *arguments[1:]]
    assert list((tmp_path / "tmp").glob("torchelastic_*")) == []


def test_write_sbatch_module_is_passed_to_torchrun(tmp_path):
    path = tmp_path / "job"
    assert launch("--write-sbatch", path, "--nproc", 1, "-m", "json.tool")[0] == 0
    assert "--module" in path.read_text()


def test_write_sbatch_grace_sets_signal_and_timeout(tmp_path):
    path = tmp_path / "job"
    assert launch("--write-sbatch", path, "--nproc", 1, "--grace", 300, __file__)[0] == 0
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300\n" in path.read_text()
    assert "--signal=TERM@300\n" in path.read_text()


@pytest.mark.parametrize(
    ("options", "nproc", "size", "hints"),
    [
        ([], "2", 2, True),
        (["gpus-per-node=4"], "auto", 4, False),
        (["gpus-per-node=a100:8"], "auto", 8, False),
        (["gres=gpu:h100:2,shm:1"], "1", 1, False),
        (["gres=shm:1"], "1", 1, True),
    ],
)
def test_write_sbatch_gpus_of_the_job_set_nproc(tmp_path, options, nproc, size, hints):
    path = tmp_path / "job"
    given = [argument for option in options for argument in ("--slurm-opt", option)]
    status, printed = launch("--write-sbatch", path, "--nproc", nproc, *given, __file__)
    assert status == 0
    assert f"--nproc-per-node {size} " in path.read_text()
    assert ("The job requests no GPUs" in printed) == hints
