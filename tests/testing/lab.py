"""Run a bash script in a lab of simulated hosts, on the login node of the lab; see lab.sh."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAB = Path(__file__).with_name("lab.sh")
ONECYCLE = [sys.executable, "-m", "engine.cli.main"]
ROOT = LAB.parents[2]


def missing():
    """Return the reason why the lab cannot run on this machine, or an empty string if it can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces need root"
    tools = ("unshare", "nsenter", "ip", "ssh-keygen", "/usr/sbin/sshd")
    absent = [tool for tool in tools if shutil.which(tool) is None]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: iproute2, openssh-server)"
    probe = "ip link add name b type bridge && ip link add name v type veth peer name w"
    done = subprocess.run(
        ["unshare", "--net", "bash", "-c", probe], capture_output=True, text=True, check=False
    )
    return f"no namespaces: {done.stderr.strip()}" if done.returncode else ""


def needs_lab():
    """Return a pytest mark that skips a test if the lab cannot run and REQUIRE_LAB is not 1."""
    reason = "" if os.environ.get("REQUIRE_LAB") == "1" else missing()
    return pytest.mark.skipif(bool(reason), reason=f"NO LAB: {reason}")


class Done:
    """The exit status, output and duration of a script."""

    def __init__(self, process, seconds):
        self.status, self.out, self.seconds = process.returncode, process.stdout, seconds


def lab(script, directory, *, hosts=2, limit=120, **environment):
    """Run a bash script in a directory of the login node; ``$ONECYCLE`` is the onecycle command."""
    path = directory / "scenario.sh"
    path.write_text(f"cd {directory}\nONECYCLE='{' '.join(ONECYCLE)}'\n{script}")
    start = time.monotonic()
    process = subprocess.run(
        ["timeout", "-s", "KILL", str(limit), "bash", str(LAB), str(hosts), "bash", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        | environment,
    )
    return Done(process, time.monotonic() - start)
