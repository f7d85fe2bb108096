"""A GAN: two engines, optimizers in the config and as arguments, a loss through both engines."""

import argparse
import json
from pathlib import Path

import deepspeed
import torch
from torch import nn, optim

CONFIG = {
    "train_batch_size": 8,
    "optimizer": {"type": "Adam", "params": {"lr": 0.00015}},
    "steps_per_print": 10,
    "wall_clock_breakdown": False,
}


def get_arguments(argv):
    parser = argparse.ArgumentParser()
    parser.add_argument("--batchSize", type=int, default=8)
    parser.add_argument("--nz", type=int, default=4)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--beta1", type=float, default=0.5)
    parser.add_argument("--local_rank", type=int, default=-1)
    parser = deepspeed.add_config_arguments(parser)
    path = Path("gan_deepspeed_config.json")
    path.write_text(json.dumps(CONFIG))
    return parser.parse_args([*argv, "--deepspeed", "--deepspeed_config", str(path)])


def main(argv):
    args = get_arguments(argv)
    deepspeed.init_distributed()
    torch.manual_seed(42)
    net_g = nn.Sequential(nn.Linear(args.nz, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh())
    net_d = nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1), nn.Sigmoid())
    optimizer_d = optim.Adam(net_d.parameters(), lr=args.lr, betas=(args.beta1, 0.999))
    optimizer_g = optim.Adam(net_g.parameters(), lr=args.lr, betas=(args.beta1, 0.999))
    engine_d, optimizer_d, _, _ = deepspeed.initialize(
        args=args, model=net_d, model_parameters=net_d.parameters(), optimizer=optimizer_d
    )
    engine_g, optimizer_g, _, _ = deepspeed.initialize(
        args=args, model=net_g, model_parameters=net_g.parameters(), optimizer=optimizer_g
    )
    criterion = nn.BCELoss()
    device = engine_d.device
    size = args.batchSize // torch.distributed.get_world_size()
    losses = []
    for step in range(3):
        torch.manual_seed(100 * step + torch.distributed.get_rank())
        real, noise = torch.randn(size, 6, device=device), torch.randn(size, args.nz, device=device)
        # Update the discriminator: one pass with real samples, one with fake ones.
        fake = engine_g(noise)
        loss_real = criterion(engine_d(real).flatten(), torch.full((size,), 1.0, device=device))
        engine_d.backward(loss_real)
        loss_fake = criterion(engine_d(fake.detach()).flatten(), torch.zeros(size, device=device))
        engine_d.backward(loss_fake)
        engine_d.step()
        # Update the generator.
        loss_g = criterion(engine_d(fake).flatten(), torch.full((size,), 1.0, device=device))
        engine_g.backward(loss_g)
        engine_g.step()
        loss_d = loss_real + loss_fake
        losses += [loss_d.item(), loss_g.item()]
    lr = [group["lr"] for group in optimizer_d.param_groups]
    return {"model": nn.ModuleList([net_g, net_d]), "numbers": [*losses, *lr]}
