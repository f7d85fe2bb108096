"""Count the operations that make the host wait for the values of a device."""

from __future__ import annotations

import collections
import contextlib
import traceback

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_READS = {
    _aten._local_scalar_dense,  # `item`, `float`, `int` and `bool`
    _aten.is_nonzero,
    _aten.equal,
    # The size of the result depends on the values.
    _aten.nonzero,
    _aten.masked_select,
    _aten._unique2,
    _aten.repeat_interleave,
}
_COPIES = {_aten.copy_, _aten._to_copy}
_METHODS = {torch.Tensor.tolist, torch.Tensor.cpu}
"""Methods that are not dispatched as an operation if the tensor is in host memory."""


class HostReads:
    """Counts host reads inside its context: values that the host reads, and blocking copies.

    A CPU run counts the reads that would wait on a GPU, because the operations are the same. Copies
    count only between two devices. A read through ``numpy()`` is not counted, because it is
    possible only for a tensor in host memory, which the host reads without waiting for a device.

    Attributes:
        found: number of reads by operation and by the line of onecycle that caused it.
    """

    def __init__(self):
        self.found = collections.Counter()
        self._modes = contextlib.ExitStack()

    def __enter__(self):
        self._modes.enter_context(_Methods(self._add))
        self._modes.enter_context(_Operations(self._add))
        return self

    def __exit__(self, *error):
        self._modes.close()

    def _add(self, name):
        self.found[f"{name} in {_find_caller()}"] += 1


class _Methods(TorchFunctionMode):
    def __init__(self, add):
        super().__init__()
        self._add = add

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _METHODS:
            self._add(func.__name__)
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, add):
        super().__init__()
        self._add = add

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func.overloadpacket
        if packet in _READS or (packet in _COPIES and _is_blocking(args, kwargs, result)):
            self._add(packet.__name__)
        return result


def _is_blocking(args, kwargs, result):
    devices = {each.device for each in (*args, result) if isinstance(each, torch.Tensor)}
    return len(devices) > 1 and not kwargs.get("non_blocking")


def _find_caller():
    for frame in reversed(traceback.extract_stack()):
        for package in ("engine", "schedules"):
            directory, found, rest = frame.filename.rpartition(f"/{package}/")
            if found and not directory.endswith("/tests"):
                return f"{package}/{rest}:{frame.lineno}"
    return "the script"
