"""The Trainer of transformers with a DeepSpeed config, resumed from its checkpoint.

The Trainer calls DeepSpeed itself; the schedule is onecycle's, which the config names.
"""

import argparse
import json
from pathlib import Path

import deepspeed
import torch
from accelerate.state import AcceleratorState
from torch import nn
from transformers import Trainer, TrainingArguments

CONFIG = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "optimizer": {
        "type": "AdamW",
        "params": {
            "lr": "auto",
            "betas": "auto",
            "eps": "auto",
            "weight_decay": "auto",
            "torch_adam": True,
        },
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
            "total_num_steps": "auto",
        },
    },
    "zero_optimization": {"stage": 2, "overlap_comm": True, "contiguous_gradients": True},
}


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x, labels=None):
        logits = self.head(torch.relu(self.body(x)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def train(args, data, max_steps, resume):
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(42)
    arguments = TrainingArguments(
        output_dir="trainer",
        deepspeed=args.deepspeed_config,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=0.05,
        warmup_steps=2,
        max_steps=max_steps,
        save_strategy="steps",
        save_steps=2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        seed=3,
        use_cpu=True,
    )
    trainer = Trainer(model=Classifier(), args=arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    history = [each["loss"] for each in trainer.state.log_history if "loss" in each]
    return trainer.model_wrapped.module, history


def main(argv):
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    parser = deepspeed.add_config_arguments(parser)
    path = Path("ds_config.json")
    path.write_text(json.dumps(CONFIG))
    args = parser.parse_args([*argv, "--deepspeed", "--deepspeed_config", str(path)])
    generator = torch.Generator().manual_seed(0)
    data = [
        {"x": torch.randn(4, generator=generator), "labels": torch.tensor(index % 3)}
        for index in range(48)
    ]
    train(args, data, 4, resume=None)
    model, history = train(args, data, 4, resume="trainer/checkpoint-2")
    AcceleratorState._reset_state(reset_partial_state=True)
    return {"model": model, "numbers": history}
