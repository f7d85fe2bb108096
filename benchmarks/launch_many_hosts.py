"""Measure how the cost of ``onecycle launch`` grows with the number of simulated hosts.

    python benchmarks/launch_many_hosts.py [--hosts 8 64 512 2048] [--delay 1.0]

A shell script, called the stub, replaces ssh. It waits for ``--delay`` seconds, and then behaves
like a host: it answers the probe or the connection check, or acts as an agent whose rank prints one
line and waits. No rank trains. One simulated host fails; the others exit when the launcher stops
them.

The first table shows CPU seconds, which other programs on this machine barely affect:

- plan: building the launch plan, and encoding the job of each host as JSON;
- preflight: the launcher's own CPU time for both rounds of the preflight check;
- run: the launcher's own CPU time from the start of the agents to its exit;
- stubs: the CPU time of the stubs, which a real launch does not run.

The second table shows wall-clock seconds, memory and counts:

- preflight: both rounds of the preflight check; each round includes the delay;
- corrected: preflight, minus the stubs' CPU time divided by the number of cores;
- first output: from the start of the launcher until it has printed a line from one host;
- all outputs: from the start of the launcher until it has printed a line from every host;
- notice: from the failure of a host until the launcher stops another host;
- exit: from the failure until the launcher has exited;
- MiB, threads, files, processes: the launcher's peak resident set size, and its peak numbers of
  threads, open files and child processes;
- MiB of pings: the proportional set size of the child processes that send pings.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

SSH = r"""#!/bin/sh
# The last argument is the command; the one before it is the host.
while [ $# -gt 2 ]; do shift; done
case $2 in
*engine.launch.probe*) sleep $STUB_DELAY; cat $STUB_DIR/probe.json ;;
*engine.launch.reachability*127.0.0.1*) sleep $STUB_DELAY ;;
*engine.launch.reachability*) sleep $STUB_DELAY; echo listening; read -r end ;;
*)
    sleep $STUB_DELAY
    read -r job
    printf '\036onecycle-started\n'
    echo "[$1:r0] ready"
    case $1 in
    fails) read -r order < $STUB_DIR/fail; exit 7 ;;
    witness) while read -r word; do
        [ $word = ping ] || { echo > $STUB_DIR/stopped; exit 143; }
        done ;;
    *) while read -r word; do [ $word = ping ] || exit 143; done ;;
    esac ;;
esac
"""


def build_hostfile(count: int) -> str:
    names = ["first", "witness", "fails", *(f"node{index}" for index in range(count - 3))]
    return "".join(f"{name} slots=8\n" for name in names)


def measure_part(part: str, directory: Path) -> dict[str, float]:
    """Measure the wall-clock time and the CPU times of one part of a launch, in seconds.

    ``part`` is "plan" (build the launch plan) or "preflight" (run the preflight check).
    """
    from engine.launch.hosts import read_hostfile
    from engine.launch.plan import build_plan
    from engine.launch.preflight import check_hosts
    from engine.launch.request import LaunchRequest

    hosts = tuple(read_hostfile(directory / "hosts"))
    request = LaunchRequest(("train.py",), hosts, is_local=False, python=sys.executable)
    config = str(directory / "ds_config.json")
    begin, cpu = time.monotonic(), time.process_time()
    if part == "plan":
        plan = build_plan(request, {}, os.environ)
        size = sum(len(json.dumps(node.to_dict())) for node in plan.nodes)
        print(f"{size / len(hosts):.0f} bytes per host", file=sys.stderr)
    else:
        checks = check_hosts(request, config)
        failed = [check for check in checks if check.problem]
        if failed:
            raise SystemExit(f"{len(failed)} checks failed. The first failure: {failed[0]}")
    return {
        "wall": time.monotonic() - begin,
        "cpu": time.process_time() - cpu,
        "stubs": read_cpu_of_children(),
    }


def read_cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Usage:
    """Peak memory of a process, and peak numbers of its threads, open files and child processes."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.largest = dict.fromkeys(("MiB", "threads", "files", "processes"), 0.0)
        self.cpu = 0.0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()

    def _sample(self) -> None:
        while not self._is_over.wait(0.2):
            with contextlib.suppress(OSError):  # the process has exited
                self._read()

    def _read(self) -> None:
        path = Path("/proc", str(self.pid))
        status = dict(line.split(":\t", 1) for line in (path / "status").read_text().splitlines())
        children = (path / "task" / str(self.pid) / "children").read_text().split()
        found = {
            "MiB": int(status["VmHWM"].split()[0]) / 1024,
            "threads": int(status["Threads"]),
            "files": len(list((path / "fd").iterdir())),
            "processes": len(children),
        }
        fields = (path / "stat").read_text().rpartition(")")[2].split()
        self.cpu = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        for name, value in found.items():
            self.largest[name] = max(self.largest[name], value)

    def read_helpers(self) -> float:
        """Return the total proportional set size, in MiB, of the processes that send pings."""
        path = Path("/proc", str(self.pid), "task", str(self.pid), "children")
        kib = 0
        for child in path.read_text().split():
            process = Path("/proc", child)
            if (process / "cmdline").read_bytes().startswith(sys.executable.encode()):
                lines = (process / "smaps_rollup").read_text().splitlines()
                kib += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        return kib / 1024

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join()


