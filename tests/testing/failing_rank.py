"""A training script in which rank 1 fails while the other ranks wait for it in a collective.

    failing_rank.py KIND {torch,deepspeed} [CHECKPOINT_DIR]

KIND is loop, worker, hook, exit, interrupt, end, hang, kill or none.

Without a failure, it trains until it receives a signal. Rank 1 writes the time of its failure to
the file ``failed_at``; each rank writes its process id to the file ``training.RANK`` after its
first step.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import engine

FAILING_STEP = 5
FAILURES = {
    "loop": ValueError("rank 1 fails"),
    "worker": ValueError("the data of rank 1 are damaged"),
    "hook": ValueError("the hook of rank 1 fails"),
    "exit": SystemExit(3),
    "interrupt": KeyboardInterrupt(),
    "end": SystemExit(0),
}


def fail(kind: str) -> None:
    Path("failed_at").write_text(str(time.time()))
    if kind == "hang":
        time.sleep(1000)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise FAILURES[kind]


class Numbers(Dataset[Tensor]):
    """An endless data set. If ``fails`` is true, reading the samples of one step fails."""

    def __init__(self, *, fails: bool) -> None:
        self.fails = fails

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> Tensor:
        if self.fails and index // 2 == FAILING_STEP:
            fail("worker")
        return torch.ones(2)


def main(kind: str, backend: str, directory: str | None = None) -> None:
    section = {"backend": backend}
    if directory is not None:
        section["checkpoint"] = {"dir": directory}
    config = {"train_batch_size": 4, "optimizer": {"type": "SGD"}, "engine": section}
    model = torch.nn.Linear(2, 1)
    trainer, *_ = engine.initialize(config=config, model=model)
    rank = trainer.global_rank
    data = Numbers(fails=rank == 1 and kind == "worker")
    for step, x in enumerate(DataLoader(data, batch_size=2, num_workers=int(kind == "worker"))):
        if rank == 1 and step == FAILING_STEP and kind == "hook":
            model.register_full_backward_hook(lambda *_: fail("hook"))
        elif rank == 1 and step == FAILING_STEP and kind in {*FAILURES, "hang", "kill"}:
            fail(kind)
        trainer.backward(trainer(x).pow(2).mean())
        trainer.step()
        if step == 0:
            Path(f"training.{rank}").write_text(str(os.getpid()))
        if kind == "none":
            time.sleep(0.01)


if __name__ == "__main__":
    main(*sys.argv[1:])
