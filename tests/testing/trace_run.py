"""A run whose every update is written down; the tests start it with and without torchrun."""

import json
import sys
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import engine


def main(config: str, output: str, updates: int) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(100, 16, generator=generator)
    data = TensorDataset(x, x[:, :4].argmax(1))
    trainer, _, loader, _ = engine.initialize(config=config, model=net, training_data=data)
    rows = []
    loss_of_window = 0.0
    while trainer.global_steps < updates:
        for x, y in loader:
            used = (trainer.get_lr()[0], trainer.get_momentum()[0])
            loss = cross_entropy(trainer(x).float(), y)
            trainer.backward(loss)
            loss_of_window += trainer._backend.mean(loss.item())
            trainer.step()
            if trainer.micro_steps % trainer.gradient_accumulation_steps() == 0:
                mean = loss_of_window / trainer.gradient_accumulation_steps()
                rows.append((trainer.was_step_applied(), mean, *used))
                loss_of_window = 0.0
            if trainer.global_steps == updates:
                break
    reductions = getattr(trainer._backend, "_parallel", None)
    trainer.save_checkpoint(Path(output).with_suffix(""))
    if trainer._backend.ranks.rank == 0:
        Path(output).write_text(json.dumps({"rows": rows, "ddp": reductions is not None}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
