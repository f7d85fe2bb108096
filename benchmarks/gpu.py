"""Compare the speed, memory and host syncs of onecycle, a raw loop and other libraries on a GPU.

    python benchmarks/gpu.py --out gpu.json        # 8 minutes at most
    python benchmarks/gpu.py --dry-run             # a much smaller benchmark on the CPU

The tasks are a GPT with 124M parameters in bf16, the same GPT compiled, and a small MLP. The steps
of the MLP are so short that they show the overhead of each library. Each contender runs in its own
process, and the processes take turns. All contenders use torch's fused AdamW and clip gradients at
norm 1. The raw loop is plain PyTorch with autocast. onecycle also follows a 1Cycle schedule.

The report is JSON. For each task and contender, it contains the median time per step in
milliseconds, the median ratio to the raw loop, tokens or samples per second, the peak GPU memory in
bytes, and how many times per step the host waits for the device. A library that is not installed is
listed under "skipped"; a contender that fails is listed under "errors".
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import logging
import multiprocessing
import os
import platform
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")  # in each of the processes

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

import engine
from engine.config.versions import get_installed_version

CLIP = 1.0
CYCLE = {"cycle_min_lr": 1e-4, "cycle_max_lr": 3e-4, "cycle_first_step_size": 10**6}
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
LIMIT = 420.0  # seconds after which no new round starts
HARD_LIMIT = 460.0  # seconds after which contenders that still run are killed
PATIENCE = 150.0  # seconds that a contender may take to build a task, or for one round
BUILD_MEMORY = 18 << 30  # bytes that a step of the GPT may need
RAW = "raw loop"
Step = Callable[[], None]


@dataclass(frozen=True)
class Task:
    """A model, its data and the number of steps to measure."""

    name: str
    is_dry: bool
    compiler: str | None = None

    @property
    def is_gpt(self) -> bool:
        return self.name.startswith("GPT")

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.is_dry else torch.device("cuda", 0)

    @property
    def rows(self) -> int:
        if not self.is_gpt:
            return 32
        return 2 if self.is_dry else 8

    @property
    def length(self) -> int:
        """Sequence length of the GPT, in tokens."""
        return 16 if self.is_dry else 1024

    @property
    def steps(self) -> int:
        if self.is_dry:
            return 2
        return 10 if self.is_gpt else 200

    @property
    def items(self) -> int:
        """Number of tokens (GPT) or samples (MLP) per step."""
        return self.rows * self.length if self.is_gpt else self.rows

    def build(self) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
        """Return a new model on the CPU, and a batch on the task's device."""
        torch.manual_seed(0)
        if self.is_gpt:
            size = (2, 32, 2, 64) if self.is_dry else (12, 768, 12, 50304)
            model: nn.Module = GPT(*size, length=self.length)
            tokens = torch.randint(size[-1], (self.rows, self.length + 1))
            batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        else:
            model = MLP()
            batch = torch.randn(self.rows, 64), torch.randint(10, (self.rows,))
        return model, (batch[0].to(self.device), batch[1].to(self.device))


