"""Plain values are saved and restored with their types, without running code from the file."""

import argparse
import array
import collections
import datetime as dt
import functools
import os
import random
import types
import uuid
import zoneinfo
from decimal import Decimal
from fractions import Fraction
from pathlib import PurePosixPath

import numpy as np
import pytest
import torch

from engine.checkpoint.deepspeed_pickles import read_file
from engine.checkpoint.plain_values import read_values, write_values
from engine.errors import CheckpointError

QUEUE = collections.deque([1, 2], maxlen=2)
NESTED = {
    "namespace": argparse.Namespace(queue=QUEUE, pair=(QUEUE, 1)),
    "simple": types.SimpleNamespace(lists=collections.defaultdict(list, a=[QUEUE])),
    "counts": collections.Counter(a=2),
    "ordered": collections.OrderedDict(queues=collections.deque([QUEUE])),
    "queues": collections.defaultdict(collections.deque, a=QUEUE),
}
FACTORIES = (None, int, float, str, bytes, list, tuple, dict, set, frozenset, collections.Counter)


@pytest.mark.parametrize(
    "value",
    [
        collections.deque("ab"),
        QUEUE,
        types.SimpleNamespace(a=[1]),
        frozenset([1, (2, 3)]),
        range(1, 9, 2),
        slice(1, None),
        Decimal("1.10"),
        Fraction(1, 3),
        uuid.UUID(int=3),
        bytearray(b"ab"),
        bytearray(),
        array.array("d", [0.5]),
        dt.time(1, 2, tzinfo=dt.UTC),
        PurePosixPath("a/b"),
        *(collections.defaultdict(factory, a=1) for factory in FACTORIES),
        NESTED,
    ],
    ids=repr,
)
@pytest.mark.parametrize("read", [read_values, read_file])  # in our files and in DeepSpeed's
def test_plain_value_is_restored_with_its_type(value, read, tmp_path):
    write_values(tmp_path / "x.pt", value)
    loaded = read(tmp_path / "x.pt")
    assert (type(loaded), loaded) == (type(value), value)
    assert repr(loaded) == repr(value)  # with the types of nested values, and `maxlen`
    assert getattr(loaded, "default_factory", None) is getattr(value, "default_factory", None)


def draw(generator):
    if isinstance(generator, torch.Generator):
        return torch.rand(3, generator=generator).tolist()
    return [generator.random() for _ in range(3)]


@pytest.mark.parametrize(
    "generator",
    [
        np.random.default_rng(1),
        np.random.Generator(np.random.MT19937(1)),
        np.random.Generator(np.random.Philox(1)),
        np.random.RandomState(1),
        random.Random(1),
        torch.Generator().manual_seed(1),
    ],
    ids=lambda generator: type(generator).__module__,
)
def test_random_generator_continues_where_it_was_saved(generator, tmp_path):
    draw(generator)
    write_values(tmp_path / "x.pt", {"generator": generator})
    wanted = draw(generator)
    assert draw(read_values(tmp_path / "x.pt")["generator"]) == wanted


def test_shared_deque_is_restored_as_one_object(tmp_path):
    queue = collections.deque([1])
    write_values(tmp_path / "x.pt", [queue, (queue,), {"a": queue}])
    first, (second,), third = read_values(tmp_path / "x.pt")
    assert first is second is third["a"]


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (collections.deque([print]), r"`x\[0\]` must be .*`builtins.builtin_function"),
        (collections.defaultdict(lambda: 1), "`x.default_factory` must be .*`builtins.function`"),
        (types.SimpleNamespace(a=argparse), r"`x\['a'\]` must be .*`builtins.module`"),
        (slice(0, print), "`x.stop` must be"),
        (functools.partial(max, 1), "got `functools.partial`"),
        (dt.datetime(2026, 1, 2, tzinfo=zoneinfo.ZoneInfo("UTC")), "`x.tzinfo` must be"),
        (random.SystemRandom(), "got `random.SystemRandom`"),
    ],
)
def test_value_that_could_not_be_loaded_is_refused_when_it_is_saved(value, problem, tmp_path):
    with pytest.raises(ValueError, match=problem):
        write_values(tmp_path / "x.pt", value)


class Bomb:
    def __reduce__(self):
        return os.makedirs, ("exploded", 0o700, True)


@pytest.mark.parametrize(
    "value",
    [
        collections.deque([Bomb()]),
        collections.defaultdict(list, a=Bomb()),
        collections.defaultdict(os.getcwd),
        types.SimpleNamespace(a=Bomb()),
        slice(Bomb()),
        functools.partial(os.getcwd),
    ],
    ids=lambda value: type(value).__name__,
)
def test_code_in_a_container_is_not_run(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(value, "x.pt")
    for read in (read_values, read_file):
        with pytest.raises(
            CheckpointError, match=r"`(posix|os|functools)\.\w+`, which can execute"
        ):
            read(tmp_path / "x.pt")
    assert not (tmp_path / "exploded").exists()


def test_defaultdict_with_a_function_of_the_unpickler_is_damaged(tmp_path):
    torch.save(collections.defaultdict(torch._utils._rebuild_tensor_v2), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="is damaged: a defaultdict cannot use"):
        read_values(tmp_path / "x.pt")
