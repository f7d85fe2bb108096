"""Compare the estimate of `onecycle memory` with the tensor memory that training allocates.

    python benchmarks/memory_estimate.py > docs/results/memory_estimate.md

The script trains a small model with different backends, ZeRO stages, precisions, offloading options
and optimizers, on one rank and on two. It adds up the sizes of all tensors that exist at the end of
each forward and backward pass and at the start of the optimizer step. The first table compares the
largest of these sums with the estimate. The second table compares the estimates of onecycle and
DeepSpeed for a model with 7 billion parameters.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from rich.console import Console

from engine.memory import MemorySettings, ParameterSize, estimate_memory
from tests.testing.distributed import run_distributed_test
from tests.testing.memory_runs import LAYERS, WIDTH, estimate, list_runs, measure_all

COUNT = 7 * 10**9
HEAD = """\
# Estimated and allocated memory of the model states

`python benchmarks/memory_estimate.py`, {date}, on the CPU, with gloo. The model has {layers} layers
and {count:,} parameters. The estimated and allocated sizes are peak numbers of bytes per parameter
on rank 0 during a step. The optimizer is AdamW unless another one is named.

| ranks | run | estimated | allocated | difference |
|---|---|---|---|---|"""
PEERS = """
## DeepSpeed's estimators

The table compares onecycle's estimates with those of `estimate_zero2_model_states_mem_needs` and
`estimate_zero3_model_states_mem_needs` of DeepSpeed {version}. It shows GB on the GPU of each rank,
for 7 billion parameters in bf16 with Adam. DeepSpeed's estimator for stage 3 is called with a
largest layer of size 0, so it leaves out the parameters that stay gathered after a forward pass.
The column "without gathered" leaves them out, too. For stage 2, DeepSpeed's estimator counts both
the 16-bit gradients and their float32 copies, although DeepSpeed frees the 16-bit gradients before
the optimizer step. For stage 3, where both exist during the optimizer step, the estimator counts
only one of them.

| ranks | stage | offloaded | onecycle | without gathered | DeepSpeed |
|---|---|---|---|---|---|"""


def main() -> None:
    progress = Console(stderr=True)
    count = WIDTH * WIDTH * LAYERS
    today = datetime.now(tz=UTC).date()
    print(HEAD.format(date=today, layers=LAYERS, count=count))
    worst = 0.0
    for world_size in (1, 2):
        runs = list_runs()
        with progress.status(f"{world_size} rank{'s' * (world_size > 1)}"):
            allocated = run_distributed_test(measure_all, world_size, runs, timeout=900)[0]
        for name, config in runs.items():
            expected, found = estimate(config, world_size), allocated[name]
            gap = expected / found - 1
            worst = max(worst, abs(gap))
            sizes = f"{expected / count:.2f} | {found / count:.2f} | {gap:+.1%}"
            print(f"| {world_size} | {name} | {sizes} |")
    print(f"\nThe largest difference is {worst:.1%}.")
    for line in compare_with_deepspeed():
        print(line)


def compare_with_deepspeed() -> Iterator[str]:
    import deepspeed
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as stage_3
    from deepspeed.runtime.zero.stage_1_and_2 import (
        estimate_zero2_model_states_mem_needs as stage_2,
    )

    yield PEERS.format(version=deepspeed.__version__)
    for ranks in (8, 64):
        for stage, offload in ((2, ""), (2, "optimizer"), (3, ""), (3, "optimizer")):
            if stage == 2:
                peer = stage_2(COUNT, ranks, 1, cpu_offload=bool(offload))[1]
            else:
                peer = stage_3(
                    COUNT, 0, ranks, 1, cpu_offload=bool(offload), cpu_offload_params=False
                )[1]
            settings = MemorySettings(
                backend="deepspeed",
                world_size=ranks,
                zero_stage=stage,
                precision="bf16",
                offload_optimizer="cpu" if offload else "none",
            )
            own = estimate_memory([ParameterSize((COUNT,))], settings)
            rest = max(own.total("GPU")[1:])
            yield (
                f"| {ranks} | {stage} | {offload or '-'} | {own.peak('GPU') / 1e9:.1f} | "
                f"{rest / 1e9:.1f} | {peer / 1e9:.1f} |"
            )


if __name__ == "__main__":
    main()
