"""Runs that differ in backend, stage and precision alone, one after the other in these processes.

    python backends_run.py RUNS.json ROWS.json

Each run's rows of (applied, loss, lr, momentum) are written down; several ranks by torchrun.
"""

import json
import math
import sys
import warnings
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

warnings.simplefilter("ignore")

import engine  # noqa: E402


class Block(torch.nn.Module):
    """A layer of a small transformer, without dropout."""

    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.attention = torch.nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(width, 2 * width), torch.nn.GELU(), torch.nn.Linear(2 * width, width)
        )

    def forward(self, x):
        normed = self.norm1(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Transformer(torch.nn.Module):
    """Three layers over sixteen tokens."""

    def __init__(self, width=16, tokens=16):
        super().__init__()
        self.embedding = torch.nn.Embedding(tokens, width)
        self.layers = torch.nn.ModuleList(Block(width) for _ in range(3))
        self.head = torch.nn.Linear(width, tokens)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class LeNet(torch.nn.Module):
    """Two convolutions and two dense layers on pictures of 12 x 12."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
            torch.nn.Conv2d(4, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(),
            torch.nn.Linear(72, 24), torch.nn.ReLU(), torch.nn.Linear(24, 10),
        )  # fmt: skip

    def forward(self, images):
        return self.body(images)


def batch_of(name, update, size):
    """The same whole batch for every run; a rank takes its share."""
    generator = torch.Generator().manual_seed(update)
    if name == "transformer":
        tokens = torch.randint(16, (size, 9), generator=generator)
        return tokens[:, :-1], (tokens[:, :-1] * 3 + 1) % 16
    images = torch.randn(size, 1, 12, 12, generator=generator)
    return images, images[:, 0, 2:4, 2:7].flatten(1).argmax(1)


def run(model, config, updates, poison=()):
    torch.manual_seed(0)
    net = {"transformer": Transformer, "lenet": LeNet}[model]()
    parameters = sum(p.numel() for p in net.parameters())
    trainer, *_ = engine.initialize(config=config, model=net)
    size, micro = trainer.train_batch_size(), trainer.train_micro_batch_size_per_gpu()
    rows = []
    for update in range(updates):
        inputs, targets = batch_of(model, update, size)
        used = (trainer.get_lr()[0], trainer.get_momentum()[0])
        total = 0.0
        for step in range(trainer.gradient_accumulation_steps()):
            begin = (step * trainer.world_size + trainer.global_rank) * micro
            x, y = inputs[begin : begin + micro], targets[begin : begin + micro]
            logits = trainer(x).float()
            loss = cross_entropy(logits.flatten(0, -2), y.flatten())
            if update in poison:
                loss = loss * math.inf
            trainer.backward(loss)
            total += trainer.mean(loss.item()) / trainer.gradient_accumulation_steps()
            applied = trainer.step()
        rows.append((applied, total, *used))
    summary = {
        "rows": rows,
        "about": trainer._backend.describe(),
        "optimizer": type(trainer._backend.basic_optimizer).__name__,
        "trained": trainer._backend.trained,
        "parameters": parameters,
        "skipped": trainer.skipped_steps,
        "updates": trainer.lr_scheduler.last_epoch,
        "beta2": sorted({group["betas"][1] for group in trainer.optimizer.param_groups}),
        "groups": len(trainer.optimizer.param_groups),
    }
    rank = trainer.global_rank
    trainer.destroy()
    return rank, summary


def main(runs, output):
    results = {}
    rank = 0
    for name, arguments in json.loads(Path(runs).read_text()).items():
        rank, results[name] = run(**arguments)
    if rank == 0:
        Path(output).write_text(json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
