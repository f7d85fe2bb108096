"""Training loops of public scripts take the same steps as PyTorch by hand, or are refused."""

import math

import pytest
import torch

import engine
from tests.testing.distributed import run_distributed_test
from tests.testing.training_loops import BF16, LOOPS, run_loops

TOLERANCES = {"fp32": 1e-6, "bf16": 1e-2}  # four steps with a learning rate of 0.01
TORCH = '"backend": "torch"'
DEEPSPEED = '"backend": "deepspeed"'
BOUNDARY = "`set_gradient_accumulation_boundary(False)`"
REFUSED = {
    ("GAN with two engines", 0): TORCH,
    ("GAN with two engines", 2): TORCH,
    ("GAN with two engines", 3): TORCH,
    ("two whole passes in one step", 1): BOUNDARY,
    ("two whole passes in one step", 2): BOUNDARY,
    ("two passes with BatchNorm", 1): BOUNDARY,
    ("two passes with BatchNorm", 2): BOUNDARY,
    ("two losses of one forward pass", 1): BOUNDARY,
    ("two losses of one forward pass", 2): BOUNDARY,
    ("two losses of one forward pass", 3): TORCH,
    ("accumulation by hand", 3): "`backward`",
    ("unfreezing", 1): TORCH,
    ("unfreezing", 2): TORCH,
    ("unfreezing", 3): TORCH,
}
"""The loops that the DeepSpeed backend refuses at a ZeRO stage, and what the error names as fix."""
DEEPSPEED_STAGES = [0, 1, 2, pytest.param(3, marks=pytest.mark.slow)]


def run_on_two_ranks(runs):
    """Return each run's result on rank 0, after checking that rank 1 has the same weights."""
    first, second = run_distributed_test(run_loops, 2, runs)
    for (loop, *_), one, two in zip(first, first.values(), second.values(), strict=True):
        is_rank_local = loop == "MoE"  # the experts differ
        assert is_rank_local or one.get("weights") == two.get("weights"), loop
        assert one.keys() == two.keys(), loop
    return first


@pytest.fixture(scope="module")
def by_hand():
    return run_on_two_ranks([(loop, "by hand", 0) for loop in LOOPS])


@pytest.fixture(scope="module")
def torch_runs():
    return run_on_two_ranks([(loop, "torch", stage) for loop in LOOPS for stage in range(4)])


@pytest.fixture(scope="module")
def deepspeed_runs():
    return run_on_two_ranks([(loop, "deepspeed", stage) for loop in LOOPS for stage in range(3)])


@pytest.fixture(scope="module")
def deepspeed_runs_at_stage_3():
    return run_on_two_ranks([(loop, "deepspeed", 3) for loop in LOOPS])


@pytest.fixture(scope="module")
def plain_deepspeed():
    """Runs of DeepSpeed's own engine, as reference for loops without one by hand."""
    loops = ["MoE", "LoRA on a bf16 base"]
    return run_on_two_ranks(
        [(loop, "plain deepspeed", stage) for loop in loops for stage in range(3)]
    )


def check_equal(found, expected, tolerance):
    assert "error" not in found, found["error"]
    assert all(map(math.isfinite, found["losses"]))
    assert found["losses"] == pytest.approx(expected["losses"], rel=0, abs=20 * tolerance)
    for weights, expected_weights in zip(found["weights"], expected["weights"], strict=True):
        assert weights == pytest.approx(expected_weights, rel=0, abs=tolerance)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("loop", [loop for loop in LOOPS if loop != "MoE"])
def test_loop_on_torch_equals_the_loop_by_hand(loop, stage, torch_runs, by_hand):
    tolerance = TOLERANCES["bf16" if loop in BF16 else "fp32"]
    check_equal(torch_runs[loop, "torch", stage], by_hand[loop, "by hand", 0], tolerance)


@pytest.mark.parametrize("stage", range(4))
def test_moe_on_torch_is_refused(stage, torch_runs):
    error = torch_runs["MoE", "torch", stage]["error"]
    assert error.startswith("ValueError")
    assert DEEPSPEED in error


@pytest.mark.parametrize("stage", DEEPSPEED_STAGES)
@pytest.mark.parametrize("loop", [loop for loop in LOOPS if loop != "MoE"])
def test_loop_on_deepspeed_equals_the_loop_by_hand_or_is_refused(loop, stage, request, by_hand):
    fixture = "deepspeed_runs_at_stage_3" if stage == 3 else "deepspeed_runs"
    found = request.getfixturevalue(fixture)[loop, "deepspeed", stage]
    if (loop, stage) in REFUSED:
        assert found.get("error", "").startswith("MisuseError")
        assert REFUSED[loop, stage] in found["error"]
        return
    tolerance = TOLERANCES["bf16" if loop in BF16 else "fp32"]
    check_equal(found, by_hand[loop, "by hand", 0], tolerance)


@pytest.mark.parametrize("stage", range(3))
@pytest.mark.parametrize("loop", ["MoE", "LoRA on a bf16 base"])
def test_loop_on_deepspeed_equals_plain_deepspeed(loop, stage, deepspeed_runs, plain_deepspeed):
    found = deepspeed_runs[loop, "deepspeed", stage]
    check_equal(found, plain_deepspeed[loop, "plain deepspeed", stage], TOLERANCES["fp32"])


def test_loop_by_hand_trains_every_weight_with_the_gradients_of_all_ranks(by_hand):
    """Check the reference: each loss changes, and one rank alone ends at other weights."""
    (alone,) = run_distributed_test(run_loops, 1, [("plain loop", "by hand", 0)])
    result = by_hand["plain loop", "by hand", 0]
    assert len(set(result["losses"])) == len(result["losses"])
    pairs = zip(alone["plain loop", "by hand", 0]["weights"], result["weights"], strict=True)
    assert all(max(abs(a - b) for a, b in zip(*pair, strict=True)) > 1e-3 for pair in pairs)


@pytest.mark.parametrize(
    ("args", "kwargs", "name"),
    [((), {"num_micro_batches": 1}, "`num_micro_batches`"), ((True,), {}, "1 more")],
)
def test_eval_batch_with_arguments_of_pipelines_raises(args, kwargs, name):
    config = {"train_batch_size": 1, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    trainer, *_ = engine.initialize(config=config, model=torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match=f"takes only `data_iter`, got {name}.*PipelineModule"):
        trainer.eval_batch(iter([torch.ones(1, 1)]), *args, **kwargs)
