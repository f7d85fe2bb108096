"""Training runs that differ only in backend, ZeRO stage and precision."""

import logging
import math

import torch
from torch.nn.functional import cross_entropy

import engine
from tests.testing.distributed import run_distributed_test

SCHEDULER = {
    "type": "OneCycle",
    "params": {
        "cycle_min_lr": 0.001,
        "cycle_max_lr": 0.01,
        "cycle_first_step_size": 12,
        "cycle_first_stair_count": 4,
        "cycle_min_mom": 0.85,
        "cycle_max_mom": 0.95,
        "decay_step_size": 4,
        "decay_lr_rate": 0.5,
    },
}
# With this scale, these small models never overflow.
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 8}}
STAGES = [(backend, stage) for backend in ("torch", "deepspeed") for stage in range(4)]


def config(backend, stage, **changes):
    zero = {"zero_optimization": {"stage": stage}} if stage else {}
    return {
        "train_batch_size": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.001}},
        "scheduler": SCHEDULER,
        "engine": {"backend": backend},
        **zero,
        **changes,
    }


def parity(steps):
    """Return runs that train the same steps with every backend, ZeRO stage and precision."""
    precisions = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}}
    return {
        f"{model} {precision} {backend} {stage}": {
            "model": model,
            "config": config(backend, stage, **changes),
            "steps": steps,
        }
        for model in ("transformer", "lenet")
        for precision, changes in precisions.items()
        for backend, stage in STAGES
    }


def overflows(steps, poison):
    """Return runs with every loss scaler, in which the gradients of some steps are not finite."""
    autocast = {"torch_autocast": {"enabled": True, "dtype": "float16"}}
    bf16 = {"bf16": {"enabled": True}}
    kinds = {
        # DeepSpeed does not support fp16 on most CPUs; its autocast scales the loss, too.
        "torch": {"fp16": FP16, "bf16": bf16, "fp32": {}},
        "deepspeed": {"autocast": autocast, "bf16": bf16},
    }
    runs = {
        f"{kind} {backend} {stage}": config(backend, stage, **changes)
        for backend, sections in kinds.items()
        for kind, changes in sections.items()
        for stage in range(4)
    }
    return {
        name: {"model": "lenet", "config": each, "steps": steps, "poison": poison}
        for name, each in runs.items()
    }


class Block(torch.nn.Module):
    """A transformer layer without dropout."""

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
    """A transformer with three layers and sixteen tokens."""

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
    """Two convolutions and two dense layers for images of 12 x 12 pixels."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
            torch.nn.Conv2d(4, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(),
            torch.nn.Linear(72, 24), torch.nn.ReLU(), torch.nn.Linear(24, 10),
        )  # fmt: skip

    def forward(self, images):
        return self.body(images)


def draw_batch(name, step, size):
    """Return the whole batch of a step, which is the same in every run."""
    generator = torch.Generator().manual_seed(step)
    if name == "transformer":
        tokens = torch.randint(16, (size, 9), generator=generator)
        return tokens[:, :-1], (tokens[:, :-1] * 3 + 1) % 16
    images = torch.randn(size, 1, 12, 12, generator=generator)
    return images, images[:, 0, 2:4, 2:7].flatten(1).argmax(1)


class Announcements(logging.Handler):
    """A log handler that collects the lines which an engine logs while it is built."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def run(model, config, steps, poison=()):
    """Train, and return (applied, loss, lr, momentum) of each step, log lines and counts."""
    torch.manual_seed(0)
    net = {"transformer": Transformer, "lenet": LeNet}[model]()
    parameters = sum(p.numel() for p in net.parameters())
    log, announcements = logging.getLogger("onecycle"), Announcements()
    log.addHandler(announcements)
    log.setLevel(logging.INFO)
    trainer, *_ = engine.initialize(config=config, model=net)
    log.removeHandler(announcements)
    size, micro = trainer.train_batch_size(), trainer.train_micro_batch_size_per_gpu()
    rows = []
    for step in range(steps):
        inputs, targets = draw_batch(model, step, size)
        used = (trainer.get_lr()[0], trainer.get_momentum()[0])
        total = 0.0
        for index in range(trainer.gradient_accumulation_steps()):
            start = (index * trainer.world_size + trainer.global_rank) * micro
            x, y = inputs[start : start + micro], targets[start : start + micro]
            logits = trainer(x).float()
            loss = cross_entropy(logits.flatten(0, -2), y.flatten())
            if step in poison:
                loss = loss * math.inf
            trainer.backward(loss)
            total += trainer.mean(loss.item()) / trainer.gradient_accumulation_steps()
            applied = trainer.step()
        rows.append((applied, total, *used))
    record = {
        "rows": rows,
        "announcement": "\n".join(announcements.lines),
        "parameters": parameters,
        "skipped": trainer.skipped_steps,
        "applied": trainer.lr_scheduler.last_epoch,
        "beta2": sorted({group["betas"][1] for group in trainer.optimizer.param_groups}),
    }
    trainer.destroy()
    return record


def run_all(runs):
    """Train all runs in this process, one after another, and return their records by name."""
    return {name: run(**arguments) for name, arguments in runs.items()}


def launch(runs, world_size):
    """Train all runs on ``world_size`` ranks, and return the records of rank 0."""
    return run_distributed_test(run_all, world_size, runs, timeout=300)[0]
