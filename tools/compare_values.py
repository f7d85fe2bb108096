"""Compare the schedule values of two checkouts bit for bit, and test that checkpoints still load.

    python tools/compare_values.py BEFORE AFTER

BEFORE and AFTER are the directories of the checkouts. In both, the script evaluates the scheduler
blocks of the reference files in tests/golden and of the configs in tests/corpus, and the example of
each schedule. The script evaluates each of these schedules four times: with SGD, with AdamW,
without an optimizer for one param group, and without an optimizer for two param groups. The script
also trains with several schedules in BEFORE, saves checkpoints, and resumes from these checkpoints
in AFTER. The exit status is 1 if any value or loss differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# This code runs in each checkout, so it uses only names that are public in both.
EVALUATE = r"""
import hashlib, json, sys, warnings
from pathlib import Path
from typing import NamedTuple
import torch
import schedules
from schedules import Horizon

warnings.simplefilter("ignore")
STEPPED = 200
LONGEST = 200_000

class Case(NamedTuple):
    name: str
    block: dict
    horizon: Horizon = Horizon(total_steps=100, steps_per_epoch=10, samples_per_step=32)
    lr: float = 0.1
    losses: list | None = None

def cases():
    for path in sorted(Path("tests/golden").glob("*/*.json")):
        case = json.loads(path.read_text())
        if isinstance(case, dict) and "scheduler" in case:
            yield read_golden(path.parent.name + "/" + path.stem, case)
    for path in sorted(Path("tests/corpus").glob("*/*.json")):
        try:
            config = json.loads(path.read_text())
        except ValueError:
            continue
        block = config.get("scheduler") if isinstance(config, dict) else None
        if isinstance(block, dict):
            yield Case(f"{path.parent.name}/{path.stem}", block)
    for name, cls in schedules.SCHEDULES.items():
        yield Case(f"example/{name}", {"type": name, "params": dict(cls.example)})

def read_golden(name, case):
    block = {"type": case["scheduler"], "params": case["params"]}
    lr = case["optimizer"].get("lr")
    lr = lr if isinstance(lr, float) else 0.1
    horizon = Case._field_defaults["horizon"]
    if "dataloader_len" in case and "tok" not in case["max_duration"]:
        length, per_epoch = case["max_duration"], case["dataloader_len"]
        factors = {"ep": per_epoch, "ba": 1, "sp": 1 / case.get("batch_size", 1)}
        horizon = Horizon(
            total_steps=float(length[:-2]) * factors[length[-2:]],
            steps_per_epoch=per_epoch,
            samples_per_step=case.get("batch_size"),
            scale_ratio=case["scale_schedule_ratio"],
            counts_samples=length.endswith("sp"),
        )
    return Case(name, block, horizon, lr, case.get("loss"))

def trace(case, groups):
    one = {"lr": case.lr, "momentum": 0.9, "weight_decay": 0.01}
    base = {name: (value,) * groups for name, value in one.items()}
    steps = min(schedules.from_config(case.block).resolve(case.horizon).span + 100, LONGEST)
    losses = case.losses
    if losses:
        steps, losses = len(losses) + 1, iter(losses)
    values = schedules.trace(case.block, steps, base=base, horizon=case.horizon, losses=losses)
    return steps, {name: array.tobytes() for name, array in values.items()}

def step_optimizer(case, kind):
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))]} for _ in range(2)]
    momentum = {"momentum": 0.9} if kind == "SGD" else {}
    optimizer = getattr(torch.optim, kind)(groups, lr=case.lr, weight_decay=0.01, **momentum)
    binder = schedules.attach(case.block, optimizer, horizon=case.horizon)
    feedback = "state" in binder.state_dict()
    rows = []
    for step in range(STEPPED):
        for group in optimizer.param_groups:
            momentum = group.get("momentum", 0.0), *group.get("betas", ())
            rows.append([float(v).hex() for v in (group["lr"], *momentum, group["weight_decay"])])
        binder.step(abs(step - 40) / 40 + 0.1) if feedback else binder.step()
    return STEPPED, rows, list(numbers(binder.state_dict()))

def numbers(value):
    # Yield only numbers, because texts, such as the reason of a decision, may change.
    if isinstance(value, dict):
        value = [value[key] for key in sorted(value)]
    if isinstance(value, list | tuple):
        for below in value:
            yield from numbers(below)
    elif isinstance(value, int | float) or value is None:
        yield repr(value)

