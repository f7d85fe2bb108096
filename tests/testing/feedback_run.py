"""AutoWU on some ranks and a backend; rank 0 prints the learning rate of each update."""

import sys

import torch

import engine
from engine.distributed.ranks import destroy_distributed


def main(backend):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    params = {"steps_per_epoch": 10, "total_epochs": 15, "test": "robust", "max_lr": 10.0}
    config = {
        "train_batch_size": 16,
        "optimizer": {"type": "AdamW"},
        "scheduler": {"type": "AutoWU", "params": params},
        "engine": {"backend": backend},
    }
    trainer, *_ = engine.initialize(config=config, model=net)
    micro = trainer.train_micro_batch_size_per_gpu()
    begin = trainer.global_rank * micro
    for update in range(150):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(update))
        x = x[begin : begin + micro]
        if trainer.global_rank == 0:
            print("lr", repr(trainer.get_lr()[0]))  # noqa: T201  # what it is for
        trainer.backward((trainer(x) - x.sin().sum(1, keepdim=True)).pow(2).mean())
        trainer.step()
    assert trainer.lr_scheduler.decision is not None
    destroy_distributed()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
