"""Train, save every second step and resume automatically; rank 0 prints one line per step.

python checkpoint_run.py DIRECTORY STEPS [BACKEND [sync|async [ENGINES [HOURS]]]]

If the number of ENGINES is passed, only two automatic checkpoints are kept, the user saves one
more, and the last line shows the state after the last step. With two engines, the second one trains
in turn, saves to DIRECTORY/second and prints lines that start with ``second:``. HOURS is the number
of hours by which the clock of this process is set back.
"""

import datetime as dt
import hashlib
import sys
import time

import torch
from torch.utils.data import TensorDataset

import engine

USER_TAG, USER_STEP = "mine", 5
KEEP = 2


class Trained:
    """An engine that prints a line for each step.

    Args:
        directory: directory for the checkpoints.
        backend: backend of the engine.
        is_async: whether checkpoints are written in the background.
        keep: number of automatic checkpoints to keep; None keeps the default number.
        prefix: start of each line.
        dropout: probability of dropout.
    """

    def __init__(self, directory, backend, is_async, *, keep=KEEP, prefix="", dropout=0.2):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(52, 4, generator=generator)
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.Dropout(dropout), torch.nn.Linear(8, 1)
        )
        cycle = {"cycle_min_lr": 0.001, "cycle_max_lr": 0.01, "cycle_first_step_size": 20}
        plan = {"dir": directory, "every": 2, "async": is_async, "keep": keep}
        config = {
            "train_batch_size": 8,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
            "scheduler": {"type": "OneCycle", "params": cycle},
            "engine": {"backend": backend, "checkpoint": plan},
        }
        data = TensorDataset(x, x.sum(1, keepdim=True))
        self.trainer, _, self.loader, _ = engine.initialize(
            config=config, model=self.net, training_data=data
        )
        self.prefix = prefix

    def train(self, steps):
        """Train until a step, and yield after each one."""
        while self.trainer.global_steps < steps:
            for features, target in self.loader:
                self._step(features, target)
                yield
                if self.trainer.global_steps == steps:
                    break

    def _step(self, features, target):
        trainer = self.trainer
        lr = trainer.get_lr()[0]
        trainer.backward((trainer(features) - target).pow(2).mean())
        trainer.step()
        self._print(trainer.global_steps, lr, features.sum().item())

    def print_next_step(self):
        """Print the learning rate of the next step and the weights."""
        self._print(self.trainer.global_steps + 1, self.trainer.get_lr()[0], 0.0)

    def _print(self, step, lr, sample_sum):
        weights = b"".join(p.detach().numpy().tobytes() for p in self.net.parameters())
        digest = hashlib.sha256(weights).hexdigest()[:16]
        if self.trainer.global_rank == 0:
            # Write the line at once: torchrun may forward part of a line.
            sys.stdout.write(f"{self.prefix}{step} {lr} {sample_sum} {digest}\n")
            sys.stdout.flush()


def set_clock_back(hours):
    """Set the clock of this process back, as another host's clock may be."""
    now, date = time.time, dt.datetime

    class Late(date):
        @classmethod
        def now(cls, tz=None):
            return date.now(tz) - dt.timedelta(hours=hours)

    time.time = lambda: now() - 3600 * hours
    dt.datetime = Late


def main(directory, steps, backend, is_async, engines):
    others, second = iter(()), None
    if engines == 2:
        # This engine draws no random numbers, so that each of the two resumes exactly.
        second = Trained(f"{directory}/second", backend, is_async, prefix="second:", dropout=0.0)
        others = second.train(steps)
    first = Trained(directory, backend, is_async, keep=KEEP if engines else None)
    for _ in first.train(steps):
        if engines and first.trainer.global_steps == USER_STEP:
            first.trainer.save_checkpoint(directory, USER_TAG)
        next(others, None)
    for _ in others:
        pass
    for trained in (first, second):
        if engines and trained is not None:
            trained.print_next_step()


if __name__ == "__main__":
    torch.set_num_threads(1)
    directory, steps, *rest = sys.argv[1:]
    backend, mode, engines, hours = (*rest, *("torch", "sync", "0", "0")[len(rest) :])
    set_clock_back(int(hours))
    main(directory, int(steps), backend, mode == "async", int(engines))
