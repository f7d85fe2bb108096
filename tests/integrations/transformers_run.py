"""Train with transformers on DeepSpeed, with a schedule of this package in the config."""

import json
import sys
import warnings

warnings.simplefilter("ignore")

import deepspeed  # noqa: E402
import torch  # noqa: E402
from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: E402

import engine  # noqa: E402

CONFIG = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "weight_decay": "auto", "torch_adam": True},
    },
    "scheduler": {
        "type": "CosineAnnealingWithWarmupScheduler",
        "params": {"t_warmup": 2, "t_max": 6},
    },
    "zero_optimization": {"stage": 2},
}


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def forward(self, x, labels):
        y = self.layer(x)
        return {"loss": ((y - labels) ** 2).mean(), "logits": y}


class RecordLearningRates(TrainerCallback):
    def __init__(self):
        self.lrs = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.lrs.append(kwargs["optimizer"].param_groups[0]["lr"])


def main(directory):
    assert engine.validate(CONFIG) == []
    # Do not compile DeepSpeed's all-reduce for CPUs, which takes minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine.register_with_deepspeed()
    recorder = RecordLearningRates()
    arguments = TrainingArguments(
        output_dir=directory,
        deepspeed=CONFIG,
        per_device_train_batch_size=4,
        max_steps=5,
        learning_rate=0.5,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    data = [{"x": torch.ones(2), "labels": torch.ones(1)} for _ in range(24)]
    Trainer(model=Model(), args=arguments, train_dataset=data, callbacks=[recorder]).train()
    print(json.dumps(recorder.lrs))


if __name__ == "__main__":
    main(sys.argv[1])
