"""Save, restore and seed the random number generators of Python, NumPy and PyTorch."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor

from schedules.core.fields import Range
from schedules.core.saved_state import OPTIONAL, restore

__all__ = ["check_rng_state", "get_rng_state", "preserve_rng_state", "seed_rng", "set_rng_state"]


def get_rng_state() -> dict[str, Any]:
    """Return the RNG states of Python, NumPy, PyTorch and, if CUDA is in use, this rank's GPU."""
    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002  # scripts use the global generator
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).copy()), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    # A run on the CPU must not create a CUDA context, and a forked worker cannot.
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # untyped in torch
        state["cuda"] = torch.cuda.get_rng_state()
    return state


@dataclass(frozen=True)
class _RngState:
    """Fields and types of the dict that `get_rng_state` returns."""

    python: tuple[int, tuple[int, ...], float | None]
    numpy: tuple[
        Literal["MT19937"], Tensor, Annotated[int, Range(at_least=0, at_most=624)], int, float
    ]
    torch: Tensor
    cuda: Tensor | None = field(default=None, metadata=OPTIONAL)


def check_rng_state(state: Any) -> None:
    """Check that `set_rng_state` accepts a state, and leave the current RNG states unchanged.

    Raises:
        Exception: the state has the wrong format, or a generator rejects its saved state.
    """
    restore(_RngState, state, "state")
    with preserve_rng_state():
        set_rng_state(state)


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore RNG states returned by `get_rng_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy(), *rest))  # noqa: NPY002  # scripts use the global generator
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextlib.contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Save the RNG states, and restore them when the context exits, even after an exception."""
    state = get_rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


def seed_rng(seed: str) -> None:
    """Seed the CPU random number generators of Python, NumPy and PyTorch.

    >>> with preserve_rng_state():
    ...     seed_rng("0")
    ...     first = torch.rand(1)
    ...     seed_rng("0")
    ...     bool(first == torch.rand(1))
    True
    """
    random.seed(seed)
    np.random.seed(random.getrandbits(32))  # noqa: NPY002  # datasets use the global generator
    # `torch.manual_seed` would also seed the GPUs, which a worker does not use.
    torch.default_generator.manual_seed(random.getrandbits(63))
