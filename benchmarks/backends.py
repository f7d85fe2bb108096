"""Train for 40 steps with every backend, ZeRO stage and precision, on one rank and on two.

    python benchmarks/backends.py > docs/results/backends.md

The script prints a Markdown table with the first and the last loss of each run. The table also
shows whether the learning rate and the momentum follow the schedule at each step, and the largest
relative difference between the losses of the run and those of a float32 PyTorch run on one rank.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from rich.console import Console

from schedules import trace
from tests.testing.backend_runs import SCHEDULER, launch, parity

STEPS = 40
HEAD = """\
# Training results on every backend

`python benchmarks/backends.py`, {date}, two cores (x86-64), gloo. A small transformer and LeNet,
40 optimizer steps with batch size 8, AdamW, 1Cycle with stairs and decay. The losses of each run
are compared, step by step, with those of one PyTorch process in float32; the table shows the
largest relative difference.

| model | precision | backend | lr and momentum | largest loss difference | first loss | last loss |
|---|---|---|---|---|---|---|"""


def main() -> None:
    progress = Console(stderr=True)
    expected = trace(SCHEDULER, STEPS)
    print(HEAD.format(date=datetime.now(tz=UTC).date()))
    reference: dict[str, list[float]] = {}
    with progress.status("one rank") as status:
        for world_size in (1, 2):
            status.update(f"{world_size} rank{'s' * (world_size > 1)}")
            for name, run in launch(parity(STEPS), world_size).items():
                model, precision, backend, stage = name.split()
                if world_size == 1 and backend == "torch" and stage != "0":
                    continue  # A single process shards nothing, so this run would repeat stage 0.
                _, losses, lrs, momenta = zip(*run["rows"], strict=True)
                own = reference.setdefault(model, list(losses))
                same = (list(lrs), list(momenta)) == (
                    expected["lr"][:, 0].tolist(),
                    expected["momentum"][:, 0].tolist(),
                )
                gap = max(abs(a - b) / abs(b) for a, b in zip(losses, own, strict=True))
                cells = (
                    model,
                    precision,
                    run["announcement"].partition(", cpu")[0],
                    "as scheduled" if same else "DIFFERENT",
                    f"{gap:.1e}",
                    f"{losses[0]:.4f}",
                    f"{losses[-1]:.4f}",
                )
                print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
