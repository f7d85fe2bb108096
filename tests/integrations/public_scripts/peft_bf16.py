"""PEFT on a bf16 base model: float32 adapters, a checkpoint without the frozen weights."""

import argparse

import deepspeed
import torch
from torch import nn


class Adapter(nn.Module):
    """LoRA as PEFT builds it: the base layer stays in bf16, the adapter weights are float32."""

    def __init__(self, base_layer, r=2):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, r, bias=False)
        self.lora_B = nn.Linear(r, base_layer.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        result = self.base_layer(x)
        return result + self.lora_B(self.lora_A(x.to(self.lora_A.weight.dtype))).to(result.dtype)


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.q_proj, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9)

    def forward(self, ids):
        return self.head(torch.relu(self.q_proj(self.embed(ids))))


def build():
    torch.manual_seed(42)
    model = Base().to(torch.bfloat16).requires_grad_(False)
    model.q_proj = Adapter(model.q_proj)
    return model


def start(args):
    model = build()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": args.stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.02, "torch_adam": True}},
    }
    trainable = filter(lambda p: p.requires_grad, model.parameters())
    engine, *_ = deepspeed.initialize(
        args=args, model=model, model_parameters=trainable, config=config
    )
    return engine


def train(engine, steps):
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step + 20 * engine.global_rank)
        ids = torch.randint(9, (4, 5), generator=generator).to(engine.device)
        logits = engine(ids).float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ((ids + 2) % 9).flatten())
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def main(argv):
    parser = argparse.ArgumentParser()
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--local_rank", type=int, default=-1)
    parser = deepspeed.add_config_arguments(parser)
    args = parser.parse_args(argv)
    deepspeed.init_distributed()
    engine = start(args)
    numbers = train(engine, range(3))
    engine.save_checkpoint("adapter", client_state={"step": 3}, exclude_frozen_parameters=True)
    engine = start(args)
    path, client_state = engine.load_checkpoint("adapter", load_module_strict=False)
    assert path is not None
    numbers += [client_state["step"], *train(engine, range(3, 6))]
    return {"model": engine.module, "numbers": numbers, "tolerance": 0.02}
