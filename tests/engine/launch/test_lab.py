"""Launching on real hosts: what arrives, what a failure says, and what is left behind (nothing)."""

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
def folder(tmp_path):
    (tmp_path / "hosts").write_text("node0 slots=1\nnode1 slots=1\n")
    shutil.copy(WORKER, tmp_path / "worker.py")
    return tmp_path


def rows(folder, name):
    [path] = folder.glob(f"**/*_{name}.csv")
    with path.open() as file:
        return [float(value) for _, value in list(csv.reader(file))[1:]]


def example(folder, backend):
    """Copy the example with a config that writes down what each update used."""
    shutil.copytree(EXAMPLE, folder / "example")
    path = folder / "example" / "ds_config.json"
    config = json.loads(path.read_text())
    config["csv_monitor"] = {"enabled": True, "output_path": str(folder / "monitor")}
    config["engine"] = {"backend": backend}
    path.write_text(json.dumps(config))
    return "example/train.py --steps 12 --output run --config example/ds_config.json"


@pytest.mark.parametrize(
    ("backend", "slots"), [("torch", 1), ("torch", 2), ("deepspeed", 1), ("deepspeed", 2)]
)
def test_the_example_trains_over_two_hosts_as_in_one_process(tmp_path, backend, slots):
    alone, both = tmp_path / "alone", tmp_path / "both"
    for folder in (alone, both):
        folder.mkdir()
    script = example(alone, "torch").split()
    subprocess.run([sys.executable, *script], cwd=alone, check=True, capture_output=True)
    (both / "hosts").write_text(f"node0 slots={slots}\nnode1 slots={slots}\n")
    done = lab(f"$ONECYCLE launch --hostfile hosts {example(both, backend)}", both)
    assert done.status == 0, done.out
    assert rows(both, "lr") == rows(alone, "lr")
    assert rows(both, "train_loss") == pytest.approx(rows(alone, "train_loss"), rel=2e-5)


def test_arguments_and_environment_arrive_as_they_are(folder):
    odd = "$HOME `id` 'q' \"d\" \\ ; | & -4C  two  spaces é"
    (folder / "odd").write_text(f"ODD={odd}\n")
    done = lab(
        "$ONECYCLE launch --hostfile hosts --console all --env-file odd worker.py say "
        "\"$(cut -d= -f2- odd)\" '' -4C --config=x",
        folder,
    )
    assert done.status == 0, done.out
    said = [json.loads(line.partition("] ")[2]) for line in done.out.splitlines() if ":r" in line]
    assert {one["rank"] for one in said} == {0, 1}
    for one in said:
        assert one["argv"] == [odd, "", "-4C", "--config=x"]
        assert one["odd"] == odd


def test_a_failing_rank_stops_the_others_and_its_status_is_ours(folder):
    done = lab(f"$ONECYCLE launch --hostfile hosts worker.py fail; s=$?; {LEFT}; exit $s", folder)
    assert done.status == 7, done.out
    assert "[node1:r1] about to fail" in done.out
    assert "first failure: rank 1 on node1 ended with 7" in done.out
    assert "LEFT" not in done.out
    assert done.seconds < 30


def test_hosts_whose_names_are_loopback_find_one_another(folder):
    """Debian's installer writes `127.0.1.1 node0` into the hosts file of node0."""
    command = "$ONECYCLE launch --hostfile hosts --console all worker.py sum"
    done = lab(command, folder, DEBIAN_HOSTS="1")
    assert done.status == 0, done.out
    assert done.out.count("sum 2") == 2


@pytest.mark.parametrize(("name", "status"), [("INT", 130), ("TERM", 143), ("HUP", 129)])
def test_a_signal_reaches_every_rank_in_time_to_save(folder, name, status):
    done = lab(
        f"""$ONECYCLE launch --hostfile hosts worker.py saves & pid=$!
        until [ -e pid.0 ] && [ -e pid.1 ]; do sleep 0.1; done; sleep 1
        kill -{name} $pid; wait $pid; s=$?; {LEFT}; exit $s""",
        folder,
    )
    assert done.status == status, done.out
    assert (folder / "saved.0").exists()
    assert (folder / "saved.1").exists()
    assert "LEFT" not in done.out


def test_a_killed_launcher_leaves_nothing_behind(folder):
    done = lab(
        f"""$ONECYCLE launch --hostfile hosts worker.py wait & pid=$!
        until [ -e pid.0 ] && [ -e pid.1 ]; do sleep 0.1; done
        kill -KILL $pid; sleep 4; {LEFT}; exit 0""",
        folder,
    )
    assert "LEFT" not in done.out, done.out


