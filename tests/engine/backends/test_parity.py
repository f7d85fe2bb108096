"""One config on every backend, stage and precision: the same schedule, the same losses."""

import math

import pytest

from schedules import trace
from tests.testing.backend_matrix import SCHEDULER, launch, overflows, parity

UPDATES = 40
POISON = [2, 5]
# What a bfloat16 rounds by, over 40 updates of these models; ZeRO 0 keeps its gradients in it too.
WITHIN = {"fp32": 1e-5, "bf16": 0.05}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("alone"), parity(UPDATES), 1)


two = pytest.param(2, marks=pytest.mark.slow, id="2 ranks")


@pytest.fixture(scope="module", params=[pytest.param(1, id="1 rank"), two])
def runs(request, alone, tmp_path_factory):
    if request.param == 1:
        return alone
    return launch(tmp_path_factory.mktemp("two"), parity(UPDATES), request.param)


@pytest.mark.parametrize("precision", WITHIN)
def test_every_backend_takes_the_same_forty_updates(runs, alone, precision):
    expected = trace(SCHEDULER, UPDATES)
    for name, run in runs.items():
        model, kind, *_ = name.split()
        if kind != precision:
            continue
        applied, losses, lrs, momenta = zip(*run["rows"], strict=True)
        assert all(applied), name
        assert list(lrs) == expected["lr"][:, 0].tolist(), name
        assert list(momenta) == expected["momentum"][:, 0].tolist(), name
        reference = [row[1] for row in alone[f"{model} fp32 torch 0"]["rows"]]
        assert list(losses) == pytest.approx(reference, rel=WITHIN[precision]), name
        assert losses[-1] < losses[0]
        assert run["beta2"] == [0.999]


def test_each_run_was_by_what_its_config_says(runs, request):
    two = "2 ranks" in request.node.name
    for name, run in runs.items():
        _, precision, backend, stage = name.split()
        if backend == "deepspeed":
            assert run["about"].startswith(f"DeepSpeed, ZeRO stage {stage}, ")
        elif two and stage != "0":
            assert run["about"].startswith(f"PyTorch, FSDP2, stage {stage}, over 2 ranks")
        else:
            assert run["about"].startswith(
                "PyTorch, DDP over 2 ranks" if two else "PyTorch, one process"
            )
        assert run["about"].endswith(precision)
        # What the log says at the start, whatever a library has wrapped, flattened or divided.
        assert (run["optimizer"], run["trained"]) == ("AdamW", run["parameters"]), name


@pytest.mark.parametrize("world_size", [1, two])
def test_an_overflow_skips_and_leaves_the_schedule(tmp_path, world_size):
    expected = trace(SCHEDULER, 8)["lr"][:, 0]
    for name, run in launch(tmp_path, overflows(8, POISON), world_size).items():
        applied, losses, lrs, _ = zip(*run["rows"], strict=True)
        assert [update for update in range(8) if not applied[update]] == POISON, name
        assert (run["skipped"], run["updates"]) == (2, 6), name
        counts = [sum(applied[:update]) for update in range(8)]
        assert list(lrs) == expected[counts].tolist(), name
        assert all(math.isfinite(loss) for k, loss in enumerate(losses) if k not in POISON), name