class GPT(nn.Module):
    """GPT-2 as in nanoGPT, with tied embeddings and a forward pass that returns the loss."""

    def __init__(self, depth: int, width: int, heads: int, vocabulary: int, *, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(positions)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class Block(nn.Module):
    """A transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inner, self.outer = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, width = x.shape
        parts = self.query_key_value(self.norm1(x)).split(width, 2)
        heads = (part.view(rows, length, self.heads, -1).transpose(1, 2) for part in parts)
        attended = scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(rows, length, width))
        return x + self.outer(gelu(self.inner(self.norm2(x))))


class MLP(nn.Module):
    """A model so small that a step is mostly overhead. Its forward pass returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return cross_entropy(self.layers(x).float(), y)


def config(task: Task) -> dict[str, Any]:
    return {
        "train_batch_size": task.rows,
        "gradient_clipping": CLIP,
        "steps_per_print": None,
        **({"bf16": {"enabled": True}} if task.is_gpt else {}),
    }


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def placed(task: Task) -> tuple[nn.Module, torch.optim.Optimizer, tuple[torch.Tensor, ...]]:
    model, batch = task.build()
    model.to(task.device)
    if task.compiler:
        model.compile(backend=task.compiler)
    return model, adamw(model), batch


def onecycle(task: Task) -> Step:
    model, batch = task.build()
    own = {"backend": "torch", "device": task.device.type, "compile": task.compiler}
    optimizer = {"type": "AdamW", "params": {"lr": 1e-4}}
    scheduler = {"type": "OneCycle", "params": CYCLE}
    sections = {"optimizer": optimizer, "scheduler": scheduler, "engine": own}
    trainer, *_ = engine.initialize(config=config(task) | sections, model=model)

    def step() -> None:
        trainer.backward(trainer(*batch))
        trainer.step()

    return step


def raw(task: Task) -> Step:
    model, optimizer, batch = placed(task)

    def step() -> None:
        with torch.autocast(task.device.type, torch.bfloat16, enabled=task.is_gpt):
            loss = model(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def deepspeed(task: Task, stage: int) -> Step:
    if not dist.is_initialized():
        os.environ["LOCAL_RANK"] = "0"
        backend = "gloo" if task.is_dry else "nccl"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    import deepspeed as peer

    peer.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # the CPU would compile it
    model, optimizer, batch = placed(task)
    zero = {"zero_optimization": {"stage": stage}} if stage else {}
    settings = config(task) | zero
    del settings["steps_per_print"]
    trainer, *_ = peer.initialize(model=model, optimizer=optimizer, config=settings)

    def step() -> None:
        trainer.backward(trainer(*batch))
        trainer.step()

    return step


def accelerate(task: Task) -> Step:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # of the task before
    precision = "bf16" if task.is_gpt else "no"
    accelerator = Accelerator(cpu=task.is_dry, mixed_precision=precision)
    model, optimizer, batch = placed(task)
    model, optimizer = accelerator.prepare(model, optimizer)

    def step() -> None:
        accelerator.backward(model(*batch))
        accelerator.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def fabric(task: Task) -> Step:
    from lightning_fabric import Fabric

    precision = "bf16-mixed" if task.is_gpt else "32-true"
    runs = Fabric(accelerator=task.device.type, devices=1, precision=precision)
    model, optimizer, batch = placed(task)
    model, optimizer = runs.setup(model, optimizer)

    def step() -> None:
        runs.backward(model(*batch))
        runs.clip_gradients(model, optimizer, max_norm=CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


CONTENDERS: dict[str, tuple[str, Callable[[Task], Step]]] = {
    RAW: ("torch", raw),
    "onecycle": ("torch", onecycle),
    **{
        f"DeepSpeed, stage {stage}": ("deepspeed", partial(deepspeed, stage=stage))
        for stage in range(4)
    },
    "Accelerate": ("accelerate", accelerate),
    "Fabric": ("lightning_fabric", fabric),
}
"""Maps each contender to the package it needs and a function that builds its training step."""


def wait(task: Task) -> None:
    if not task.is_dry:
        torch.cuda.synchronize()


def measure(task: Task, step: Step) -> tuple[float, int | None]:
    """Return the milliseconds per step, and the peak memory in bytes (None on the CPU)."""
    step()  # allocates the memory that was released after the last round
    wait(task)
    if not task.is_dry:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(task.steps):
        step()
    wait(task)
    milliseconds = (time.perf_counter() - start) / task.steps * 1e3
    if task.is_dry:
        return milliseconds, None
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()  # for the other contenders
    return milliseconds, peak


def count_syncs(task: Task, step: Step, steps: int = 4) -> float:
    """Return how many times per step the host waits for the device.

    On the CPU, conversions of a tensor to a Python number, such as ``item()``, are counted instead.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if not task.is_dry:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    wait(task)
    with torch.profiler.profile(activities=activities) as profile:
        with torch.profiler.record_function("measured steps"):
            for _ in range(steps):
                step()
        wait(task)
    names = ("aten::_local_scalar_dense",) if task.is_dry else WAITS
    events = profile.events()
    span = next(each.time_range for each in events if each.name == "measured steps")
    counted = [
        each
        for each in events
        if each.name in names and span.start <= each.time_range.start <= span.end
    ]
    return len(counted) / steps


def serve(connection: Connection, make: Callable[[Task], Step]) -> None:
    """Build and run tasks in this process, as requested by messages on the connection."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.dup2(2, 1)  # libraries print, but only the report belongs on the standard output
    task, step = None, None
    while True:
        name, *arguments = connection.recv()
        try:
            if name == "end":
                break
            if name == "build":
                (task,) = arguments
                step = None
                gc.collect()
                step = make(task)
                for _ in range(3):
                    step()
                wait(task)
                if not task.is_dry:
                    torch.cuda.empty_cache()
                result: Any = None
            elif name == "measure":
                result = measure(task, step)
            else:
                result = count_syncs(task, step)
            connection.send((result, None))
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(last.filename).name}:{last.lineno}"
            connection.send((None, f"{type(error).__name__}: {error} ({place})"[:1000]))
    if dist.is_initialized():
        dist.destroy_process_group()


class Contender:
    """A library or the raw training loop, measured in a separate process."""

    def __init__(self, name: str, make: Callable[[Task], Step]) -> None:
        self.name = name
        self.error: str | None = None
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, make), daemon=True)
        self._process.start()
        theirs.close()

    def send(self, *message: object) -> None:
        if self.error is None:
            self._connection.send(message)

    def receive(self, deadline: float) -> Any:
        """Return the answer to the most recent message, or None if the contender has failed.

        If the contender does not answer by the deadline, it is killed.

        Args:
            deadline: time at which to stop waiting, on the clock of `time.monotonic`.
        """
        if self.error is not None:
            return None
        try:
            if not self._connection.poll(max(0.0, deadline - time.monotonic())):
                self.error = "no answer in time"
                self._process.kill()
                return None
            result, self.error = self._connection.recv()
        except EOFError:
            self.error = "the process ended"
            return None
        return result

    def end(self) -> None:
        if self.error is None:
            self._connection.send(("end",))
            self._process.join(20)
        self._process.kill()
        self._process.join()


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def count_parallel_builds() -> int:
    """Return how many contenders can build a task at once without running out of GPU memory."""
    return max(1, int(0.8 * torch.cuda.mem_get_info(0)[0]) // BUILD_MEMORY)


def run_task(
    task: Task, contenders: list[Contender], rounds: int, start: float
) -> dict[str, dict[str, Any]]:
    """Build a task for all contenders, measure the contenders in turn, and return the results.

    Args:
        task: task to run.
        contenders: contenders that have not failed.
        rounds: number of times to measure each contender; fewer if time runs out.
        start: time at which the benchmark started, from `time.monotonic`.
    """

    def find_deadline() -> float:
        return min(time.monotonic() + PATIENCE, start + HARD_LIMIT)

    size = len(contenders) if task.is_dry else count_parallel_builds()
    for index in range(0, len(contenders), size):
        for each in contenders[index : index + size]:
            each.send("build", task)
        built_by = find_deadline()
        for each in contenders[index : index + size]:
            each.receive(built_by)
    found: dict[str, list[tuple[float, int | None]]] = {each.name: [] for each in contenders}
    for index in range(rounds):
        if time.monotonic() > start + LIMIT:
            log(f"{task.name}: stopped after {index} of {rounds} rounds, because time ran out")
            break
        for each in contenders:
            each.send("measure")
            result = each.receive(find_deadline())
            if result is not None:
                found[each.name].append(result)
    syncs = {}
    for each in contenders:
        each.send("syncs")
        syncs[each.name] = each.receive(find_deadline())
    base = [milliseconds for milliseconds, _ in found.get(RAW, [])]
    return {
        each.name: summarize(task, found[each.name], base, syncs[each.name])
        for each in contenders
        if found[each.name] and each.error is None
    }


def summarize(
    task: Task, results: list[tuple[float, int | None]], base: list[float], syncs: float
) -> dict[str, Any]:
    times = [milliseconds for milliseconds, _ in results]
    median = statistics.median(times)
    ratios = [own / raw for own, raw in zip(times, base, strict=False)]
    peaks = [peak for _, peak in results if peak is not None]
    return {
        "step_ms": round(median, 4),
        "slowest_to_fastest_round": round(max(times) / min(times), 3),
        "ratio_to_raw_loop": round(statistics.median(ratios), 4) if ratios else None,
        ("tokens_per_s" if task.is_gpt else "samples_per_s"): round(task.items / median * 1e3),
        "peak_memory_bytes": max(peaks, default=None),
        "syncs_per_step": syncs,
        "rounds": len(times),
    }


def describe_machine(is_dry: bool) -> dict[str, Any]:
    packages = ("onecycle", "torch", "deepspeed", "accelerate", "lightning-fabric")
    return {
        "device": platform.processor() if is_dry else torch.cuda.get_device_name(0),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "versions": {name: get_installed_version(name) for name in packages},
    }


def run(*, is_dry: bool, rounds: int) -> dict[str, Any]:
    """Measure all tasks, and return the report."""
    start = time.monotonic()
    compiler = "eager" if is_dry else "inductor"
    tasks = [
        Task("GPT, 124M, bf16", is_dry),
        Task("MLP, fp32", is_dry),
        Task("GPT, 124M, bf16, compiled", is_dry, compiler),
    ]
    skipped, errors, contenders, results = {}, {}, [], {}
    for name, (package, make) in CONTENDERS.items():
        if importlib.util.find_spec(package) is None:
            skipped[name] = f"{package} is not installed"
            log(f"SKIPPED: {name}, because {skipped[name]}")
        else:
            contenders.append(Contender(name, make))
    try:
        for task in tasks:
            if time.monotonic() - start > LIMIT - 60:
                skipped[task.name] = "no time was left"
                log(f"SKIPPED: {task.name}, because {skipped[task.name]}")
                continue
            log(f"{task.name} …")
            working = [each for each in contenders if each.error is None]
            results[task.name] = run_task(task, working, rounds, start)
            for each in working:
                if each.error is not None:
                    errors[each.name] = f"{task.name}: {each.error}"
                    log(f"FAILED: {each.name}: {errors[each.name]}")
    finally:
        for each in contenders:
            each.end()
    return {
        "is_dry_run": is_dry,
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine(is_dry),
        "tasks": results,
        "skipped": skipped,
        "errors": errors,
        "seconds": round(time.monotonic() - start),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="run a small benchmark on the CPU")
    parser.add_argument(
        "--rounds", type=int, help="measurements per task and contender (default: 5; dry run: 2)"
    )
    parser.add_argument("--out", type=Path, help="file for the report (default: standard output)")
    args = parser.parse_args()
    if args.dry_run:
        os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    elif not torch.cuda.is_available():
        log("PyTorch found no GPU. To try the benchmark on the CPU, pass --dry-run.")
        return 2
    report = run(is_dry=args.dry_run, rounds=args.rounds or (2 if args.dry_run else 5))
    text = json.dumps(report, indent=1)
    if args.out is None:
        print(text)
    else:
        args.out.write_text(text + "\n")
    return 1 if report["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
