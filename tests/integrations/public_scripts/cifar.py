"""An image classifier: arguments of DeepSpeed, the loader of `initialize`, an evaluation."""

import argparse

import deepspeed
import torch
from torch import nn
from torch.nn import functional


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.pool = nn.Conv2d(3, 4, 3), nn.MaxPool2d(2)
        self.conv2, self.fc = nn.Conv2d(4, 6, 3), nn.Linear(24, 10)

    def forward(self, x):
        x = self.pool(functional.relu(self.conv1(x)))
        x = functional.relu(self.conv2(x))
        return self.fc(functional.adaptive_avg_pool2d(x, 2).flatten(1))


class Images(torch.utils.data.Dataset):
    """Equal images, because the order of the samples differs between libraries."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return torch.linspace(-1, 1, 3 * 10 * 10).view(3, 10, 10), 3


def get_ds_config(args):
    return {
        "train_batch_size": 16,
        "steps_per_print": 2000,
        "optimizer": {
            "type": "Adam",
            "params": {
                "lr": 0.001,
                "betas": [0.8, 0.999],
                "eps": 1e-8,
                "weight_decay": 3e-7,
                "torch_adam": True,  # compiles nothing
            },
        },
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.001, "warmup_num_steps": 3},
        },
        "gradient_clipping": 1.0,
        "prescale_gradients": False,
        "bf16": {"enabled": args.dtype == "bf16"},
        "wall_clock_breakdown": False,
        "zero_optimization": {
            "stage": args.stage,
            "allgather_partitions": True,
            "reduce_scatter": True,
            "allgather_bucket_size": 50000000,
            "reduce_bucket_size": 50000000,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "cpu_offload": False,
        },
    }


def add_argument(argv):
    parser = argparse.ArgumentParser(description="CIFAR")
    parser.add_argument("-e", "--epochs", default=2, type=int)
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--log-interval", type=int, default=2)
    parser.add_argument("--dtype", default="fp32", choices=["bf16", "fp16", "fp32"])
    parser.add_argument("--stage", default=0, type=int, choices=[0, 1, 2, 3])
    parser = deepspeed.add_config_arguments(parser)
    return parser.parse_args(argv)


def test(model_engine, testset, local_device, target_dtype):
    correct = total = 0
    loader = torch.utils.data.DataLoader(testset, batch_size=8, shuffle=False)
    model_engine.eval()
    with torch.no_grad():
        for images, labels in loader:
            outputs = model_engine(images.to(local_device, target_dtype))
            _, predicted = torch.max(outputs.data, 1)
            total += labels.size(0)
            correct += (predicted == labels.to(local_device)).sum().item()
    return correct / total


def main(argv):
    args = add_argument(argv)
    deepspeed.init_distributed()
    torch.manual_seed(42)
    net = Net()
    parameters = filter(lambda p: p.requires_grad, net.parameters())
    model_engine, _optimizer, trainloader, _scheduler = deepspeed.initialize(
        args=args,
        model=net,
        model_parameters=parameters,
        training_data=Images(),
        config=get_ds_config(args),
    )
    local_device = model_engine.device
    target_dtype = torch.bfloat16 if model_engine.bfloat16_enabled() else torch.float32
    criterion = nn.CrossEntropyLoss()
    running, history = 0.0, []
    for _ in range(args.epochs):
        for i, data in enumerate(trainloader):
            inputs, labels = data[0].to(local_device), data[1].to(local_device)
            loss = criterion(model_engine(inputs.to(target_dtype)), labels)
            model_engine.backward(loss)
            model_engine.step()
            running += loss.item()
            if i % args.log_interval == args.log_interval - 1:
                history.append(running / args.log_interval)
                running = 0.0
    accuracy = test(model_engine, Images(), local_device, target_dtype)
    return {
        "model": net,
        "numbers": [*history, accuracy, *model_engine.get_lr(), model_engine.local_rank],
    }
