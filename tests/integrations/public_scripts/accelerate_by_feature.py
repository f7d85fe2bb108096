"""Accelerate's example for DeepSpeed configs: dummy optimizer and scheduler, checkpoints by epoch.

Accelerate calls DeepSpeed itself; the schedule is onecycle's, which the config names.
"""

import os

import deepspeed
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, DummyOptim, DummyScheduler
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

CONFIG = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": 2,
    "gradient_clipping": "auto",
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True},
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
    "zero_optimization": {"stage": 2, "allgather_bucket_size": 2e8, "overlap_comm": True},
    "steps_per_print": float("inf"),
    "zero_allow_untested_optimizer": True,
}


def checkpoint_model(checkpoint_folder, ckpt_id, model, epoch, last_global_step):
    state = {"epoch": epoch, "last_global_step": last_global_step}
    return model.save_checkpoint(checkpoint_folder, ckpt_id, state)


def load_training_checkpoint(model, load_dir, tag=None):
    _, state = model.load_checkpoint(load_dir, tag=tag)
    return state["epoch"], state["last_global_step"]


def main(argv):
    del argv
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    AcceleratorState._reset_state(reset_partial_state=True)
    assert deepspeed.init_distributed
    plugin = DeepSpeedPlugin(hf_ds_config=CONFIG, gradient_clipping=1.0)
    accelerator = Accelerator(deepspeed_plugin=plugin)
    torch.manual_seed(42)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    data = TensorDataset(torch.randn(32, 4), torch.randn(32, 2))
    loader = DataLoader(data, batch_size=2)
    optimizer = DummyOptim(model.parameters(), lr=1e-2, weight_decay=0.1)
    scheduler = DummyScheduler(optimizer, total_num_steps=16, warmup_num_steps=2)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    numbers, completed = [], 0
    for epoch in range(2):
        model.train()
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.mse_loss(model(x), y)
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                completed += 1
                numbers += [loss.item(), optimizer.param_groups[0]["lr"]]
        checkpoint_model("ckpt", epoch, model, epoch, completed)
    numbers += load_training_checkpoint(model, "ckpt", tag="1")
    numbers.append(len(accelerator.get_state_dict(model)))
    unwrapped = accelerator.unwrap_model(model)
    AcceleratorState._reset_state(reset_partial_state=True)
    del os.environ["ACCELERATE_USE_DEEPSPEED"]
    return {"model": unwrapped, "numbers": numbers}
