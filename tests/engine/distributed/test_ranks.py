"""Which process this is: what the launcher's environment says, and what it leaves out."""

import pytest

from engine.distributed.ranks import connect


@pytest.mark.parametrize(
    ("name", "starter"),
    [("SLURM_STEP_NUM_TASKS", "srun"), ("OMPI_COMM_WORLD_SIZE", "mpirun"), ("PMI_SIZE", "mpirun")],
)
def test_copies_that_would_each_train_alone_are_refused(monkeypatch, name, starter):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv(name, "1")
    assert connect().world_size == 1
    monkeypatch.setenv(name, "4")
    with pytest.raises(ValueError, match=f"WORLD_SIZE must be set where {starter} starts 4 tasks"):
        connect()
    monkeypatch.setenv("WORLD_SIZE", "1")  # as a sweep over four settings says
    assert connect().world_size == 1


def test_ranks_without_an_address_are_told_what_is_missing(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="RANK and MASTER_ADDR and MASTER_PORT must be set too"):
        connect()
