"""Fine-tuning in the way of BEiT: a config file that the script writes, layer-wise learning rates
that the script sets in each step, and resuming by tag."""

import argparse
import json
from pathlib import Path

import deepspeed
import torch
from torch import nn


class VisionTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.patch_embed(x)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)


def create_ds_config(args):
    args.deepspeed_config = str(Path(args.output_dir, "deepspeed_config.json"))
    config = {
        "train_batch_size": args.batch_size * args.update_freq * torch.distributed.get_world_size(),
        "train_micro_batch_size_per_gpu": args.batch_size,
        "steps_per_print": 1000,
        "optimizer": {
            "type": "Adam",
            "params": {
                "lr": args.lr,
                "weight_decay": args.weight_decay,
                "torch_adam": True,  # compiles nothing
                "betas": [0.9, 0.999],
                "eps": 1e-8,
            },
        },
        "bf16": {"enabled": False},
    }
    Path(args.deepspeed_config).write_text(json.dumps(config, indent=2))


def get_parameter_groups(model, weight_decay):
    groups = {}
    for name, parameter in model.named_parameters():
        layer = 0 if "patch_embed" in name else 1 + int("head" in name)
        decay = 0.0 if parameter.ndim == 1 else weight_decay
        group = groups.setdefault(
            (layer, decay), {"weight_decay": decay, "params": [], "lr_scale": 0.5 ** (2 - layer)}
        )
        group["params"].append(parameter)
    return list(groups.values())


def get_loss_scale_for_deepspeed(model):
    optimizer = model.optimizer
    return optimizer.loss_scale if hasattr(optimizer, "loss_scale") else 1.0


def build(args):
    torch.manual_seed(42)
    model = VisionTransformer()
    parameters = get_parameter_groups(model, args.weight_decay)
    model, optimizer, _, _ = deepspeed.initialize(
        args=args, model=model, model_parameters=parameters, dist_init_required=False
    )
    assert model.gradient_accumulation_steps() == args.update_freq
    return model, optimizer


def train_one_epoch(model, optimizer, args, epoch):
    model.train()
    model.zero_grad()
    model.micro_steps = 0
    losses = []
    for data_iter_step in range(2 * args.update_freq):
        step = data_iter_step // args.update_freq
        it = epoch * 2 + step
        if data_iter_step % args.update_freq == 0:
            for group in optimizer.param_groups:
                group["lr"] = args.lr / (it + 1) * group["lr_scale"]
        generator = torch.Generator().manual_seed(100 * it + data_iter_step + 7 * args.rank)
        samples = torch.randn(args.batch_size, 6, generator=generator).to(model.device)
        loss = nn.functional.cross_entropy(model(samples), samples[:, :4].argmax(1))
        model.backward(loss)
        model.step()
        losses.append(loss.item())
    return losses


def main(argv):
    parser = argparse.ArgumentParser("BEiT fine-tuning", add_help=False)
    parser.add_argument("--batch_size", default=4, type=int)
    parser.add_argument("--update_freq", default=2, type=int)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--warmup_steps", type=int, default=-1)
    parser.add_argument("--weight_decay", type=float, default=0.05)
    parser.add_argument("--output_dir", default="output")
    parser.add_argument("--local_rank", default=-1, type=int)
    parser.add_argument("--enable_deepspeed", action="store_true", default=True)
    parser = deepspeed.add_config_arguments(parser)
    args = parser.parse_args(argv)
    deepspeed.init_distributed()
    args.rank = torch.distributed.get_rank()
    Path(args.output_dir).mkdir(exist_ok=True)
    create_ds_config(args)
    torch.distributed.barrier()
    model, optimizer = build(args)
    numbers = train_one_epoch(model, optimizer, args, 0)
    numbers.append(get_loss_scale_for_deepspeed(model))
    model.save_checkpoint(
        save_dir=args.output_dir, tag="checkpoint-0", client_state={"epoch": 0, "args": args}
    )
    model, optimizer = build(args)
    _, client_states = model.load_checkpoint(args.output_dir, tag="checkpoint-0")
    epoch = client_states["epoch"] + 1
    numbers += train_one_epoch(model, optimizer, args, epoch)
    return {"model": model.module, "numbers": [*numbers, client_states["args"].batch_size]}
