"""Helpers of the GPU tests, which `--dry-run` runs on the CPU with smaller sizes."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import resource_tracker

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

import engine
from tests.testing import distributed
from tests.testing.distributed import run_distributed_test

OPTIMIZER = {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}}
CYCLE = {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-3, "cycle_first_step_size": 10}
SCHEDULER = {"type": "OneCycle", "params": CYCLE}
CLASSES = 10


@dataclass(frozen=True)
class Machine:
    """The device that the tests train on: a GPU or, in a dry run, the CPU."""

    is_dry: bool

    @property
    def device(self):
        return torch.device("cpu") if self.is_dry else torch.device("cuda", 0)

    def size(self, real, dry):
        return dry if self.is_dry else real

    def run(self, function, *args):
        """Call ``function(machine, *args)`` in a new process, which may create a process group."""
        if self.is_dry:
            run_distributed_test(function, 1, self, *args)
            return
        # CUDA does not work in a forked process, if the parent has used it.
        resource_tracker.ensure_running()
        distributed.server_pids.add(resource_tracker._resource_tracker._pid)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context, initializer=_start_process) as pool:
            pool.submit(function, self, *args).result()

    def build_model(self, *, dropout=0.0):
        """Return a transformer encoder with a list of blocks, on the CPU."""
        return build_model(self.size(256, 16), self.size(4, 2), dropout)

    def draw_batches(self, count, *, seed=0, device=None, scale=1):
        """Return batches of random inputs and labels, ``scale`` times as large as usual."""
        generator = torch.Generator().manual_seed(seed)
        width, rows = self.size(256, 16), scale * self.size(32, 4)
        return [
            (
                torch.randn(rows, 8, width, generator=generator).to(device or self.device),
                torch.randint(CLASSES, (rows,), generator=generator).to(device or self.device),
            )
            for _ in range(count)
        ]

    def start(self, model=None, **sections):
        """Return an engine on the device; by default with AdamW and 1Cycle, on PyTorch."""
        own = {"backend": "torch", "device": self.device.type} | sections.pop("engine", {})
        if own["backend"] == "deepspeed":
            del own["device"]
        config = {
            "train_micro_batch_size_per_gpu": self.size(32, 4),
            "optimizer": OPTIMIZER,
            "scheduler": SCHEDULER,
            "steps_per_print": None,
        }
        optimizer = sections.pop("own_optimizer", None)
        if optimizer is not None:
            del config["optimizer"]
        config |= sections | {"engine": own}
        model = model or self.build_model()
        return engine.initialize(model=model, optimizer=optimizer, config=config)[0]

    def measure_peak(self, function):
        """Return the number of bytes by which a call exceeded the memory in use; 0 on the CPU."""
        if self.is_dry:
            function()
            return 0
        torch.cuda.synchronize()
        used = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - used

    @contextlib.contextmanager
    def count_syncs(self):
        """Count the points at which the host waits for the device, by place in the code.

        On a GPU, CUDA reports them. On the CPU, operations that read a value are counted.
        """
        found = Counter()
        if self.is_dry:
            with _ReadCounter(found):
                yield found
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the mode itself warns that it is a prototype
            torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found.update(
            f"{warning.filename}:{warning.lineno}"
            for warning in caught
            if "synchronizing" in str(warning.message)
        )


class _ReadCounter(TorchDispatchMode):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op in {
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.is_nonzero.default,
            torch.ops.aten.equal.default,
        }:
            self.found[str(op)] += 1
        return op(*args, **(kwargs or {}))


class Block(nn.Module):
    """A residual block that takes keyword arguments, as the blocks of Hugging Face models do."""

    def __init__(self, width, dropout):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(width), nn.Linear(width, 4 * width)
        self.outer, self.dropout = nn.Linear(4 * width, width), nn.Dropout(dropout)

    def forward(self, *, hidden):
        inner = nn.functional.gelu(self.inner(self.norm(hidden)))
        return hidden + self.dropout(self.outer(inner))


class Net(nn.Module):
    """A stack of blocks and a classifier; returns the loss if it gets labels."""

    def __init__(self, width, depth, dropout):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(depth))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x, labels=None):
        for block in self.blocks:
            x = block(hidden=x)
        logits = self.head(x.mean(1))
        return logits if labels is None else cross_entropy(logits.float(), labels)


def build_model(width, depth, dropout=0.0):
    torch.manual_seed(0)
    return Net(width, depth, dropout)


def train(trainer, batches):
    """Take one step per batch, and return the losses."""
    losses = []
    for batch in batches:
        loss = trainer(*batch)
        trainer.backward(loss)
        trainer.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def copy_weights(trainer):
    return [
        (each.full_tensor() if hasattr(each, "full_tensor") else each).detach().cpu().clone()
        for each in trainer.module.parameters()
    ]


def _start_process():
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
