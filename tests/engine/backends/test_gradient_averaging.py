"""The check that FSDP averages gradients, against one that does and one that does not."""

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
def test_averaging_of_the_right_mean_passes():
    check_gradient_averaging(ranks(1))


@pytest.mark.usefixtures("group_of_one")
def test_averaging_that_leaves_out_a_rank_raises():
    # The group has one member, so that the gradient of the second rank never arrives.
    with pytest.raises(RuntimeError, match=r"must be 1\.5 in a trial .* is \[1\.0, 1\.0\] instead"):
        check_gradient_averaging(ranks(2))
