"""Ranks and process groups as the launcher's environment describes them."""

import pytest

from engine.distributed.ranks import init_distributed


@pytest.mark.parametrize(
    ("name", "starter"),
    [("SLURM_STEP_NUM_TASKS", "srun"), ("OMPI_COMM_WORLD_SIZE", "mpirun"), ("PMI_SIZE", "mpirun")],
)
def test_init_distributed_several_tasks_without_world_size_is_an_error(monkeypatch, name, starter):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv(name, "1")
    assert init_distributed().world_size == 1
    monkeypatch.setenv(name, "4")
    with pytest.raises(ValueError, match=f"WORLD_SIZE is not set, but {starter} started 4 tasks"):
        init_distributed()
    monkeypatch.setenv("WORLD_SIZE", "1")  # set on purpose: four independent runs
    assert init_distributed().world_size == 1


def test_init_distributed_missing_variables_are_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="RANK and MASTER_ADDR and MASTER_PORT are not set"):
        init_distributed()
