"""Measure the startup time and peak memory of a training process.

    python benchmarks/start_up.py

Each contender, such as plain PyTorch or onecycle, runs in its own process. Before the timer
starts, the process builds a PyTorch optimizer, which imports the parts of torch that every
contender needs. The table shows the CPU time of importing the contender and of initializing
training with it, and the peak memory after four training steps of a GPT with 10 million parameters.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

HEAD = """
import logging, resource, sys, time, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
logging.disable(logging.WARNING)
torch.optim.AdamW(torch.nn.Linear(8, 8).parameters())
start_time = imported = time.process_time()
"""
TAIL = """
print(imported - start_time, time.process_time() - imported, end=" ")
import training_speed as speed
step = {step}
for _ in range(4):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
START = """
from engine import initialize
imported = time.process_time()
initialize(
    config={{
        "train_batch_size": 2,
        "optimizer": {{"type": "AdamW"}},
        "engine": {{"backend": "{0}"}},
    }},
    model=torch.nn.Linear(8, 8),
)
"""
DEEPSPEED = """
import os
os.environ["LOCAL_RANK"] = "0"
import torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
import deepspeed
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
imported = time.process_time()
model = torch.nn.Linear(8, 8)
deepspeed.initialize(model=model, model_parameters=model.parameters(), config={{
    "train_batch_size": 2, "zero_optimization": {{"stage": {0}}},
    "optimizer": {{"type": "AdamW", "params": {{"torch_adam": True}}}}}})
"""
CONTENDERS = {
    "torch.optim.AdamW": (
        "torch.optim.AdamW(torch.nn.Linear(8, 8).parameters())",
        "speed.raw(speed.gpt, fused=True)",
    ),
    "onecycle": (START.format("torch"), "speed.ours(speed.gpt)"),
    "DeepSpeed, stage 0": (DEEPSPEED.format(0), "speed.deepspeed(speed.gpt, 0)"),
    "DeepSpeed, stage 2": (DEEPSPEED.format(2), "speed.deepspeed(speed.gpt, 2)"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    console = Console()
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTENDERS}
    memory = dict.fromkeys(CONTENDERS, 0.0)
    here = str(Path(__file__).parent)
    for _ in track(range(args.rounds), "processes", console=console, transient=True):
        for name, (start, step) in CONTENDERS.items():
            code = HEAD + start + TAIL.format(step=step)
            run = subprocess.run(  # ours
                [sys.executable, "-c", code, here], capture_output=True, text=True, check=True
            )
            imports, call, mebibytes = map(float, run.stdout.split()[-3:])
            seconds[name].append((imports * 1e3, call * 1e3))
            memory[name] = max(memory[name], mebibytes)
    table = Table("CPU ms (torch already imported)", "import", "call", "peak MiB", "times")
    bare = memory["torch.optim.AdamW"]
    for name, each in seconds.items():
        imports, call = (statistics.median(part) for part in zip(*each, strict=True))
        cells = (f"{imports:.0f}", f"{call:.0f}", f"{memory[name]:.0f}")
        table.add_row(name, *cells, f"{memory[name] / bare:.2f}x")
    console.print(table)


if __name__ == "__main__":
    main()
