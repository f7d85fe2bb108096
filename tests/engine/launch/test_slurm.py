"""The sbatch job on a real Slurm in the lab: to its end, preempted, and robbed of a node."""

import json
import os
import shutil

import pytest

from tests.testing.lab import ROOT, lab, needs_lab

needs_slurm = pytest.mark.skipif(
    shutil.which("slurmctld") is None and os.environ.get("REQUIRE_LAB") != "1",
    reason="NO SLURM (Debian: slurm-wlm, munge)",
)
pytestmark = [needs_lab(), needs_slurm, pytest.mark.slow]

SCRIPT = ROOT / "tests" / "testing" / "checkpoint_run.py"
SUBMIT = f""". {ROOT}/tests/testing/slurm.sh
$ONECYCLE launch --nnodes 2 --nproc 1 --slurm-opt requeue --slurm-opt time=5 \\
  --write-sbatch job.sbatch {SCRIPT} $PWD/run 300
job=$(sbatch --parsable -o log.txt job.sbatch)
"""
BEGUN = "until grep -q '\\] 20 ' log.txt 2> /dev/null; do sleep 0.1; done\n"
END = """until_state $job COMPLETED; state $job
echo restarts $(scontrol show job $job | grep -o 'Restarts=[0-9]*')
"""


def updates_of(folder):
    lines = (folder / "log.txt").read_text().splitlines()
    found = [line.partition("r0] ")[2].split() for line in lines if "r0] " in line]
    return [int(fields[0]) for fields in found if len(fields) == 4 and fields[0].isdecimal()]


def run(folder, script):
    done = lab(SUBMIT + script + END, folder, limit=170)
    log = (folder / "log.txt").read_text() if (folder / "log.txt").exists() else "no log"
    return done, done.out + log[-3000:]


def test_a_launch_in_an_allocation_runs_there(tmp_path):
    worker = ROOT / "tests" / "testing" / "worker.py"
    script = f""". {ROOT}/tests/testing/slurm.sh
    salloc -N 2 $ONECYCLE launch --slurm --nnodes 2 --nproc 1 {worker} say 'a  b' "it's"
    salloc -N 2 $ONECYCLE launch --slurm --nnodes 2 --nproc 1 {worker} fail; echo status $?
    """
    done = lab(script, tmp_path)
    said = [line.partition("] ")[2] for line in done.out.splitlines() if '"argv"' in line]
    assert sorted(json.loads(line)["rank"] for line in said) == [0, 1], done.out
    assert all(json.loads(line)["argv"] == ["a  b", "it's"] for line in said)
    assert "status 7" in done.out


def test_a_job_that_fails_has_its_ranks_status_and_is_not_queued_again(tmp_path):
    """Though srun ends with that of the task on the other node, which it kills."""
    script = f""". {ROOT}/tests/testing/slurm.sh
    $ONECYCLE launch --nnodes 2 --nproc 1 --slurm-opt requeue --write-sbatch job.sbatch \\
      {ROOT}/tests/testing/worker.py fail
    job=$(sbatch --parsable -o log.txt job.sbatch); until_state $job FAILED
    scontrol show job $job | grep -oE 'Restarts=[0-9]+|ExitCode=[0-9:]+'; ls -A"""
    done = lab(script, tmp_path)
    assert "Restarts=0" in done.out, done.out
    assert "ExitCode=7:0" in done.out
    assert ".onecycle-" not in done.out


PREEMPT = """urgent=$(sbatch --parsable -o urgent.txt -p urgent -N 2 --wrap 'sleep 3')
until_state $urgent RUNNING; until_state $urgent COMPLETED
"""


def test_a_preempted_job_saves_and_goes_on_later(tmp_path):
    done, said = run(tmp_path, BEGUN + PREEMPT)
    assert "COMPLETED" in done.out, said
    assert "restarts Restarts=1" in done.out, said
    updates = updates_of(tmp_path)
    assert updates[-1] == 300
    assert 0 <= 300 - len(set(updates)) <= 1, "the update in which it ended goes unprinted"
    assert len(updates) - len(set(updates)) <= 2, "it went on from where it had saved"


# No machine boots faster than Slurm gives up calling it; one that did would get what is meant for
# the run before, and Slurm 22.05 then leaves the job pending for ever with its nodes idle.
LOSE = """power 1 off
until sinfo -h -N -p all -o %t | grep -q down; do sleep 0.1; done
sleep 15; power 1 on; sleep 1; on 1 slurmd -N node1
"""


def test_a_job_that_loses_a_node_goes_on_when_it_is_back(tmp_path):
    done, said = run(tmp_path, BEGUN + LOSE)
    assert "COMPLETED" in done.out, said
    assert updates_of(tmp_path)[-1] == 300
