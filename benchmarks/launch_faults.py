"""Break a launch on two hosts in every known way. Print the message, the delay and the leftovers.

    python benchmarks/launch_faults.py

The hosts are network namespaces of this machine, each with its own sshd (tests/testing/lab.sh;
requires root). Each rank waits indefinitely, unless it causes the fault. The table shows the time
from the fault to the exit of the launcher in seconds, and the number of processes of the job that
are still running on the hosts some seconds later.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.testing.lab import lab

WORKER = ROOT / "tests" / "testing" / "worker.py"
START = """$ONECYCLE launch --hostfile hosts --grace 5 worker.py {what} 2> said & pid=$!
{until}
start=$(date +%s.%N)
{fault}
wait $pid; status=$?
end=$(date +%s.%N)
sleep {settle}
left=$(for i in 0 1; do on $i pgrep -f 'worker.py|engine.launch'; done | wc -l)
echo "ROW|$status|$start|$end|$left"
grep -h 'first failure\\|cannot' said | tail -n 1
"""
READY = "until [ -e pid.0 ] && [ -e pid.1 ]; do sleep 0.05; done; sleep 0.5"
FAULTS = (
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


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    ).parse_args()
    print("| fault | message | status | seconds | processes left |\n|---|---|---|---|---|")
    for fault, what, until, happens, settle in FAULTS:
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            (directory / "hosts").write_text("node0 slots=1\nnode1 slots=1\n")
            shutil.copy(WORKER, directory / "worker.py")
            script = START.format(what=what, until=until, fault=happens, settle=settle)
            if fault == "a host is off before launch":
                script = script.replace("$ONECYCLE", "power 1 off; $ONECYCLE").replace(
                    "2> said", "> said"
                )
            lines = lab(script, directory).out.splitlines()
        [row] = [line for line in lines if line.startswith("ROW|")]
        _, status, start, end, left = row.split("|")
        seconds = float(end) - float(start)
        said = (
            lines[-1].removeprefix("onecycle launch: ") if not lines[-1].startswith("ROW") else "-"
        )
        print(f"| {fault} | {said} | {status} | {seconds:.1f} | {left} |", flush=True)


if __name__ == "__main__":
    main()
