"""Train with one of several training loops, and interrupt the run at a given step.

python cut_run.py DIRECTORY LOOP CUT STEP

Each rank appends a row to ``DIRECTORY/rows.RANK`` for each step: its number, the learning rate, the
samples and a hash of the weights.

LOOP is ``batches`` (iterate over ``trainer.batches()``), ``epochs`` (iterate over the remaining
epochs), ``workers`` (like ``batches``, with a data loader of the script that has two workers) or
``script`` (save and load checkpoints in the script, after each epoch). CUT is ``kill``, ``SIGTERM``
or ``SIGINT`` (send this signal to the process before step STEP), ``epoch`` (exit after the epoch
that contains STEP) or ``none``.
"""

import hashlib
import os
import signal
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

import engine

SAMPLES, BATCH, EPOCHS = 44, 8, 3


class Numbers(Dataset):
    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        x = torch.randn(4, generator=torch.Generator().manual_seed(index))
        return index, x, x.sum().reshape(1)


def start(directory, loop):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))
    plan = {} if loop == "script" else {"dir": f"{directory}/checkpoints", "every": 4}
    config = {
        "train_batch_size": BATCH,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "scheduler": {
            "type": "OneCycle",
            "params": {"cycle_min_lr": 0.001, "cycle_max_lr": 0.01, "cycle_first_step_size": 9},
        },
        "engine": {"max_duration": f"{EPOCHS}ep", "checkpoint": plan},
    }
    data = Numbers()
    if loop == "workers":
        micro = BATCH // int(os.environ.get("WORLD_SIZE", "1"))
        data = DataLoader(data, batch_size=micro, shuffle=True, num_workers=2)
    return engine.initialize(config=config, model=net, training_data=data)[0]


def train_step(trainer, batch, directory, cut, cut_step):
    samples, x, y = batch
    lr = trainer.get_lr()[0]
    trainer.backward((trainer(x) - y).pow(2).mean())
    if trainer.global_steps == cut_step and cut in {"kill", "SIGTERM", "SIGINT"}:
        os.kill(os.getpid(), signal.SIGKILL if cut == "kill" else signal.Signals[cut])
    rows = Path(directory, f"rows.{trainer.global_rank}")
    try:
        trainer.step()
    finally:  # a signal ends the process after the step
        weights = b"".join(p.detach().numpy().tobytes() for p in trainer.module.parameters())
        digest = hashlib.sha256(weights).hexdigest()[:16]
        with rows.open("a") as file:
            file.write(f"{trainer.global_steps} {lr} {samples.tolist()} {digest}\n")


def run_batches(trainer, directory, *cut):
    for batch in trainer.batches():
        train_step(trainer, batch, directory, *cut)


def run_epochs(trainer, directory, cut, cut_step):
    for _ in range(trainer.epoch, EPOCHS):
        for batch in trainer.training_dataloader:
            train_step(trainer, batch, directory, cut, cut_step)
        if cut == "epoch" and trainer.global_steps > cut_step:
            trainer.save_checkpoint(f"{directory}/checkpoints")
            sys.exit()


def run_script(trainer, directory, cut, cut_step):
    saved = -1
    if Path(directory, "checkpoints").exists():
        _, state = trainer.load_checkpoint(f"{directory}/checkpoints")
        saved = state["epoch"]
    for epoch in range(saved + 1, EPOCHS):
        for batch in trainer.training_dataloader:
            train_step(trainer, batch, directory, cut, cut_step)
        trainer.save_checkpoint(f"{directory}/checkpoints", client_state={"epoch": epoch})
        if cut == "epoch" and trainer.global_steps > cut_step:
            sys.exit()


LOOPS = {
    "batches": run_batches,
    "epochs": run_epochs,
    "workers": run_batches,
    "script": run_script,
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    directory, loop, cut, cut_step = sys.argv[1:]
    LOOPS[loop](start(directory, loop), directory, cut, int(cut_step))