@pytest.mark.parametrize(
    ("process", "status", "said"),
    [
        ("engine.launch.torchrun", 137, "first failure: node1 ended with status 137"),
        ("engine.launch.agent", 75, "first failure: node1 was lost"),
    ],
    ids=["torchrun", "agent"],
)
def test_a_part_of_the_launch_killed_alone_ends_all_of_it(folder, process, status, said):
    done = lab(
        f"""$ONECYCLE launch --hostfile hosts --grace 3 worker.py wait & pid=$!
        until [ -e pid.0 ] && [ -e pid.1 ]; do sleep 0.1; done
        on 1 pkill -KILL -f {process}; wait $pid; s=$?; sleep 4; {LEFT}; exit $s""",
        folder,
    )
    assert done.status == status, done.out
    assert said in done.out
    assert "LEFT" not in done.out


def test_an_interrupt_of_one_job_leaves_the_other_alone(folder):
    done = lab(
        """$ONECYCLE launch --hostfile hosts worker.py wait & first=$!
        until [ -e pid.0 ] && [ -e pid.1 ]; do sleep 0.1; done
        mkdir other; cp worker.py hosts other; cd other
        $ONECYCLE launch --hostfile hosts --console all worker.py sum & second=$!
        sleep 1; kill -INT $first; wait $first; echo first $?
        wait $second; echo second $?""",
        folder,
    )
    assert "first 130" in done.out, done.out
    assert "second 0" in done.out


def test_a_host_that_does_not_answer_is_named_before_anything_starts(folder):
    done = lab("power 1 off; $ONECYCLE launch --hostfile hosts worker.py wait", folder)
    assert done.status == 69, done.out
    assert "node1: cannot be reached: ssh: connect to host node1" in done.out
    assert "1 of 2 hosts cannot be used; nothing was started" in done.out
    assert not (folder / "pid.0").exists()
    assert done.seconds < 25


def test_a_host_that_is_cut_off_ends_the_job_and_itself(folder):
    done = lab(
        """$ONECYCLE launch --hostfile hosts --grace 3 worker.py wait & pid=$!
        until [ -e pid.0 ] && [ -e pid.1 ]; do sleep 0.1; done
        cut=$SECONDS; cable 1 down; wait $pid; s=$?
        echo noticed after $((SECONDS - cut)); sleep 26
        for i in 0 1; do on $i pgrep -f 'worker.py|engine.launch' && echo LEFT; done; exit $s""",
        folder,
    )
    assert done.status == 75, done.out
    assert "node1 was lost" in done.out
    noticed = int(done.out.partition("noticed after ")[2].split()[0])
    assert noticed < 20
    assert "LEFT" not in done.out


def test_another_config_there_is_a_verdict(folder):
    (folder / "c.json").write_text('{"train_batch_size": 8}')
    done = lab(
        """cp c.json other.json; echo ' ' >> other.json
        on 1 mount --bind other.json c.json
        $ONECYCLE launch --hostfile hosts --config c.json worker.py wait""",
        folder,
    )
    assert done.status == 69, done.out
    assert "node1: the config is different there" in done.out


def test_a_port_that_is_not_let_through_is_a_verdict(folder):
    done = lab(
        """on 1 ip rule add ipproto tcp dport 29513 prohibit
        $ONECYCLE launch --hostfile hosts --port 29513 worker.py wait""",
        folder,
    )
    assert done.status == 69, done.out
    assert "node1: cannot connect to the rendezvous at 10.99.0.10, port 29513" in done.out
    assert "node0:" not in done.out
    assert not (folder / "pid.0").exists()
    assert done.seconds < 25


def test_a_port_that_is_taken_is_a_verdict(folder):
    done = lab(
        """on 0 python3 -m http.server --bind 0.0.0.0 29513 &
        until on 0 bash -c 'exec 3<> /dev/tcp/10.99.0.10/29513' 2> /dev/null; do sleep 0.1; done
        $ONECYCLE launch --hostfile hosts --port 29513 worker.py wait""",
        folder,
    )
    assert done.status == 69, done.out
    assert "node0: port 29513 is in use there; choose another with `--port`" in done.out
    assert "node1:" not in done.out


def test_the_printed_plan_run_by_hand_is_the_job(folder):
    done = lab(
        """$ONECYCLE launch --hostfile hosts --dry-run --port 29511 worker.py sum > plan
        sed -n '/^# node0/{n;p}' plan > 0.sh; sed -n '/^# node1/{n;p}' plan > 1.sh
        on 0 bash 0.sh & on 1 bash 1.sh; wait $!""",
        folder,
    )
    assert done.status == 0, done.out
    assert done.out.count("sum 2") == 2


def rows_of(path):
    """What each update printed: its learning rate, its data, a hash of the weights."""
    lines = [line.partition("] ")[2].split() for line in path.read_text().splitlines()]
    return [line for line in lines if len(line) == 4 and line[0].isdecimal()]


