"""Moves of batches to a device; the device "meta" shows them without a GPU."""

import types
from collections import OrderedDict, UserDict, defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import TensorDataset
from transformers import BatchEncoding
from transformers.modeling_outputs import BaseModelOutput

from engine.config import load_config
from engine.distributed.ranks import Ranks
from engine.training.data import build_loader
from engine.training.device_moves import move_to_device

META = torch.device("meta")


class Pair(NamedTuple):
    x: torch.Tensor
    y: int


@dataclass(frozen=True)
class Sample:
    x: torch.Tensor
    name: str = "a"
    size: int = field(init=False, default=3)


class Graph:
    """A batch with its own method, which takes only a device."""

    def __init__(self, x):
        self.x = x

    def to(self, device):
        return Graph(self.x.to(device))


def tensor():
    return torch.ones(2)


@pytest.mark.parametrize(
    ("batch", "read"),
    [
        ([tensor(), [tensor(), "text"]], lambda batch: batch[1][0]),
        ((1, (tensor(),)), lambda batch: batch[1][0]),
        (Pair(tensor(), 2), lambda batch: batch.x),
        ({"a": {"b": tensor()}}, lambda batch: batch["a"]["b"]),
        (defaultdict(list, a=[tensor()]), lambda batch: batch["a"][0]),
        (OrderedDict(a=tensor()), lambda batch: batch["a"]),
        (types.MappingProxyType({"a": tensor()}), lambda batch: batch["a"]),
        (UserDict(a=tensor()), lambda batch: batch["a"]),
        (Sample(tensor()), lambda batch: batch.x),
        ([Sample(tensor())], lambda batch: batch[0].x),
        (Graph(tensor()), lambda batch: batch.x),
        (BatchEncoding({"input_ids": tensor()}), lambda batch: batch["input_ids"]),
        (BaseModelOutput(last_hidden_state=tensor()), lambda batch: batch.last_hidden_state),
        (pack_sequence([tensor()]), lambda batch: batch.data),
    ],
    ids=lambda value: type(value).__name__,
)
def test_move_of_a_nested_batch_moves_a_copy(batch, read):
    moved = move_to_device(batch, META)
    assert type(moved) is type(batch)
    assert read(moved).device == META
    if not isinstance(batch, BatchEncoding):  # its method `to` changes it
        assert read(batch).device.type == "cpu"


def test_move_of_a_packed_sequence_keeps_its_batch_sizes_on_the_cpu():
    moved = move_to_device([pack_sequence([torch.ones(3), torch.ones(2)])], META)[0]
    assert (moved.data.device, moved.batch_sizes.device.type) == (META, "cpu")


@pytest.mark.parametrize(
    "batch", [3, "text", None, [1, ("a", {"b": None})], {"size": 2}, torch.Tensor, Sample]
)
def test_move_of_a_batch_without_tensors_returns_the_same_object(batch):
    assert move_to_device(batch, META) is batch


def test_move_of_a_batch_on_the_device_returns_the_same_object():
    batch = {"x": [tensor()], "pair": (tensor(), Sample(tensor()))}
    assert move_to_device(batch, torch.device("cpu")) is batch


def test_loader_moves_its_batches_to_the_device_of_the_rank():
    data = TensorDataset(torch.arange(8.0))
    config = load_config({"train_batch_size": 4})
    loader = build_loader(data, config, Ranks(0, 0, 1, META), None)
    assert [x.device for (x,) in loader] == [META, META]
