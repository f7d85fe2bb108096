"""`onecycle launch` on hosts of the lab: arguments, failures, and processes left behind."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.testing.lab import ROOT, lab, needs_lab

pytestmark = [needs_lab(), pytest.mark.slow]

WORKER = ROOT / "tests" / "testing" / "worker.py"
EXAMPLE = ROOT / "examples" / "fashion_mnist"
LEFT = "\n".join(f"on {i} pgrep -f 'worker.py|engine.launch' && echo LEFT" for i in range(2))


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "hosts").write_text("node0 slots=1\nnode1 slots=1\n")
    shutil.copy(WORKER, tmp_path / "worker.py")
    return tmp_path


def read_metric(directory, name):
    [path] = directory.glob(f"**/*_{name}.csv")
    with path.open() as file:
        return [float(value) for _, value in list(csv.reader(file))[1:]]


def example(directory, backend):
    """Copy the example, with a config that writes metrics to CSV; return its command."""
    shutil.copytree(EXAMPLE, directory / "example")
    path = directory / "example" / "ds_config.json"
    config = json.loads(path.read_text())
    config["csv_monitor"] = {"enabled": True, "output_path": str(directory / "monitor")}
    config["engine"]["backend"] = backend
    path.write_text(json.dumps(config))
    return "example/train.py --max_steps 12 --output run --config example/ds_config.json"


@pytest.mark.parametrize(
    ("backend", "slots"),
    [
        pytest.param("torch", 1, marks=pytest.mark.long),
        ("torch", 2),
        pytest.param("deepspeed", 1, marks=pytest.mark.long),
        ("deepspeed", 2),
    ],
)
def test_launch_example_on_two_hosts_equals_one_process(tmp_path, backend, slots):
    reference, both = tmp_path / "reference", tmp_path / "both"
    for directory in (reference, both):
        directory.mkdir()
    script = example(reference, "torch").split()
    subprocess.run([sys.executable, *script], cwd=reference, check=True, capture_output=True)
    (both / "hosts").write_text(f"node0 slots={slots}\nnode1 slots={slots}\n")
    done = lab(f"$ONECYCLE launch --hostfile hosts {example(both, backend)}", both)
    assert done.status == 0, done.out
    assert read_metric(both, "lr") == read_metric(reference, "lr")
    assert read_metric(both, "train_loss") == pytest.approx(
        read_metric(reference, "train_loss"), rel=2e-5
    )


def test_launch_passes_arguments_and_environment_unchanged(directory):
    odd = "$HOME $$ ${rank} `id` 'q' \"d\" \\ ; | & -4C  two  spaces é"
    (directory / "odd").write_text(f"ODD={odd}\n")
    done = lab(
        "$ONECYCLE launch --hostfile hosts --console all --env-file odd worker.py print "
        "\"$(cut -d= -f2- odd)\" '' -4C --config=x",
        directory,
    )
    assert done.status == 0, done.out
    printed = [
        json.loads(line.partition("] ")[2]) for line in done.out.splitlines() if ":r" in line
    ]
    assert {rank["rank"] for rank in printed} == {0, 1}
    for rank in printed:
        assert rank["argv"] == [odd, "", "-4C", "--config=x"]
        assert rank["odd"] == odd


def test_launch_failed_rank_stops_all_and_sets_the_status(directory):
    done = lab(
        f"$ONECYCLE launch --hostfile hosts worker.py fail; s=$?; {LEFT}; exit $s", directory
    )
    assert done.status == 7, done.out
    assert "[node1:r1] about to fail" in done.out
    assert "first failure: rank 1 on node1 exited with status 7" in done.out
    assert "LEFT" not in done.out
    assert done.seconds < 30


def test_launch_hosts_with_loopback_names_connect(directory):
    """Debian's installer adds `127.0.1.1 node0` to /etc/hosts of node0."""
    command = "$ONECYCLE launch --hostfile hosts --console all worker.py sum"
    done = lab(command, directory, DEBIAN_HOSTS="1")
    assert done.status == 0, done.out
    assert done.out.count("sum 2") == 2


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("INT", 130),
        ("TERM", 143),
        pytest.param("HUP", 129, marks=pytest.mark.long),
    ],
)
def test_launch_signal_lets_every_rank_save(directory, name, status):
    done = lab(
        f"""$ONECYCLE launch --hostfile hosts worker.py save & pid=$!
        until [ -e pid.0 ] && [ -e pid.1 ]; do sleep 0.1; done; sleep 1
        kill -{name} $pid; wait $pid; s=$?; {LEFT}; exit $s""",
        directory,
    )
    assert done.status == status, done.out
    assert (directory / "saved.0").exists()
    assert (directory / "saved.1").exists()
    assert "LEFT" not in done.out


def test_launch_killed_launcher_leaves_no_process(directory):
    done = lab(
        f"""$ONECYCLE launch --hostfile hosts worker.py wait & pid=$!
        until [ -e pid.0 ] && [ -e pid.1 ]; do sleep 0.1; done
        kill -KILL $pid; sleep 4; {LEFT}; exit 0""",
        directory,
    )
    assert "LEFT" not in done.out, done.out


