"""ImageNet: SGD as an argument, batch norm, a StepLR that the script steps, a best checkpoint."""

import argparse

import deepspeed
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(x + self.block(x))
        return self.fc(x.mean((2, 3)))


class AverageMeter:
    def __init__(self):
        self.sum, self.count = 0.0, 0

    def update(self, value, n):
        self.sum, self.count = self.sum + value * n, self.count + n

    def all_reduce(self, device):
        total = torch.tensor([self.sum, self.count], dtype=torch.float32, device=device)
        torch.distributed.all_reduce(total, torch.distributed.ReduceOp.SUM)
        return (total[0] / total[1]).item()


def main(argv):
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", default=2, type=int)
    parser.add_argument("-b", "--batch-size", default=8, type=int)
    parser.add_argument("--lr", "--learning-rate", default=0.1, type=float)
    parser.add_argument("--momentum", default=0.9, type=float)
    parser.add_argument("--wd", "--weight-decay", default=1e-4, type=float, dest="weight_decay")
    parser.add_argument("--local_rank", type=int, default=-1)
    parser = deepspeed.add_config_arguments(parser)
    args = parser.parse_args(argv)
    deepspeed.init_distributed()
    torch.manual_seed(42)
    model = ResNet()
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay
    )
    scheduler = StepLR(optimizer, step_size=1, gamma=0.1)
    config = {
        "train_batch_size": args.batch_size,
        "optimizer": {"type": "SGD", "params": {"lr": 0.05}},
        "zero_optimization": {"stage": 0},
    }
    engine, _, _, _ = deepspeed.initialize(
        args=args,
        model=model,
        model_parameters=model.parameters(),
        optimizer=optimizer,
        config=config,
    )
    device = engine.device
    dataset = TensorDataset(torch.randn(24, 3, 6, 6), torch.randint(5, (24,)))
    sampler = DistributedSampler(dataset)
    local = args.batch_size // torch.distributed.get_world_size()
    loader = DataLoader(dataset, batch_size=local, sampler=sampler)
    best, numbers = 0.0, []
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        losses = AverageMeter()
        engine.train()
        for images, target in loader:
            output = engine(images.to(device))
            loss = criterion(output, target.to(device))
            losses.update(loss.item(), images.size(0))
            engine.backward(loss)
            engine.step()
        scheduler.step()
        accuracy = -losses.all_reduce(device)
        is_best, best = accuracy > best, max(accuracy, best)
        engine.save_checkpoint("checkpoints", epoch, client_state={"best": best, "epoch": epoch})
        numbers += [losses.all_reduce(device), engine.optimizer.param_groups[0]["lr"], is_best]
    _, client_state = engine.load_checkpoint("checkpoints", 1)
    return {"model": model, "numbers": [*numbers, client_state["epoch"], engine.global_steps]}
