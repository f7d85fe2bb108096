"""Train with accelerate on DeepSpeed, with a schedule of this package in the config."""

import json
import os
import warnings

warnings.simplefilter("ignore")
os.environ.update(ACCELERATE_USE_DEEPSPEED="true")

import deepspeed  # noqa: E402
import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from accelerate.utils import DeepSpeedPlugin, DummyOptim, DummyScheduler  # noqa: E402

import engine  # noqa: E402

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 1,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.5, "torch_adam": True}},
    "scheduler": {
        "type": "CosineAnnealingWithWarmupScheduler",
        "params": {"t_warmup": 2, "t_max": 6},
    },
    "zero_optimization": {"stage": 2},
}


def main():
    # Do not compile DeepSpeed's all-reduce for CPUs, which takes minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine.register_with_deepspeed()
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=CONFIG))
    model = torch.nn.Linear(2, 1)
    optimizer = DummyOptim(model.parameters())
    data = torch.utils.data.TensorDataset(torch.ones(10, 2))
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    model, optimizer, loader, scheduler = accelerator.prepare(
        model, optimizer, loader, DummyScheduler(optimizer)
    )
    lrs = []
    for (x,) in loader:
        lrs.append(model.optimizer.param_groups[0]["lr"])
        accelerator.backward(model(x).mean())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    print(json.dumps(lrs))


if __name__ == "__main__":
    main()
