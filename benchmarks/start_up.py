"""Cost of starting: what comes on top of PyTorch's optimizer, and the memory of a training process.

    python benchmarks/start_up.py

Each contender is a process of its own: CPU time of its constructor after torch is imported, and of
the import of what it needs; peak memory after four updates of a GPT of 10 million parameters.
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
begin = time.process_time()
"""
TAIL = """
print(time.process_time() - begin, end=" ")
import training_speed as speed
step = {step}
for _ in range(4):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
START = """
import engine
engine.initialize(
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
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    memory = dict.fromkeys(CONTENDERS, 0.0)
    here = str(Path(__file__).parent)
    for _ in track(range(args.rounds), "processes", console=console, transient=True):
        for name, (start, step) in CONTENDERS.items():
            code = HEAD + start + TAIL.format(step=step)
            run = subprocess.run(  # ours
                [sys.executable, "-c", code, here], capture_output=True, text=True, check=True
            )
            seconds, mebibytes = map(float, run.stdout.split()[-2:])
            times[name].append(seconds * 1e3)
            memory[name] = max(memory[name], mebibytes)
    table = Table("process", "CPU ms to start", "over AdamW", "peak MiB", "times AdamW's")
    bare, memory_bare = times["torch.optim.AdamW"], memory["torch.optim.AdamW"]
    for name, each in times.items():
        over = statistics.median(a - b for a, b in zip(each, bare, strict=True))
        cells = (f"{statistics.median(each):.0f}", f"{over:+.0f}", f"{memory[name]:.0f}")
        table.add_row(name, *cells, f"{memory[name] / memory_bare:.2f}x")
    console.print(table)


if __name__ == "__main__":
    main()
