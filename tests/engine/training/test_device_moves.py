"""Moving batches to a device: every container keeps its class, and every tensor moves."""

import dataclasses
from collections import OrderedDict, UserDict, defaultdict
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch

from engine.training.device_moves import move_to_device

META = torch.device("meta")


class Pair(NamedTuple):
    x: torch.Tensor
    y: None


@dataclasses.dataclass(frozen=True)
class Sample:
    x: torch.Tensor
    name: str = "a"


class Encoding(UserDict):
    """Moves itself, as Hugging Face's BatchEncoding does."""

    def to(self, device):
        self.data = {name: value.to(device) for name, value in self.data.items()}
        return self


def x():
    return torch.ones(2)


CONTAINERS = {
    "tensor": (x(), lambda batch: batch),
    "tuple": ((x(), 1), lambda batch: batch[0]),
    "nested": ([{"a": (x(), "text")}], lambda batch: batch[0]["a"][0]),
    "named tuple": (Pair(x(), None), lambda batch: batch.x),
    "ordered dict": (OrderedDict(a=x()), lambda batch: batch["a"]),
    "default dict": (defaultdict(list, a=x()), lambda batch: batch["a"]),
    "user dict": (UserDict(a=x()), lambda batch: batch["a"]),
    "read-only mapping": (MappingProxyType({"a": x()}), lambda batch: batch["a"]),
    "dataclass": (Sample(x()), lambda batch: batch.x),
    "object with `to`": (Encoding(a=x()), lambda batch: batch["a"]),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_move_to_device_moves_the_tensors_of_each_container(name):
    batch, get = CONTAINERS[name]
    moved = move_to_device(batch, META)
    assert type(moved) is type(batch)
    assert get(moved).device == META
    if name != "object with `to`":
        assert get(batch).device.type == "cpu"


def test_move_to_device_keeps_the_batch_sizes_of_a_packed_sequence_on_the_cpu():
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)])
    moved = move_to_device([packed], META)[0]
    assert (moved.data.device, moved.batch_sizes.device.type) == (META, "cpu")