@pytest.mark.parametrize(
    ("process", "status", "message"),
    [
        ("engine.launch.torchrun", 137, "node1 exited with status 137 (SIGKILL"),
        pytest.param(
            "engine.launch.agent", 75, "first failure: node1 was lost", marks=pytest.mark.long
        ),
    ],
    ids=["torchrun", "agent"],
)
def test_launch_killed_torchrun_or_agent_stops_all(directory, process, status, message):
    done = lab(
        f"""$ONECYCLE launch --hostfile hosts --grace 3 worker.py wait & pid=$!
        until [ -e pid.0 ] && [ -e pid.1 ]; do sleep 0.1; done
        on 1 pkill -KILL -f {process}; wait $pid; s=$?; sleep 4; {LEFT}; exit $s""",
        directory,
    )
    assert done.status == status, done.out
    assert message in done.out
    assert "LEFT" not in done.out


def test_launch_interrupt_does_not_affect_another_job(directory):
    done = lab(
        """$ONECYCLE launch --hostfile hosts worker.py wait & first=$!
        until [ -e pid.0 ] && [ -e pid.1 ]; do sleep 0.1; done
        mkdir other; cp worker.py hosts other; cd other
        $ONECYCLE launch --hostfile hosts --console all worker.py sum & second=$!
        sleep 1; kill -INT $first; wait $first; echo first $?
        wait $second; echo second $?""",
        directory,
    )
    assert "first 130" in done.out, done.out
    assert "second 0" in done.out


def test_preflight_unreachable_host_is_reported(directory):
    done = lab("power 1 off; $ONECYCLE launch --hostfile hosts worker.py wait", directory)
    assert done.status == 69, done.out
    assert "node1: cannot be reached: ssh: connect to host node1" in done.out
    assert "1 of 2 hosts cannot be used; nothing was started" in done.out
    assert not (directory / "pid.0").exists()
    assert done.seconds < 25


def test_launch_disconnected_host_stops_all(directory):
    done = lab(
        """$ONECYCLE launch --hostfile hosts --grace 3 worker.py wait & pid=$!
        until [ -e pid.0 ] && [ -e pid.1 ]; do sleep 0.1; done
        cut=$SECONDS; cable 1 down; wait $pid; s=$?
        echo noticed after $((SECONDS - cut)); sleep 26
        for i in 0 1; do on $i pgrep -f 'worker.py|engine.launch' && echo LEFT; done; exit $s""",
        directory,
    )
    assert done.status == 75, done.out
    assert "node1 was lost" in done.out
    noticed = int(done.out.partition("noticed after ")[2].split()[0])
    assert noticed < 20
    assert "LEFT" not in done.out


def test_preflight_different_config_is_reported(directory):
    (directory / "c.json").write_text('{"train_batch_size": 8}')
    done = lab(
        """cp c.json other.json; echo ' ' >> other.json
        on 1 mount --bind other.json c.json
        $ONECYCLE launch --hostfile hosts --config c.json worker.py wait""",
        directory,
    )
    assert done.status == 69, done.out
    assert "node1: the config differs from the launcher's" in done.out


def test_preflight_blocked_port_is_reported(directory):
    done = lab(
        """on 1 ip rule add ipproto tcp dport 29513 prohibit
        $ONECYCLE launch --hostfile hosts --port 29513 worker.py wait""",
        directory,
    )
    assert done.status == 69, done.out
    assert "node1: cannot connect to the rendezvous at 10.99.0.10, port 29513" in done.out
    assert "node0:" not in done.out
    assert not (directory / "pid.0").exists()
    assert done.seconds < 25


def test_preflight_port_in_use_is_reported(directory):
    done = lab(
        """on 0 python3 -m http.server --bind 0.0.0.0 29513 &
        until on 0 bash -c 'exec 3<> /dev/tcp/10.99.0.10/29513' 2> /dev/null; do sleep 0.1; done
        $ONECYCLE launch --hostfile hosts --port 29513 worker.py wait""",
        directory,
    )
    assert done.status == 69, done.out
    assert "node0: port 29513 is already in use; choose another with `--port`" in done.out
    assert "node1:" not in done.out


def test_dry_run_commands_work_by_hand(directory):
    done = lab(
        """$ONECYCLE launch --hostfile hosts --dry-run --port 29511 worker.py sum > plan
        sed -n '/^# node0/{n;p}' plan > 0.sh; sed -n '/^# node1/{n;p}' plan > 1.sh
        on 0 bash 0.sh & on 1 bash 1.sh; wait $!""",
        directory,
    )
    assert done.status == 0, done.out
    assert done.out.count("sum 2") == 2


def read_rows(path):
    """Return the printed fields of each step: step, learning rate, data, hash of the weights."""
    lines = [line.partition("] ")[2].split() for line in path.read_text().splitlines()]
    return [line for line in lines if len(line) == 4 and line[0].isdecimal()]


