"""A trainer class with callbacks around the engine, which reads the engine's settings."""

from collections import defaultdict

import deepspeed
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset


class SortDataset(Dataset):
    """Equal sequences, because the order of the samples differs between libraries."""

    def __len__(self):
        return 96

    def __getitem__(self, index):
        x = torch.tensor([2, 0, 1, 0, 0, 1])
        return x[:-1], x[1:]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.drop = nn.Embedding(3, 8), nn.Dropout(0.0)
        self.rnn, self.head = nn.GRU(8, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, idx, targets):
        logits = self.head(self.rnn(self.drop(self.embed(idx)))[0])
        return logits, functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Trainer:
    def __init__(self, config, model, train_dataset):
        self.callbacks = defaultdict(list)
        self.iter_num = 0
        self.engine, self.optimizer, self.loader, self.scheduler = deepspeed.initialize(
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            training_data=train_dataset,
            config=config,
        )

    def add_callback(self, onevent, callback):
        self.callbacks[onevent].append(callback)

    def trigger_callbacks(self, onevent):
        for callback in self.callbacks[onevent]:
            callback(self)

    def run(self, max_iters):
        self.engine.train()
        data_iter = iter(self.loader)
        while self.iter_num < max_iters:
            try:
                batch = next(data_iter)
            except StopIteration:
                data_iter = iter(self.loader)
                batch = next(data_iter)
            x, y = (t.to(self.engine.device) for t in batch)
            _, self.loss = self.engine(x, y)
            self.engine.backward(self.loss)
            self.engine.step()
            self.trigger_callbacks("on_batch_end")
            self.iter_num += 1


def main(argv):
    del argv
    deepspeed.init_distributed()
    torch.manual_seed(3407)
    config = {
        "train_batch_size": 8,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 5e-3, "torch_adam": True}},
        "scheduler": {
            "type": "OneCycle",
            "params": {
                "cycle_min_lr": 1e-3,
                "cycle_max_lr": 1e-2,
                "cycle_first_step_size": 4,
                "cycle_min_mom": 0.85,
                "cycle_max_mom": 0.95,
            },
        },
        "zero_optimization": {"stage": 2},
    }
    trainer = Trainer(config, Model(), SortDataset())
    numbers = []

    def batch_end_callback(trainer):
        engine = trainer.engine
        numbers.extend([trainer.loss.item(), engine.get_lr()[0], engine.global_steps])
        numbers.extend([engine.train_batch_size(), trainer.scheduler.get_last_lr()[0]])
        numbers.append(float(engine.get_global_grad_norm()))

    trainer.add_callback("on_batch_end", batch_end_callback)
    trainer.run(max_iters=14)
    return {"model": trainer.engine.module, "numbers": numbers, "tolerance": 1e-4}
