"""The sbatch job on a real Slurm in the lab: success, failure, preemption, loss of a node."""

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
STARTED = "until grep -q '\\] 20 ' log.txt 2> /dev/null; do sleep 0.1; done\n"
FINISH = """until_state $job COMPLETED; state $job
echo restarts $(scontrol show job $job | grep -o 'Restarts=[0-9]*')
"""


def read_steps(directory):
    lines = (directory / "log.txt").read_text().splitlines()
    found = [line.partition("r0] ")[2].split() for line in lines if "r0] " in line]
    return [int(fields[0]) for fields in found if len(fields) == 4 and fields[0].isdecimal()]


def run(directory, script):
    done = lab(SUBMIT + script + FINISH, directory, limit=170)
    log = (directory / "log.txt").read_text() if (directory / "log.txt").exists() else "no log"
    return done, done.out + log[-3000:]


def test_launch_slurm_in_an_allocation_runs_in_it(tmp_path):
    worker = ROOT / "tests" / "testing" / "worker.py"
    script = f""". {ROOT}/tests/testing/slurm.sh
    salloc -N 2 $ONECYCLE launch --slurm --nnodes 2 --nproc 1 {worker} print 'a  b' "it's"
    salloc -N 2 $ONECYCLE launch --slurm --nnodes 2 --nproc 1 {worker} fail; echo status $?
    """
    done = lab(script, tmp_path)
    printed = [line.partition("] ")[2] for line in done.out.splitlines() if '"argv"' in line]
    assert sorted(json.loads(line)["rank"] for line in printed) == [0, 1], done.out
    assert all(json.loads(line)["argv"] == ["a  b", "it's"] for line in printed)
    assert "status 7" in done.out


def test_sbatch_job_failed_rank_sets_the_status_without_requeue(tmp_path):
    """srun returns the status of the task on the other node, which it kills."""
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


def test_sbatch_job_preempted_saves_and_resumes(tmp_path):
    done, output = run(tmp_path, STARTED + PREEMPT)
    assert "COMPLETED" in done.out, output
    assert "restarts Restarts=1" in done.out, output
    steps = read_steps(tmp_path)
    assert steps[-1] == 300
    assert 0 <= 300 - len(set(steps)) <= 1, "only the step that was interrupted may be missing"
    assert len(steps) - len(set(steps)) <= 2, "the job must resume from its checkpoint"


# Slurm must give up the node before it boots, as with a real machine. If the node is back sooner,
# Slurm 22.05 leaves the job pending indefinitely, with idle nodes.
LOSE = """power 1 off
until sinfo -h -N -p all -o %t | grep -q down; do sleep 0.1; done
sleep 15; power 1 on; sleep 1; on 1 slurmd -N node1
"""


def test_sbatch_job_with_lost_node_resumes_when_it_is_back(tmp_path):
    done, output = run(tmp_path, STARTED + LOSE)
    assert "COMPLETED" in done.out, output
    assert read_steps(tmp_path)[-1] == 300
