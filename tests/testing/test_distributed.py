"""Test the runner of distributed tests: its results, and ranks that fail, die or hang."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.testing import distributed
from tests.testing.distributed import RankError, run_distributed_test


def sum_of_ranks(offset):
    dist.init_process_group("gloo")
    total = torch.tensor(dist.get_rank() + offset)
    dist.all_reduce(total)
    return dist.get_rank(), total


def set_variable_and_report_environment():
    found = os.environ.get("LEFT_BY_A_RANK"), os.environ.get("SET_BY_THE_TEST")
    os.environ["LEFT_BY_A_RANK"] = "1"
    return found, [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]


def fail_on_rank_1():
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        raise ValueError("only rank 1 fails")
    dist.barrier()


def die_on_rank_1():
    if os.environ["RANK"] == "1":
        print("last words", flush=True)  # noqa: T201
        os.kill(os.getpid(), signal.SIGKILL)


def wait_on_rank_1():
    if os.environ["RANK"] == "1":
        time.sleep(600)


def exit_early():
    raise SystemExit(3)


@pytest.mark.parametrize("world_size", [1, 2])
def test_run_distributed_test_returns_the_result_of_each_rank(world_size):
    total = {1: 10, 2: 21}[world_size]
    expected = [(rank, torch.tensor(total)) for rank in range(world_size)]
    assert run_distributed_test(sum_of_ranks, world_size, 10) == expected


def test_run_distributed_test_gives_each_call_a_clean_environment(monkeypatch):
    for value in ("a", "b"):
        monkeypatch.setenv("SET_BY_THE_TEST", value)
        found = run_distributed_test(set_variable_and_report_environment, 2)
        assert found == [((None, value), ["0", "0", "2"]), ((None, value), ["1", "1", "2"])]


def test_run_distributed_test_raises_the_exception_of_a_rank_with_its_traceback():
    with pytest.raises(ValueError, match="only rank 1 fails") as caught:
        run_distributed_test(fail_on_rank_1, 2)
    assert isinstance(caught.value.__cause__, RankError)
    assert "rank 1 failed:" in str(caught.value.__cause__)
    assert "in fail_on_rank_1" in str(caught.value.__cause__)
    with pytest.raises(SystemExit):
        run_distributed_test(exit_early, 1)


def test_run_distributed_test_reports_a_rank_that_dies():
    with pytest.raises(RankError, match="rank 1 died with exit code -9:\nlast words"):
        run_distributed_test(die_on_rank_1, 2)


def test_run_distributed_test_reports_the_stack_of_a_rank_that_hangs():
    with pytest.raises(TimeoutError, match="rank 1 did not end within 1 s") as caught:
        run_distributed_test(wait_on_rank_1, 2, timeout=1)
    assert "in wait_on_rank_1" in str(caught.value)
    assert distributed.child_pids() <= distributed.server_pids
