"""Train, save every second step and resume automatically; rank 0 prints one line per step.

python checkpoint_run.py DIRECTORY STEPS [BACKEND [sync|async]]
"""

import hashlib
import sys

import torch
from torch.utils.data import TensorDataset

import engine


def main(directory, steps, backend, is_async):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(52, 4, generator=generator)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))
    config = {
        "train_batch_size": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "scheduler": {
            "type": "OneCycle",
            "params": {"cycle_min_lr": 0.001, "cycle_max_lr": 0.01, "cycle_first_step_size": 20},
        },
        "engine": {
            "backend": backend,
            "checkpoint": {"dir": directory, "every": 2, "async": is_async},
        },
    }
    data = TensorDataset(x, x.sum(1, keepdim=True))
    trainer, _, loader, _ = engine.initialize(config=config, model=net, training_data=data)
    while trainer.global_steps < steps:
        for features, target in loader:
            lr = trainer.get_lr()[0]
            trainer.backward((trainer(features) - target).pow(2).mean())
            trainer.step()
            weights = b"".join(p.detach().numpy().tobytes() for p in net.parameters())
            digest = hashlib.sha256(weights).hexdigest()[:16]
            if trainer.global_rank == 0:
                # Write the line at once: torchrun may forward part of a line.
                sys.stdout.write(f"{trainer.global_steps} {lr} {features.sum().item()} {digest}\n")
                sys.stdout.flush()
            if trainer.global_steps == steps:
                break


if __name__ == "__main__":
    torch.set_num_threads(1)
    directory, steps, *rest = sys.argv[1:]
    backend, mode = (*rest, *("torch", "sync")[len(rest) :])
    main(directory, int(steps), backend, mode == "async")