def measure_run(directory: Path, environment: dict[str, str], count: int) -> dict[str, float]:
    """Measure a launch in which one host fails after all hosts have printed a line."""
    command = [sys.executable, "-m", "engine.cli.main", "launch", "--no-preflight"]
    command += ["--hostfile", str(directory / "hosts"), "--console", "all", str(__file__)]
    found: dict[str, float] = {}
    children = read_cpu_of_children()
    begin = time.monotonic()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as launcher:
        assert launcher.stdout is not None
        usage = Usage(launcher.pid)
        for number, _ in enumerate(launcher.stdout):
            if number == 0:
                found["first"] = time.monotonic() - begin
            if number == count - 1:
                found["all"] = time.monotonic() - begin
                break
        time.sleep(1)  # an idle moment, so that the samples include every host
        found["helpers"] = usage.read_helpers()
        failed = time.monotonic()
        (directory / "fail").write_text("\n")
        (directory / "stopped").read_text()
        found["notice"] = time.monotonic() - failed
        _, errors = launcher.communicate()
        found["exit"] = time.monotonic() - failed
        usage.stop()
    if launcher.returncode != 7 or "fails exited with status 7" not in errors:
        raise SystemExit(f"the launcher exited with status {launcher.returncode}: {errors[-2000:]}")
    found["cpu"] = usage.cpu
    found["total cpu"] = read_cpu_of_children() - children
    return found | usage.largest


def measure(count: int, delay: float) -> dict[str, dict[str, float]]:
    """Return the measurements of the launch plan, the preflight check and the run.

    Args:
        count: number of simulated hosts.
        delay: seconds before a simulated host responds.
    """
    from engine.launch.probe import probe

    with tempfile.TemporaryDirectory(prefix="launch_many_hosts_") as name:
        directory = Path(name)
        (directory / "hosts").write_text(build_hostfile(count))
        (directory / "ds_config.json").write_text('{"train_batch_size": 8}')
        answer: dict[str, Any] = probe(str(directory / "ds_config.json"))
        (directory / "probe.json").write_text(json.dumps(answer) + "\n")
        (directory / "ssh").write_text(SSH)
        (directory / "ssh").chmod(0o755)
        for pipe in ("fail", "stopped"):
            os.mkfifo(directory / pipe)
        environment = os.environ | {
            "PATH": f"{directory}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "STUB_DIR": name,
            "STUB_DELAY": str(delay),
        }
        found: dict[str, dict[str, float]] = {}
        for part in ("plan", "preflight"):
            done = subprocess.run(
                [sys.executable, __file__, "--part", part, "--directory", name],
                env=environment, stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            found[part] = json.loads(done.stdout)
        found["run"] = measure_run(directory, environment, count)
    return found


def print_tables(rows: dict[int, dict[str, dict[str, float]]]) -> None:
    cores = len(os.sched_getaffinity(0))
    print("| hosts | plan | preflight | run | stubs: preflight | stubs: run |")
    print("|---|---|---|---|---|---|")
    for count, row in rows.items():
        plan, preflight, run = row["plan"], row["preflight"], row["run"]
        stubs = run["total cpu"] - run["cpu"]
        cells = (plan["cpu"], preflight["cpu"], run["cpu"], preflight["stubs"], stubs)
        print(f"| {count:,} |", " | ".join(f"{cell:.2f}" for cell in cells), "|")
    print()
    print("| hosts | preflight | corrected | first output | all outputs | notice | exit |", end="")
    print(" MiB | threads | files | processes | MiB of pings |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for count, row in rows.items():
        preflight, run = row["preflight"], row["run"]
        corrected = preflight["wall"] - preflight["stubs"] / cores
        seconds = (
            preflight["wall"],
            corrected,
            *(run[n] for n in ("first", "all", "notice", "exit")),
        )
        counts = (run[name] for name in ("MiB", "threads", "files", "processes", "helpers"))
        cells = [*(f"{each:.1f}" for each in seconds), *(f"{each:,.0f}" for each in counts)]
        print(f"| {count:,} |", " | ".join(cells), "|")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--hosts", type=int, nargs="+", default=[8, 64, 512, 2048])
    parser.add_argument("--delay", type=float, default=1.0, help="seconds per connection")
    parser.add_argument("--part", choices=("plan", "preflight"), help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(measure_part(args.part, args.directory)))
        return
    rows = {}
    for count in args.hosts:
        rows[count] = measure(count, args.delay)
        print(count, json.dumps(rows[count]), file=sys.stderr)
    print_tables(rows)


if __name__ == "__main__":
    main()
