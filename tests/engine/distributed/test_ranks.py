"""Initialize ranks from the environment, compare their configs, and time out collectives."""

import os
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

import engine
from engine.distributed.environment import TIMEOUT
from engine.distributed.ranks import (
    gather_if_different,
    get_rank,
    get_world_size,
    init_distributed,
)
from engine.distributed.tasks import read_task_variables
from tests.testing.distributed import run_distributed_test
from tests.testing.small_model import start


@pytest.mark.parametrize(
    ("name", "starter"),
    [("SLURM_STEP_NUM_TASKS", "srun"), ("OMPI_COMM_WORLD_SIZE", "mpirun"), ("PMI_SIZE", "mpirun")],
)
def test_init_distributed_several_tasks_without_world_size_is_an_error(monkeypatch, name, starter):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv(name, "1")
    assert init_distributed().world_size == 1
    monkeypatch.setenv(name, "4")
    with pytest.raises(ValueError, match=f"{starter} started 4 tasks, but RANK and WORLD_SIZE"):
        init_distributed()
    monkeypatch.setenv("WORLD_SIZE", "1")  # the user wants four independent runs
    assert init_distributed().world_size == 1


SCRIPT_WITH_ITS_OWN_GROUP = """
import atexit, time
atexit.register(lambda: print(time.monotonic()))  # called last
import torch.distributed as dist
from engine.distributed.ranks import init_distributed
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
init_distributed()
dist.destroy_process_group()
atexit.register(lambda: print(time.monotonic()))  # called first
"""


def test_script_that_destroys_its_own_group_gives_gloo_time_to_release_tensors():
    command = [sys.executable, "-c", SCRIPT_WITH_ITS_OWN_GROUP]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    first, last = map(float, done.stdout.split())
    assert last - first >= 0.05


SRUN = {
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
}
MPIRUN = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (SRUN | {"MASTER_ADDR": "node0"}, "3 4 1 node0 20007"),
        (SRUN | {"MASTER_ADDR": "node0", "MASTER_PORT": "99"}, "3 4 1 node0 99"),
        (SRUN | {"SLURM_STEP_NUM_NODES": "1"}, "3 4 1 127.0.0.1 20007"),
        (SRUN | {"MASTER_ADDR": "a", "CUDA_VISIBLE_DEVICES": "5"}, "3 4 0 a 20007"),
        (SRUN | {"MASTER_ADDR": "a", "CUDA_VISIBLE_DEVICES": "4,5"}, "3 4 1 a 20007"),
        (MPIRUN, "1 2 1 127.0.0.1 29500"),
        (SRUN | MPIRUN, "1 2 1 127.0.0.1 20007"),  # mpirun inside of Slurm
        (SRUN | {"MASTER_ADDR": "a", "WORLD_SIZE": "4"}, "3 4 1 a 20007"),
        (SRUN | {"WORLD_SIZE": "1"}, ""),
        (SRUN | {"WORLD_SIZE": "4", "RANK": "0"}, ""),  # torchrun started by srun
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PTY_PORT": "5"}, ""),  # srun --pty bash
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, ""),  # salloc, or the script of sbatch
    ],
)
def test_read_task_variables_returns_the_variables_of_torchrun(environment, expected):
    found = read_task_variables(environment)
    assert list(found.values()) == expected.split()
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"]
    assert list(found) == (names if expected else [])


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (SRUN, "MASTER_ADDR is not set, but srun started 4 tasks on several hosts"),
        (SRUN | {"SLURM_PTY_PORT": "5", "MASTER_ADDR": "a"}, "set WORLD_SIZE to 1"),
    ],
)
def test_read_task_variables_unknown_ranks_are_an_error(environment, message):
    with pytest.raises(ValueError, match=message):
        read_task_variables(environment)


def train_as_task_of_mpirun():
    names = {"RANK": "RANK", "WORLD_SIZE": "SIZE", "LOCAL_RANK": "LOCAL_RANK"}
    for name, own in names.items():
        os.environ[f"OMPI_COMM_WORLD_{own}"] = os.environ.pop(name)
    os.environ["OMPI_COMM_WORLD_LOCAL_SIZE"] = "2"
    del os.environ["MASTER_ADDR"]
    rank = int(os.environ["OMPI_COMM_WORLD_RANK"])
    assert (get_rank(), get_world_size()) == (rank, 2)
    engine = start()
    assert (engine.global_rank, engine.world_size) == (rank, 2)


def test_initialize_uses_the_ranks_of_mpirun():
    run_distributed_test(train_as_task_of_mpirun, 2)


def test_init_distributed_missing_variables_are_reported(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="RANK and MASTER_ADDR and MASTER_PORT are not set"):
        init_distributed()


def initialize_with_different_lrs():
    dist.init_process_group("gloo")
    lr = 0.001 * (dist.get_rank() + 1)
    with pytest.raises(ValueError, match=r'-   "lr": 0\.001'):
        start(optimizer={"type": "AdamW", "params": {"lr": lr}})


def test_initialize_different_configs_shows_a_diff():
    run_distributed_test(initialize_with_different_lrs, 2)


def initialize_and_count_gathered_objects():
    dist.init_process_group("gloo")
    gathered, gather = [], dist.all_gather_object
    dist.all_gather_object = lambda values, value, **rest: (
        gathered.append(value),
        gather(values, value, **rest),
    )
    trainer = start(train_batch_size=4)
    assert trainer.world_size == 2
    return gathered


def test_initialize_equal_configs_and_models_are_not_gathered():
    """The ranks compare hashes: 16,384 configs in the memory of each rank would be gigabytes."""
    assert run_distributed_test(initialize_and_count_gathered_objects, 2) == [[], []]


def gather_own_rank():
    ranks = init_distributed()
    assert gather_if_different(ranks, ("same", 1)) == []
    return gather_if_different(ranks, ("own", ranks.rank))


def test_gather_if_different_returns_the_values_of_all_ranks():
    own = [("own", rank) for rank in range(3)]
    assert run_distributed_test(gather_own_rank, 3) == [own] * 3


def test_initialize_invalid_config_is_reported_on_rank_0_only(monkeypatch):
    """Other ranks wait until rank 0's error ends the launch, so that it is reported once."""
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(engine.ConfigError, match="`train_batch_size` must be"):
        start(train_batch_size=-1)
    assert waits == []
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(engine.ConfigError) as raised:
        start(train_batch_size=-1)
    assert "invalid on rank 1 (at `/train_batch_size`)" in str(raised.value)
    assert "must be" not in str(raised.value)
    assert "must be" in str(raised.value.problems[0])
    assert waits == [1.0]


@pytest.mark.slow
def test_torchrun_invalid_config_is_reported_once(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import engine, torch\n"
        "engine.initialize(model=torch.nn.Linear(2, 1), config={'train_batch_size': -1})\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, "--log-dir", tmp_path, script]  # torchrun does not remove its own one
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.count("`train_batch_size` must be") == 1


def wait_for_absent_rank(finished):
    """Rank 0 waits in a collective for rank 1, which does not take part."""
    rank = start().global_rank
    if rank == 0:
        with pytest.raises(RuntimeError, match="1000ms"):
            dist.all_reduce(torch.ones(1))
        finished.touch()
    while not finished.exists():
        time.sleep(0.01)


def test_timeout_variable_sets_timeout_of_collectives(tmp_path, monkeypatch):
    monkeypatch.setenv(TIMEOUT, "1")
    run_distributed_test(wait_for_absent_rank, 2, tmp_path / "finished")
