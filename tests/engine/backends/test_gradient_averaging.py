"""The check that FSDP averages gradients, with a correct and an incorrect average."""

import pytest
import torch
import torch.distributed as dist

from engine.backends.fsdp import check_gradient_averaging
from engine.distributed.ranks import Ranks


@pytest.fixture
def group_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def ranks(world_size):
    return Ranks(0, 0, world_size, torch.device("cpu"))


@pytest.mark.usefixtures("group_of_one")
def test_check_gradient_averaging_with_the_correct_mean_passes():
    check_gradient_averaging(ranks(1))


@pytest.mark.usefixtures("group_of_one")
def test_check_gradient_averaging_with_a_missing_rank_raises():
    # The group has only one member, so the gradient of the second rank is missing.
    with pytest.raises(RuntimeError, match=r"1\.5 .* got \[1\.0, 1\.0\]"):
        check_gradient_averaging(ranks(2))
