"""Compare the CPU time of a training step in onecycle, raw PyTorch and DeepSpeed on two ranks.

    torchrun --standalone --nproc_per_node 2 benchmarks/training_speed_ranks.py

The contenders run single-threaded and take turns. For each contender, the script prints the median
CPU time per training step on rank 0, and the median ratio of this time to that of "one flat
all-reduce", a raw PyTorch loop that uses fused AdamW and a single all-reduce of all gradients.
"""

from __future__ import annotations

import logging
import os
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed as dist
import training_speed as alone
from torch import nn

import engine
from engine.distributed.ranks import destroy_distributed

ROUNDS = 9


def limit(task: Callable[[], tuple]) -> alone.Step:
    model, x, y = task()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    parameters = list(model.parameters())

    def step() -> None:
        alone.loss_fn(model(x), y).backward()
        flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        begin = 0
        for parameter in parameters:
            end = begin + parameter.numel()
            parameter.grad.copy_(flat[begin:end].view_as(parameter))
            begin = end
        nn.utils.clip_grad_norm_(parameters, alone.CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def ddp(task: Callable[[], tuple]) -> alone.Step:
    model, x, y = task()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    parameters = list(model.parameters())
    replica = nn.parallel.DistributedDataParallel(model)

    def step() -> None:
        alone.loss_fn(replica(x), y).backward()
        nn.utils.clip_grad_norm_(parameters, alone.CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(task: Callable[[], tuple]) -> alone.Step:
    model, x, y = task()
    config = alone.config(len(x) * dist.get_world_size())
    trainer, *_ = engine.initialize(config=config, model=model)
    return alone.loop(trainer, x, y)


def deepspeed(task: Callable[[], tuple]) -> alone.Step:
    import deepspeed as peer

    peer.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # otherwise it is compiled first
    model, x, y = task()
    settings = alone.config(len(x) * dist.get_world_size())
    del settings["engine"]
    settings["optimizer"]["params"]["torch_adam"] = True
    trainer, *_ = peer.initialize(model=model, model_parameters=model.parameters(), config=settings)
    return alone.loop(trainer, x, y)


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    for name, task, steps in (("MLP", alone.mlp, 100), ("GPT, 10M", alone.gpt, 2)):
        running = {
            "one flat all-reduce": limit(task),
            "DDP, fused AdamW": ddp(task),
            "onecycle": ours(task),
            "DeepSpeed, stage 0": deepspeed(task),
        }
        times: dict[str, list[float]] = {each: [] for each in running}
        for _ in range(ROUNDS):
            for each, step in running.items():
                dist.barrier()
                times[each].append(alone.cpu_time(step, steps))
        for each, of_each in times.items():
            first = times["one flat all-reduce"]
            ratio = statistics.median(a / b for a, b in zip(of_each, first, strict=True))
            if dist.get_rank() == 0:
                print(f"{name:10}{each:22}{statistics.median(of_each):9.3f} ms  {ratio:.2f}x")
    destroy_distributed()


if __name__ == "__main__":
    main()
