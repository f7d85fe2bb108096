"""Every backend, stage and precision: the runs, and how they are started."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("backends_run.py")
SCHEDULER = {
    "type": "OneCycle",
    "params": {
        "cycle_min_lr": 0.001,
        "cycle_max_lr": 0.01,
        "cycle_first_step_size": 12,
        "cycle_first_stair_count": 4,
        "cycle_min_mom": 0.85,
        "cycle_max_mom": 0.95,
        "decay_step_size": 4,
        "decay_lr_rate": 0.5,
    },
}
# A scale at which these small models never overflow by themselves.
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 8}}
STAGES = [(backend, stage) for backend in ("torch", "deepspeed") for stage in range(4)]


def config(backend, stage, **changes):
    zero = {"zero_optimization": {"stage": stage}} if stage else {}
    return {
        "train_batch_size": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.001}},
        "scheduler": SCHEDULER,
        "engine": {"backend": backend},
        **zero,
        **changes,
    }


def parity(updates):
    """The same 40 updates everywhere."""
    precisions = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}}
    return {
        f"{model} {precision} {backend} {stage}": {
            "model": model,
            "config": config(backend, stage, **changes),
            "updates": updates,
        }
        for model in ("transformer", "lenet")
        for precision, changes in precisions.items()
        for backend, stage in STAGES
    }


def overflows(updates, poison):
    """Gradients that are not finite at some updates, wherever a scaler or a check sees them."""
    autocast = {"torch_autocast": {"enabled": True, "dtype": "float16"}}
    bf16 = {"bf16": {"enabled": True}}
    kinds = {
        # DeepSpeed has no fp16 on most CPUs; its autocast scales just the same.
        "torch": {"fp16": FP16, "bf16": bf16, "fp32": {}},
        "deepspeed": {"autocast": autocast, "bf16": bf16},
    }
    runs = {
        f"{kind} {backend} {stage}": config(backend, stage, **changes)
        for backend, of_backend in kinds.items()
        for kind, changes in of_backend.items()
        for stage in range(4)
    }
    return {
        name: {"model": "lenet", "config": each, "updates": updates, "poison": poison}
        for name, each in runs.items()
    }


def launch(folder, runs, world_size):
    """Run all in one set of processes; return each run's summary by its name."""
    given, output = folder / f"runs{world_size}.json", folder / f"rows{world_size}.json"
    given.write_text(json.dumps(runs))
    command = [sys.executable, SCRIPT, given, output]
    if world_size > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
        command[1:1] = torchrun
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(output.read_text())
