"""Inject faults into hosts and ranks, and show how ``onecycle launch`` reports and handles them.

    python benchmarks/launch_faults.py [--only TEXT]

To inject faults into hosts, the script simulates two hosts with network namespaces on this machine,
each with its own sshd (tests/testing/lab.sh; requires root), and starts one rank on each host. The
ranks wait and do not train. For the fault "a rank ends with 7", one rank exits with status 7.

To inject faults into ranks, the script trains with two ranks on this machine. Either one rank fails
while the other waits for it in a collective (tests/testing/failing_rank.py), or the ranks or the
launcher receive SIGINT.

The tables show the launcher's message and exit status, the time in seconds from the fault to the
launcher's exit, and how many of the job's processes are left afterward.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from engine.checkpoint import storage
from tests.testing.lab import ONECYCLE, lab

WORKER = ROOT / "tests" / "testing" / "worker.py"
FAILING_RANK = WORKER.with_name("failing_rank.py")
START = """$ONECYCLE launch --hostfile hosts --grace 5 worker.py {what} 2> printed & pid=$!
{until}
start=$(date +%s.%N)
{fault}
wait $pid; status=$?
end=$(date +%s.%N)
sleep {settle}
left=$(for i in 0 1; do on $i pgrep -f 'worker.py|engine.launch'; done | wc -l)
echo "ROW|$status|$start|$end|$left"
grep -h '^onecycle launch:\\|cannot' printed | tail -n 1
"""
READY = "until [ -e pid.0 ] && [ -e pid.1 ]; do sleep 0.05; done; sleep 0.5"
HOST_FAULTS = (
    ("a rank ends with 7", "fail", "until [ -e pid.1 ]; do sleep 0.05; done", "", 1),
    ("a worker is killed", "wait", READY, "on 1 pkill -KILL -f '[w]orker.py wait' -n", 1),
    ("the launcher gets SIGINT", "wait", READY, "kill -INT $pid", 1),
    ("the launcher is killed", "wait", READY, "kill -KILL $pid", 4),
    ("torchrun is killed", "wait", READY, "on 1 pkill -KILL -f engine.launch.torchrun", 1),
    ("an agent is killed", "wait", READY, "on 1 pkill -KILL -f engine.launch.agent", 4),
    ("a host loses power", "wait", READY, "power 1 off; power 1 on", 2),
    ("a host is disconnected", "wait", READY, "cable 1 down", 32),
    ("a host is off before launch", "wait", "power 1 off", "", 0),
)
RANK_FAULTS = (
    ("an exception in the loop", "loop"),
    ("an exception in a data-loader worker", "worker"),
    ("an exception in a backward hook", "hook"),
    ("`sys.exit(3)`", "exit"),
    ("a KeyboardInterrupt on one rank", "interrupt"),
    ("one rank takes fewer steps than the other", "end"),
    ("Ctrl-C: SIGINT to the launcher", "launcher"),
    ("SIGINT to every rank", "ranks"),
)
BACKENDS = ("torch", "deepspeed")
MARK = "LAUNCH_FAULTS"
"""Environment variable that marks every process of a launch."""


def break_host(fault: str, what: str, until: str, happens: str, settle: int) -> str:
    """Inject a fault into a launch on two hosts, and return the table row for this fault.

    Args:
        fault: name of the fault in the table.
        what: first argument of the script that each rank runs (tests/testing/worker.py).
        until: shell command to run before the fault.
        happens: shell command that injects the fault; "" if ``what`` or ``until`` causes it.
        settle: seconds to wait after the launcher exits before counting the remaining processes.
    """
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "hosts").write_text("node0 slots=1\nnode1 slots=1\n")
        shutil.copy(WORKER, directory / "worker.py")
        script = START.format(what=what, until=until, fault=happens, settle=settle)
        if fault == "a host is off before launch":
            script = script.replace("$ONECYCLE", "power 1 off; $ONECYCLE").replace(
                "2> printed", "> printed"
            )
        lines = lab(script, directory).out.splitlines()
    [row] = [line for line in lines if line.startswith("ROW|")]
    _, status, start, end, left = row.split("|")
    seconds = float(end) - float(start)
    printed = (
        lines[-1].removeprefix("onecycle launch: ") if not lines[-1].startswith("ROW") else "-"
    )
    return f"| {fault} | {printed} | {status} | {seconds:.1f} | {left} |"


def break_rank(fault: str, kind: str, backend: str) -> str:
    """Inject a fault into a launch of two ranks, and return the table row for this fault.

    Args:
        fault: name of the fault in the table.
        kind: how rank 1 fails (see tests/testing/failing_rank.py). If ``kind`` is "launcher" or
            "ranks", no rank fails; the launcher or each rank receives SIGINT instead.
        backend: "torch" or "deepspeed".
    """
    with tempfile.TemporaryDirectory() as name:
        directory, mark = Path(name), uuid.uuid4().hex
        is_signal = kind in {"launcher", "ranks"}
        arguments = ["none", backend, "checkpoints"] if is_signal else [kind, backend]
        with (directory / "errors").open("wb") as errors:
            launcher = subprocess.Popen(
                [*ONECYCLE, "launch", "--nproc", "2", "--grace", "20", FAILING_RANK, *arguments],
                cwd=directory,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", MARK: mark},
            )
        if is_signal:
            send_interrupt(launcher, directory, to_ranks=kind == "ranks")
        status = launcher.wait()
        seconds = time.time() - float((directory / "failed_at").read_text())
        time.sleep(1)
        printed = describe_end(directory)
    return (
        f"| {fault} | {backend} | {printed} | {status} | {seconds:.1f} | {count_processes(mark)} |"
    )


def send_interrupt(launcher: subprocess.Popen[bytes], directory: Path, *, to_ranks: bool) -> None:
    """Wait until both ranks are training, then send SIGINT to them or to the launcher."""
    files = [directory / f"training.{rank}" for rank in range(2)]
    while not all(path.exists() for path in files):
        time.sleep(0.05)
    time.sleep(0.5)
    (directory / "failed_at").write_text(str(time.time()))
    for pid in [int(path.read_text()) for path in files] if to_ranks else [launcher.pid]:
        os.kill(pid, signal.SIGINT)


def describe_end(directory: Path) -> str:
    """Summarize how a launch ended, based on the error output and checkpoints in its directory.

    The summary contains the launcher's message. If there is a traceback, its last line comes first.
    If there is a checkpoint, the summary ends with "saved a checkpoint".
    """
    lines = [
        line.replace("[rank1]:", "").partition("] ")[2].strip() or line
        for line in (directory / "errors").read_text().splitlines()
        if not line.rstrip().endswith("]")  # the empty last line of a traceback
    ]
    # The launcher repeats only the last lines of a long traceback.
    has_traceback = any('File "' in line for line in lines)
    printed = lines[-1].removeprefix("onecycle launch: ").removeprefix("first failure: ")
    printed = f"{lines[-2]}; {printed}" if has_traceback else printed
    found = storage.list_checkpoints(directory / "checkpoints")
    return f"{printed}; saved a checkpoint" if found else printed


def count_processes(mark: str) -> int:
    """Return how many processes of a launch are still running.

    Args:
        mark: value of the environment variable `MARK` that identifies the launch's processes.
    """
    count = 0
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # the process has exited
            count += f"{MARK}={mark}".encode() in path.read_bytes()
    return count


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="inject only faults whose names contain TEXT"
    )
    only = parser.parse_args().only
    host_faults = [each for each in HOST_FAULTS if only in each[0]]
    rank_faults = [each for each in RANK_FAULTS if only in each[0]]
    if host_faults:
        print("| fault | message | status | seconds | processes left |\n|---|---|---|---|---|")
    for host_fault in host_faults:
        print(break_host(*host_fault), flush=True)
    if rank_faults:
        print("| fault | backend | message | status | seconds | processes left |")
        print("|---|---|---|---|---|---|")
    for fault, kind in rank_faults:
        for backend in BACKENDS:
            print(break_rank(fault, kind, backend), flush=True)


if __name__ == "__main__":
    main()