def test_killed_workers_come_back_and_end_where_the_undisturbed_run_does(folder):
    script = ROOT / "tests" / "testing" / "checkpoint_run.py"
    done = lab(
        f"""$ONECYCLE launch --hostfile hosts {script} {folder}/alone 300 > alone.txt
        $ONECYCLE launch --hostfile hosts --max-restarts 2 {script} {folder}/run 300 > run.txt &
        pid=$!
        until grep -q '\\] 20 ' run.txt; do sleep 0.02; done
        on 1 pkill -KILL -f 'checkpoint_run.py.*run 300' -n; wait $pid""",
        folder,
    )
    assert done.status == 0, done.out
    undisturbed = {step: row for step, *row in rows_of(folder / "alone.txt")}
    rows = rows_of(folder / "run.txt")
    assert len(undisturbed) == 300
    assert all(undisturbed[step] == row for step, *row in rows)
    assert rows[-1][0] == "300"
    assert "resuming from" in (folder / "run.txt").read_text(), "it was not killed"


@pytest.mark.parametrize(
    ("fault", "status"),
    [("kill -INT $pid; wait $pid", 130), ("cable 1 down; wait $pid", 75)],
    ids=["interrupted", "cut off"],
)
def test_a_launch_started_again_ends_where_the_undisturbed_one_does(folder, fault, status):
    script = ROOT / "tests" / "testing" / "checkpoint_run.py"
    launch = f"$ONECYCLE launch --hostfile hosts --grace 5 {script}"
    done = lab(
        f"""{launch} {folder}/alone 300 > alone.txt
        {launch} {folder}/run 300 > run.txt & pid=$!
        until grep -q '\\] 20 ' run.txt; do sleep 0.02; done
        {fault}; echo status $?; cable 1 up
        while on 1 pgrep -f engine.launch > /dev/null; do sleep 0.5; done
        {launch} {folder}/run 300 >> run.txt""",
        folder,
        limit=150,
    )
    assert done.status == 0, done.out
    assert f"status {status}" in done.out
    undisturbed = {step: row for step, *row in rows_of(folder / "alone.txt")}
    rows = rows_of(folder / "run.txt")
    assert all(undisturbed[step] == row for step, *row in rows)
    assert rows[-1][0] == "300"


def test_the_first_host_can_be_rebooted(folder):
    """The one that would have the rendezvous, were it not the launcher's."""
    script = ROOT / "tests" / "testing" / "checkpoint_run.py"
    done = lab(
        f"""$ONECYCLE launch --hostfile hosts --max-restarts 3 --rejoin --console all {script} \
        {folder}/run 300 > run.txt & pid=$!
        until grep -q '\\] 20 ' run.txt; do sleep 0.02; done
        power 0 off; sleep 3; power 0 on; wait $pid""",
        folder,
        limit=150,
    )
    said = (folder / "run.txt").read_text()
    assert done.status == 0, done.out + said[-3000:]
    assert "node0 was lost; it has 300 s to come back" in said
    rows = {tuple(row) for row in rows_of(folder / "run.txt")}
    assert len({step for step, *_ in rows}) == len(rows), "it went on from where it had saved"
    assert {int(step) for step, *_ in rows} >= {*range(280, 301)}


def test_a_restarted_rank_that_is_late_finds_the_others(folder):
    """Without a store of its own for each life, it would call an address of the life before."""
    command = "$ONECYCLE launch --hostfile hosts --max-restarts 1 --console all worker.py late"
    done = lab(command, folder)
    assert done.status == 0, done.out
    assert done.out.count("sum 2") == 2


def test_the_example_of_two_hosts_runs(folder):
    done = lab(
        f"""export HOSTFILE=$PWD/hosts PATH={Path(sys.executable).parent}:$PATH
        {ROOT}/examples/launch/two_hosts.sh --steps 4 --output $PWD/run""",
        folder,
    )
    assert done.status == 0, done.out
    assert "accuracy" in done.out


def test_an_elastic_job_goes_on_with_one_host(folder):
    script = ROOT / "tests" / "testing" / "checkpoint_run.py"
    done = lab(
        f"""$ONECYCLE launch --hostfile hosts --nnodes 1:2 --max-restarts 3 {script} {folder}/run \
        400 > run.txt & pid=$!
        until grep -q '\\] 20 ' run.txt; do sleep 0.02; done
        power 1 off; wait $pid""",
        folder,
    )
    assert done.status == 0, done.out
    lines = [
        line.partition("] ")[2].split() for line in (folder / "run.txt").read_text().splitlines()
    ]
    updates = [int(line[0]) for line in lines if len(line) == 4 and line[0].isdecimal()]
    assert updates[-1] == 400
    assert "node1 was lost; continuing with 1 of 2 hosts" in (folder / "run.txt").read_text()
