"""A variational autoencoder: losses from a submodule's methods, an optimizer from a factory."""

import argparse

import deepspeed
import torch
from torch import nn
from torch.nn import functional


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc21, self.fc22 = nn.Linear(10, 6), nn.Linear(6, 2), nn.Linear(6, 2)
        self.fc3, self.fc4 = nn.Linear(2, 6), nn.Linear(6, 10)

    def encode(self, x):
        h1 = functional.relu(self.fc1(x))
        return self.fc21(h1), self.fc22(h1)

    def decode(self, z):
        return torch.sigmoid(self.fc4(functional.relu(self.fc3(z))))

    def forward(self, x):
        mu, logvar = self.encode(x)
        noise = torch.linspace(-1, 1, mu.numel(), device=x.device).view_as(mu)
        return self.decode(mu + noise * torch.exp(0.5 * logvar)), mu, logvar


def loss_function(recon_x, x, mu, logvar):
    entropy = functional.binary_cross_entropy(recon_x, x, reduction="sum")
    return entropy - 0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())


def main(argv):
    parser = argparse.ArgumentParser(description="VAE")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--local_rank", type=int, default=-1)
    parser = deepspeed.add_config_arguments(parser)
    args = parser.parse_args(argv)
    deepspeed.init_distributed()
    torch.manual_seed(args.seed)
    engine, optimizer, _, _ = deepspeed.initialize(
        args=args,
        model=VAE(),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
        config_params={"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1},
    )
    numbers = []
    for step in range(4):
        generator = torch.Generator().manual_seed(step + 10 * engine.global_rank)
        data = torch.rand(4, 10, generator=generator).to(engine.device)
        optimizer.zero_grad()
        recon_batch, mu, logvar = engine(data)
        loss = loss_function(recon_batch, data, mu, logvar)
        engine.backward(loss)
        engine.step()
        numbers.append(loss.item())
    engine.eval()
    with torch.no_grad():
        sample = engine.module.decode(torch.ones(2, 2, device=engine.device))
        numbers.append(sample.sum().item())
    return {"model": engine.module, "numbers": numbers}
