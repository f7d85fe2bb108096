"""A pipeline: layers split into stages, and whole batches."""

import argparse

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import nn


class Images(torch.utils.data.Dataset):
    """Equal samples, because the order of the samples differs between libraries."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return torch.linspace(-1, 1, 6), 2


def get_args(argv):
    parser = argparse.ArgumentParser(description="CIFAR")
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("-s", "--steps", type=int, default=4)
    parser.add_argument("-p", "--pipeline-parallel-size", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1138)
    parser = deepspeed.add_config_arguments(parser)
    return parser.parse_args(argv)


def main(argv):
    args = get_args(argv)
    deepspeed.init_distributed()
    args.pipeline_parallel_size = min(2, torch.distributed.get_world_size())
    torch.manual_seed(args.seed)
    net = PipelineModule(
        layers=[
            LayerSpec(nn.Linear, 6, 8),
            nn.ReLU(),
            LayerSpec(nn.Linear, 8, 8),
            nn.ReLU(),
            LayerSpec(nn.Linear, 8, 4),
        ],
        loss_fn=nn.CrossEntropyLoss(),
        num_stages=args.pipeline_parallel_size,
        partition_method="parameters",
        activation_checkpoint_interval=0,
    )
    config = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 4,
        "steps_per_print": 10,
        "optimizer": {"type": "Adam", "params": {"lr": 0.01, "torch_adam": True}},
        "gradient_clipping": 1.0,
    }
    engine, _, _, _ = deepspeed.initialize(
        args=args,
        model=net,
        model_parameters=[p for p in net.parameters() if p.requires_grad],
        training_data=Images(),
        config=config,
    )
    numbers = []
    for _ in range(args.steps):
        loss = engine.train_batch()
        numbers += [float(loss), engine.global_steps, engine.is_gradient_accumulation_boundary()]
    numbers += [engine.gradient_accumulation_steps(), engine.train_batch_size()]
    return {"model": engine.module, "numbers": numbers, "is_split": True}
