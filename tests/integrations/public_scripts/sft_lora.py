"""Supervised fine-tuning with LoRA in the way of DeepSpeed-Chat."""

import argparse
import math

import deepspeed
import torch
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR


class LinearLora(nn.Module):
    def __init__(self, base, lora_dim):
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.lora_right_weight = nn.Parameter(torch.zeros(base.in_features, lora_dim))
        self.lora_left_weight = nn.Parameter(torch.randn(lora_dim, base.out_features) * 0.1)
        nn.init.kaiming_uniform_(self.lora_right_weight, a=math.sqrt(5))

    def forward(self, x):
        change = x @ self.lora_right_weight @ self.lora_left_weight
        return functional.linear(x, self.weight, self.bias) + change


class Decoder(nn.Module):
    def __init__(self, vocabulary=12, width=8):
        super().__init__()
        self.embed, self.norm = nn.Embedding(vocabulary, width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 16), nn.Linear(16, width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, input_ids, labels):
        x = self.embed(input_ids)
        logits = self.lm_head(x + self.down(torch.relu(self.up(self.norm(x)))))
        loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return loss, logits


def get_train_ds_config(stage, bf16):
    return {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 8 // torch.distributed.get_world_size() // 2,
        "steps_per_print": 10,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": True,
            "offload_param": {"device": "none"},
            "offload_optimizer": {"device": "none"},
            "stage3_param_persistence_threshold": 1e4,
            "stage3_max_live_parameters": 3e7,
            "stage3_prefetch_bucket_size": 3e7,
            "memory_efficient_linear": False,
        },
        "bfloat16": {"enabled": bf16},
        "gradient_clipping": 1.0,
        "prescale_gradients": False,
        "wall_clock_breakdown": False,
        "hybrid_engine": {"enabled": False, "max_out_tokens": 512, "inference_tp_size": 1},
    }


def get_optimizer_grouped_parameters(model, weight_decay, lora_lr):
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    lora = [p for n, p in named if "lora_" in n]
    rest = [p for n, p in named if "lora_" not in n and "bias" not in n]
    bias = [p for n, p in named if "lora_" not in n and "bias" in n]
    groups = [
        {"params": rest, "weight_decay": weight_decay},
        {"params": lora, "weight_decay": weight_decay, "lr": lora_lr},
        {"params": bias, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def main(argv):
    parser = argparse.ArgumentParser()
    parser.add_argument("--learning_rate", type=float, default=0.01)
    parser.add_argument("--weight_decay", type=float, default=0.1)
    parser.add_argument("--zero_stage", type=int, default=2)
    parser.add_argument("--only_optimize_lora", action="store_true")
    parser.add_argument("--output_dir", default="output")
    parser.add_argument("--local_rank", type=int, default=-1)
    parser = deepspeed.add_config_arguments(parser)
    args = parser.parse_args([*argv, "--only_optimize_lora"])
    deepspeed.init_distributed()
    torch.manual_seed(42)
    model = Decoder()
    model.up, model.down = LinearLora(model.up, 2), LinearLora(model.down, 2)
    if args.only_optimize_lora:
        for name, parameter in model.named_parameters():
            parameter.requires_grad = "lora_" in name
    groups = get_optimizer_grouped_parameters(model, args.weight_decay, 0.02)
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95))
    lr_scheduler = LambdaLR(optimizer, lambda step: min(1, (step + 1) / 3))
    model, optimizer, _, lr_scheduler = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        args=args,
        config=get_train_ds_config(args.zero_stage, bf16=True),
        lr_scheduler=lr_scheduler,
        dist_init_required=True,
    )
    numbers = []
    micro = model.train_micro_batch_size_per_gpu()
    for step in range(6):
        generator = torch.Generator().manual_seed(10 * step + model.global_rank)
        batch = torch.randint(12, (micro, 5), generator=generator).to(model.device)
        loss, _ = model(batch, labels=(batch + 1) % 12)
        model.backward(loss)
        model.step()
        if model.is_gradient_accumulation_boundary():
            numbers.append(lr_scheduler.get_last_lr()[0])
        numbers.append(loss.item())
    with deepspeed.zero.GatheredParameters(list(model.module.parameters())):
        saved = {k: v.cpu() for k, v in model.module.state_dict().items() if "lora" in k}
    numbers.append(len(saved))
    return {"model": model.module, "numbers": numbers, "tolerance": 0.02}