@pytest.mark.long
def test_launch_restarted_ranks_reproduce_the_undisturbed_run(directory):
    script = ROOT / "tests" / "testing" / "checkpoint_run.py"
    done = lab(
        f"""$ONECYCLE launch --hostfile hosts {script} {directory}/reference 300 > reference.txt
        $ONECYCLE launch --hostfile hosts --max-restarts 2 {script} {directory}/run 300 > run.txt &
        pid=$!
        until grep -q '\\] 20 ' run.txt; do sleep 0.02; done
        on 1 pkill -KILL -f 'checkpoint_run.py.*run 300' -n; wait $pid""",
        directory,
    )
    assert done.status == 0, done.out
    undisturbed = {step: row for step, *row in read_rows(directory / "reference.txt")}
    rows = read_rows(directory / "run.txt")
    assert len(undisturbed) == 300
    assert all(undisturbed[step] == row for step, *row in rows)
    assert rows[-1][0] == "300"
    assert "resuming from" in (directory / "run.txt").read_text(), "no rank was killed"


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        pytest.param("kill -INT $pid; wait $pid", 130, marks=pytest.mark.long),
        ("cable 1 down; wait $pid", 75),
    ],
    ids=["interrupted", "disconnected"],
)
def test_launch_started_again_reproduces_the_undisturbed_run(directory, failure, status):
    script = ROOT / "tests" / "testing" / "checkpoint_run.py"
    launch = f"$ONECYCLE launch --hostfile hosts --grace 5 {script}"
    done = lab(
        f"""{launch} {directory}/reference 300 > reference.txt
        {launch} {directory}/run 300 > run.txt & pid=$!
        until grep -q '\\] 20 ' run.txt; do sleep 0.02; done
        {failure}; echo status $?; cable 1 up
        while on 1 pgrep -f engine.launch > /dev/null; do sleep 0.5; done
        {launch} {directory}/run 300 >> run.txt""",
        directory,
        limit=150,
    )
    assert done.status == 0, done.out
    assert f"status {status}" in done.out
    undisturbed = {step: row for step, *row in read_rows(directory / "reference.txt")}
    rows = read_rows(directory / "run.txt")
    assert all(undisturbed[step] == row for step, *row in rows)
    assert rows[-1][0] == "300"


def test_launch_rejoin_survives_a_reboot_of_the_first_host(directory):
    """Without --rejoin, the first host would run the rendezvous."""
    script = ROOT / "tests" / "testing" / "checkpoint_run.py"
    done = lab(
        f"""$ONECYCLE launch --hostfile hosts --max-restarts 3 --rejoin --console all {script} \
        {directory}/run 300 > run.txt & pid=$!
        until grep -q '\\] 20 ' run.txt; do sleep 0.02; done
        power 0 off; sleep 3; power 0 on; wait $pid""",
        directory,
        limit=150,
    )
    output = (directory / "run.txt").read_text()
    assert done.status == 0, done.out + output[-3000:]
    assert "node0 was lost; trying to reconnect for up to 300 s" in output
    rows = {tuple(row) for row in read_rows(directory / "run.txt")}
    assert len({step for step, *_ in rows}) == len(rows), "the run must resume from its checkpoint"
    assert {int(step) for step, *_ in rows} >= {*range(280, 301)}


def test_launch_late_restarted_rank_connects(directory):
    """With a store shared between restarts, it would connect to an address of the previous one."""
    command = "$ONECYCLE launch --hostfile hosts --max-restarts 1 --console all worker.py late"
    done = lab(command, directory)
    assert done.status == 0, done.out
    assert done.out.count("sum 2") == 2


def test_example_two_hosts_script_succeeds(directory):
    done = lab(
        f"""export HOSTFILE=$PWD/hosts PATH={Path(sys.executable).parent}:$PATH
        {ROOT}/examples/launch/two_hosts.sh --max_steps 4 --output $PWD/run""",
        directory,
    )
    assert done.status == 0, done.out
    assert "accuracy" in done.out


def test_launch_elastic_job_continues_with_one_host(directory):
    script = ROOT / "tests" / "testing" / "checkpoint_run.py"
    done = lab(
        f"""$ONECYCLE launch --hostfile hosts --nnodes 1:2 --max-restarts 3 {script} \
        {directory}/run 400 > run.txt & pid=$!
        until grep -q '\\] 20 ' run.txt; do sleep 0.02; done
        power 1 off; wait $pid""",
        directory,
    )
    assert done.status == 0, done.out
    lines = [
        line.partition("] ")[2].split() for line in (directory / "run.txt").read_text().splitlines()
    ]
    steps = [int(line[0]) for line in lines if len(line) == 4 and line[0].isdecimal()]
    assert steps[-1] == 400
    assert "node1 was lost; continuing with 1 of 2 hosts" in (directory / "run.txt").read_text()
