"""A device that computes on the CPU but behaves like a GPU, to test device transfers without one.

An operation on tensors of the device refuses CPU tensors, as CUDA does. A non-blocking copy to host
memory is incomplete until the host waits for an event or for the device. The device counts the
values that the host reads, the blocking copies to the host, and the bytes that are allocated.

Call `install` in a process of its own, because torch cannot unregister a device type.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from unittest import mock

import torch
import torch.utils._pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import engine
from engine.distributed.ranks import Ranks

NAME = "gadget"
aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default}
COPIES = {aten.copy_.default, aten._to_copy.default, aten._foreach_copy_.default}


class FakeDevice(TorchDispatchMode):
    """Runs the operations on tensors of the fake device, and records transfers.

    Attributes:
        counts: number of host reads ("read"), blocking copies to the host ("to host"), and copies
            to the device ("to device").
        allocated: bytes of the tensors that currently exist on the device.
        peak: largest value of ``allocated``; assign it to start a new measurement.
    """

    def __init__(self):
        super().__init__()
        self.counts = Counter()
        self.allocated = self.peak = 0
        self.pending = []
        self._users = Counter()  # number of tensors per storage

    def synchronize(self):
        """Complete the non-blocking copies."""
        for target, values in self.pending:
            target.copy_(values)
        self.pending = []

    def wrap(self, raw):
        """Return a tensor of the device that has the values of a CPU tensor."""
        tensor = FakeTensor(raw)
        storage = raw.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if not self._users[key]:
            self.allocated += size
            self.peak = max(self.peak, self.allocated)
        self._users[key] += 1
        weakref.finalize(tensor, self._release, key, size)
        return tensor

    def _release(self, key, size):
        self._users[key] -= 1
        if not self._users[key]:
            self.allocated -= size

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        leaves = pytree.tree_leaves((args, kwargs))
        own = [leaf for leaf in leaves if isinstance(leaf, FakeTensor)]
        wanted = kwargs.get("device")
        target = NAME if own else "cpu"
        if wanted is not None:
            target = torch.device(wanted).type
            kwargs["device"] = "cpu" if target == NAME else wanted
        if not own and target != NAME:
            return op(*args, **kwargs)
        if op not in COPIES:
            self._check_devices(op, leaves)
        if op in READS:
            self.counts["read"] += 1
        raw_args, raw_kwargs = pytree.tree_map_only(
            FakeTensor, lambda leaf: leaf.raw, (args, kwargs)
        )
        if op is aten.copy_.default:
            return self._copy(args, raw_args, kwargs)
        if op is aten._to_copy.default and target == "cpu":
            return self._copy_to_host(raw_args[0], raw_kwargs)
        if op is aten._to_copy.default and not own:
            self.counts["to device"] += 1
        known = {id(leaf.raw): leaf for leaf in own}
        result = op(*raw_args, **raw_kwargs)
        if target == "cpu":
            return result
        return pytree.tree_map_only(
            torch.Tensor,
            lambda leaf: known[id(leaf)] if id(leaf) in known else self.wrap(leaf),
            result,
        )

    def _check_devices(self, op, leaves):
        for leaf in leaves:
            # As on CUDA, a CPU tensor without dimensions counts as a number.
            if isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor) and leaf.dim():
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but found {NAME}:0 and cpu "
                    f"in {op}"
                )

    def _copy(self, args, raw_args, kwargs):
        target, source = args[:2]
        is_to_host = not isinstance(target, FakeTensor)
        if not is_to_host:
            self.counts["to device"] += not isinstance(source, FakeTensor)
            raw_args[0].copy_(raw_args[1])
        elif kwargs.get("non_blocking") or args[2:] == (True,):
            # The copy takes the values that the source has now, because streams keep the order.
            self.pending.append((target, raw_args[1].clone()))
        else:
            self.synchronize()
            self.counts["to host"] += 1
            target.copy_(raw_args[1])
        return target

    def _copy_to_host(self, raw, kwargs):
        if kwargs.pop("non_blocking", False):
            result = torch.full_like(raw, -1)
            self.pending.append((result, aten._to_copy.default(raw, **kwargs)))
            return result
        self.synchronize()
        self.counts["to host"] += 1
        return aten._to_copy.default(raw, **kwargs)


class FakeTensor(torch.Tensor):
    """A tensor of the fake device; ``raw`` is the CPU tensor that stores its values."""

    @staticmethod
    def __new__(cls, raw):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.shape,
            dtype=raw.dtype,
            device=torch.device(NAME, 0),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            requires_grad=False,
        )
        tensor.raw = raw
        return tensor

    def __init__(self, *_):
        pass

    def __repr__(self):
        return f"FakeTensor({self.raw})"

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        with _installed:
            return op(*args, **(kwargs or {}))


class _Event:
    def record(self, stream=None):
        pass

    def synchronize(self):
        _installed.synchronize()


class _Stream:
    def record_event(self, event=None):
        return event or _Event()


class _Module:
    """The functions that torch looks up in the module of a device type, such as `torch.cuda`.

    Attributes:
        rng_reads: how often the random state of the device has been read.
    """

    Event = _Event
    _initialized = True
    rng_reads = 0

    def device(self, index):
        return contextlib.nullcontext()

    def get_rng_state(self, device=None):
        self.rng_reads += 1
        return torch.zeros(1, dtype=torch.uint8)

    def set_rng_state(self, state, device=None):
        pass

    def is_initialized(self):
        return True

    def is_available(self):
        return True

    def current_device(self):
        return 0

    def device_count(self):
        return 1

    def _is_in_bad_fork(self):
        return False

    def manual_seed_all(self, seed):
        pass

    def synchronize(self, device=None):
        _installed.synchronize()

    def current_stream(self, device=None):
        return _Stream()


_installed = None


@contextlib.contextmanager
def install():
    """Register the device type with torch, and yield the device, whose name is ``NAME``."""
    global _installed  # noqa: PLW0603  # torch's registration is global, too
    if _installed is None:
        _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
        _installed = FakeDevice()
    with _installed:
        yield _installed


def start(model, **sections):
    """Return an engine that trains a model on the fake device; call `install` first."""
    config = {
        "train_batch_size": 2,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "engine": {"backend": "torch"},
    }
    ranks = Ranks(0, 0, 1, torch.device(NAME, 0))
    with mock.patch("engine.initialization.init_distributed", return_value=ranks):
        return engine.initialize(model=model, config=config | sections)[0]
