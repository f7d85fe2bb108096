"""One config gives the same schedule and losses on every backend, stage and precision."""

import math

import pytest

from schedules import trace
from tests.testing.backend_runs import SCHEDULER, launch, overflows, parity

STEPS = 40
POISON = [2, 5]
# Relative tolerances. In bf16, rounding errors add up over 40 steps; DeepSpeed without ZeRO also
# stores gradients in bfloat16.
TOLERANCES = {"fp32": 1e-5, "bf16": 0.05}


@pytest.fixture(scope="module")
def one_rank():
    return launch(parity(STEPS), 1)


one = pytest.param(1, marks=pytest.mark.slow, id="1 rank")
two = pytest.param(2, marks=pytest.mark.slow, id="2 ranks")


@pytest.fixture(scope="module", params=[one, two])
def runs(request, one_rank):
    return one_rank if request.param == 1 else launch(parity(STEPS), request.param)


@pytest.mark.parametrize("precision", TOLERANCES)
def test_every_backend_takes_the_same_steps(runs, one_rank, precision):
    expected = trace(SCHEDULER, STEPS)
    for name, run in runs.items():
        model, kind, *_ = name.split()
        if kind != precision:
            continue
        applied, losses, lrs, momenta = zip(*run["rows"], strict=True)
        assert all(applied), name
        assert list(lrs) == expected["lr"][:, 0].tolist(), name
        assert list(momenta) == expected["momentum"][:, 0].tolist(), name
        reference = [row[1] for row in one_rank[f"{model} fp32 torch 0"]["rows"]]
        assert list(losses) == pytest.approx(reference, rel=TOLERANCES[precision]), name
        assert losses[-1] < losses[0]
        assert run["beta2"] == [0.999]


def test_log_describes_backend_precision_and_optimizer(runs, request):
    on_two = "2 ranks" in request.node.name
    for name, run in runs.items():
        _, precision, backend, stage = name.split()
        if backend == "deepspeed":
            trained_by = f"DeepSpeed, ZeRO stage {stage}, {2 if on_two else 1} rank"
        elif on_two and stage != "0":
            trained_by = f"PyTorch FSDP2, ZeRO stage {stage} over 2 ranks"
        else:
            trained_by = "PyTorch, replicated on 2 ranks" if on_two else "PyTorch, one process"
        lines = [line.split(maxsplit=1) for line in run["announcement"].splitlines()]
        rows = {line[0]: line[1] for line in lines if len(line) == 2}
        assert rows["backend"].startswith(trained_by), name
        assert rows["precision"].startswith(precision), name
        assert rows["optimizer"].startswith("AdamW"), name
        # All parameters are counted, even if a library flattens or shards them.
        assert rows["parameters"] == f"{run['parameters']:,}", name


@pytest.mark.parametrize("world_size", [1, two])
def test_overflow_skips_the_step_and_does_not_advance_the_schedule(world_size):
    expected = trace(SCHEDULER, 8)["lr"][:, 0]
    for name, run in launch(overflows(8, POISON), world_size).items():
        applied, losses, lrs, _ = zip(*run["rows"], strict=True)
        assert [step for step in range(8) if not applied[step]] == POISON, name
        assert (run["skipped"], run["applied"]) == (2, 6), name
        counts = [sum(applied[:step]) for step in range(8)]
        assert list(lrs) == expected[counts].tolist(), name
        assert all(math.isfinite(loss) for k, loss in enumerate(losses) if k not in POISON), name