result = {}
for case in cases():
    for name, evaluate, argument in (
        ("trace, 1 group", trace, 1), ("trace, 2 groups", trace, 2),
        ("SGD", step_optimizer, "SGD"), ("AdamW", step_optimizer, "AdamW"),
    ):
        try:
            steps, *values = evaluate(case, argument)
        except Exception:
            steps, values = 0, ["error"]
        digest = hashlib.sha256(repr(values).encode()).hexdigest()
        result[f"{case.name}: {name}"] = [steps, digest]
Path(sys.argv[1]).write_text(json.dumps(result))
"""

TRAIN = r"""
import json, sys, warnings
from pathlib import Path
import torch, engine

warnings.simplefilter("ignore")
root, resumes = Path(sys.argv[1]), sys.argv[2] == "resume"
SCHEDULERS = {
    "OneCycle": {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1, "cycle_first_step_size": 4},
    "WarmupDecayLR": {"total_num_steps": 12, "warmup_num_steps": 3, "warmup_max_lr": 0.1},
    "AutoWU": {"steps_per_epoch": 2, "total_epochs": 10, "test": "robust", "rollback": True},
    "ReduceLROnPlateau": {"patience": 1},
}
rows = {}
for name, params in SCHEDULERS.items():
    for momentum in (0.0, 0.9):
        params = dict(params)
        if name == "OneCycle" and not momentum:
            params["cycle_momentum"] = False
        kind = "SGD" if momentum else "AdamW"
        optimizer = {"lr": 0.05, "momentum": momentum} if momentum else {"lr": 0.05}
        config = {
            "train_batch_size": 4,
            "optimizer": {"type": kind, "params": optimizer},
            "scheduler": {"type": name, "params": params},
            "engine": {"backend": "torch"},
        }
        torch.manual_seed(0)
        data = torch.utils.data.TensorDataset(torch.randn(40, 3), torch.randn(40, 1))
        trainer, _, loader, _ = engine.initialize(
            config=config, model=torch.nn.Linear(3, 1), training_data=data
        )
        directory = root / f"{name}.{kind}"
        if resumes:
            trainer.load_checkpoint(directory)
        batches = iter(loader)
        for step in range(5 if not resumes else 4):
            x, y = next(batches)
            loss = (trainer(x) - y).pow(2).mean()
            trainer.backward(loss)
            trainer.step(metric=1.0)
            if not resumes and step == 2:
                trainer.save_checkpoint(directory)
            if resumes or step > 2:
                rows.setdefault(directory.name, []).append(
                    [float(loss).hex(), *(float(lr).hex() for lr in trainer.get_lr())]
                )
        rows[directory.name] = rows[directory.name][:2]
Path(sys.argv[3]).write_text(json.dumps(rows))
"""


def run(checkout: Path, code: str, *arguments: object) -> None:
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    subprocess.run(command, cwd=checkout, env=environment, check=True)  # noqa: S603  # our own code


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, help="directory of the reference checkout")
    parser.add_argument("after", type=Path, help="directory of the checkout to compare")
    args = parser.parse_args()
    before, after = args.before.resolve(), args.after.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        values, losses = [], []
        for name, checkout in (("before", before), ("after", after)):
            path = Path(scratch, f"{name}.json")
            run(checkout, EVALUATE, path)
            values.append(json.loads(path.read_text()))
        checkpoints = Path(scratch, "checkpoints")
        for mode, checkout in (("save", before), ("resume", after)):
            path = Path(scratch, f"{mode}.json")
            run(checkout, TRAIN, checkpoints, mode, path)
            losses.append(json.loads(path.read_text()))
    old, new = values
    evaluated = sum(steps > 0 for steps, _ in old.values())
    steps = sum(steps for steps, _ in old.values())
    different = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    resumed = [name for name in losses[0] if losses[0][name] != losses[1][name]]
    print(
        f"{len(different):,} of {len(old):,} evaluations differ "
        f"({evaluated:,} ran without errors, {steps:,} steps in total)"
    )
    print(f"{len(resumed)} of {len(losses[0])} runs saved in BEFORE and resumed in AFTER differ")
    for name in [*different, *resumed]:
        print(f"  {name}")
    return 1 if different or resumed else 0


if __name__ == "__main__":
    sys.exit(main())
