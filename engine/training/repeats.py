"""Detect ranks or workers that load the same batches because the data is not split among them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from engine.distributed.ranks import Ranks

__all__ = ["RepeatCheck"]

_ROUNDS = 4
"""Number of batches to compare per worker."""
_numbers = itertools.count()


class RepeatCheck:
    """A check that a data loader's first batches differ between ranks and between workers.

    Use this class for datasets and samplers that must split the data themselves, such as iterable
    datasets. If the data is not split, each rank and each worker loads the whole dataset. No rank
    waits for another during the check, so a script may iterate over the loader on just one rank.

    Args:
        ranks: this process's rank and the world size.
        num_workers: number of worker processes. The loader takes batches from them in turn.
    """

    def __init__(self, ranks: Ranks, num_workers: int) -> None:
        self._ranks = ranks
        self._workers = max(num_workers, 1)
        self._digests: list[bytes] = []
        self._number = next(_numbers)  # the ranks create their loaders in the same order

    def add(self, batch: Any) -> bool:
        """Add the next batch, and return whether the check needs more batches.

        Raises:
            ValueError: all workers of this rank load the same batches, or another rank loads the
                same batches as this rank.
        """
        digest, is_empty = hashlib.sha256(), True
        for data in _read_data(batch):
            digest.update(data)
            is_empty = False
        if is_empty:
            return False
        self._digests.append(digest.digest())
        if len(self._digests) < _ROUNDS * self._workers:
            return True
        if len(set(self._digests)) > 1:  # constant data looks the same on all ranks
            self._check_workers()
            self._check_ranks()
        return False

    def _check_workers(self) -> None:
        rounds = [self._digests[i :: self._workers] for i in range(self._workers)]
        if self._workers > 1 and all(each == rounds[0] for each in rounds):
            raise ValueError(
                f"All {self._workers} workers of the data loader load the same batches. In the "
                "dataset's `__iter__`, use `torch.utils.data.get_worker_info()` to select the "
                "samples of each worker, or set `num_workers` to 1."
            )

    def _check_ranks(self) -> None:
        if self._ranks.world_size == 1:
            return
        together = hashlib.sha256(b"".join(self._digests)).hexdigest()
        store = dist.distributed_c10d._get_default_store()  # noqa: SLF001  # private in torch
        if store.add(f"onecycle/batches/{self._number}/{together}", 1) > 1:
            raise ValueError(
                f"Rank {self._ranks.rank} and another rank load the same batches. In the dataset "
                "or the sampler, use `torch.distributed.get_rank()` to select the samples of each "
                "rank."
            )


def _read_data(value: Any) -> Iterator[Any]:
    """Yield the data of a batch as bytes-like objects."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for each in value:
            yield from _read_data(each)
    if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta:
        value = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    if isinstance(value, np.ndarray) and value.dtype != object:
        yield np.ascontiguousarray(value).data
    if isinstance(value, str | bytes | int | float):
        yield repr(value).encode()
