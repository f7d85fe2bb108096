"""A language model on long sequences: zero.Init, activation checkpointing, gathered weights."""

import argparse

import deepspeed
import torch
from torch import nn
from torch.nn import functional

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.5,
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 1e-2, "betas": [0.9, 0.95], "weight_decay": 0.1, "torch_adam": True},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_min_lr": 0,
            "warmup_max_lr": 1e-2,
            "warmup_num_steps": 2,
            "total_num_steps": 6,
            "warmup_type": "linear",
        },
    },
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
        "sub_group_size": 100000000,
    },
    "activation_checkpointing": {
        "partition_activations": False,
        "contiguous_memory_optimization": False,
        "cpu_checkpointing": False,
    },
    "steps_per_print": 50,
}


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return x + self.proj(functional.scaled_dot_product_attention(q, k, v, is_causal=True))


class LongLM(nn.Module):
    def __init__(self, vocabulary=16, width=8):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = deepspeed.checkpointing.checkpoint(block, x)
        return self.head(x)


def main(argv):
    parser = argparse.ArgumentParser()
    parser.add_argument("--seq_length", type=int, default=64)
    parser.add_argument("--local_rank", type=int, default=-1)
    parser = deepspeed.add_config_arguments(parser)
    args = parser.parse_args(argv)
    deepspeed.init_distributed(dist_backend="gloo")
    torch.manual_seed(42)
    with deepspeed.zero.Init(config_dict_or_path=CONFIG):
        model = LongLM()
    deepspeed.checkpointing.configure(mpu_=None, deepspeed_config=None, num_checkpoints=2)
    engine, _, _, scheduler = deepspeed.initialize(
        args=args, model=model, model_parameters=model.parameters(), config=CONFIG
    )
    numbers = []
    for step in range(8):
        generator = torch.Generator().manual_seed(step + 50 * engine.global_rank)
        ids = torch.randint(16, (1, args.seq_length + 1), generator=generator).to(engine.device)
        logits = engine(ids[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        engine.backward(loss)
        engine.step()
        numbers += [loss.item(), scheduler.get_last_lr()[0], engine.global_steps]
    engine.save_checkpoint("long", tag=f"step{engine.global_steps}")
    engine.save_16bit_model("exported", "model.bin")
    return {"model": engine.module, "numbers": numbers}
