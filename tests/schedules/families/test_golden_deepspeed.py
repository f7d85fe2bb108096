"""Compare the values with DeepSpeed's, after mapping steps; each difference has its own assertion.

Steps map as follows (docs/decisions/0003-deepspeed-schedules.md): in DeepSpeed, OneCycle and
LRRangeTest use the value of step t at step t, as here. The warmups lag by one step, but the cosine
of WarmupCosineLR does not.
"""

import numpy as np
import pytest

from schedules import ScheduleError, from_config, trace
from tests.testing.golden import cases

CASES = {name: case for name, case in cases("deepspeed").items() if not name.startswith("varbatch")}

INVALID = {
    "onecycle_decay_mom_only": "decay_mom_rate",  # DeepSpeed needs a negative rate (-0.02) here
    "onecycle_inverted_min_gt_max": "cycle_max_lr",
    "onecycle_second_size_zero": "cycle_second_step_size",  # DeepSpeed never reaches the peak
    "onecycle_stair_more_than_steps": "cycle_first_stair_count",
    "warmupcosinelr_total_lt_warmup": "warmup_num_steps",
}


def case_params(name):
    """Return the case's parameters, with the values that DeepSpeed silently replaces."""
    params = dict(CASES[name]["params"])
    if params.get("warmup_num_steps") == 1:
        params["warmup_num_steps"] = 2
    if name == "warmupdecaylr_default_max":
        params["warmup_max_lr"] = 0.001
    return params


def index_map(name, steps):
    """Return, for each of DeepSpeed's steps, the step at which this package has the same value."""
    indices = np.arange(steps)
    lagging = np.maximum(indices - 1, 0)
    scheduler = CASES[name]["scheduler"]
    if scheduler in {"OneCycle", "LRRangeTest"}:
        return indices
    if scheduler == "WarmupCosineLR":
        return np.where(indices > case_params(name)["warmup_num_steps"], indices, lagging)
    return lagging


@pytest.mark.parametrize("name", [name for name in CASES if name not in INVALID])
def test_deepspeed_lr_matches_golden_values(name):
    case = CASES[name]
    groups = case["optimizer"]["n_param_groups"]
    base = np.broadcast_to(case["optimizer"]["lr"], groups).tolist()
    at = index_map(name, case["n_steps"])
    block = {"type": case["scheduler"], "params": case_params(name)}
    ours = trace(block, int(at.max()) + 1, base={"lr": base})
    theirs = np.array(case["lr"]).reshape(case["n_steps"], groups)
    first = 0
    if case["scheduler"] == "WarmupCosineLR" and case["params"].get("warmup_min_ratio"):
        first = 1
        assert theirs[0] == 0 < ours["lr"][0]  # DeepSpeed's first step ignores the ratio
    np.testing.assert_allclose(ours["lr"][at][first:], theirs[first:], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(
    "name", [name for name in CASES if "betas" in CASES[name] and name not in INVALID]
)
def test_onecycle_momentum_matches_golden_values_after_first_step(name):
    case = CASES[name]
    ours = trace({"type": "OneCycle", "params": case["params"]}, case["n_steps"])["momentum"][:, 0]
    theirs = np.array(case["betas"])
    np.testing.assert_allclose(ours[1:], theirs[1:, 0], rtol=1e-9)
    # DeepSpeed uses the minimum momentum in the first step, and beta2 = 0.99 in every step.
    assert ours[0] == case["params"].get("cycle_max_mom", 0.9)
    assert theirs[0, 0] == case["params"].get("cycle_min_mom", 0.8)
    assert (theirs[:, 1] == 0.99).all()


@pytest.mark.parametrize(("name", "field"), INVALID.items())
def test_golden_case_with_invalid_parameters_is_rejected(name, field):
    with pytest.raises(ScheduleError) as error:
        from_config({"type": CASES[name]["scheduler"], "params": CASES[name]["params"]})
    assert field in [fault.field for fault in error.value.problems]


def test_golden_cases_cover_every_deepspeed_schedule():
    covered = {case["scheduler"] for name, case in CASES.items() if name not in INVALID}
    assert covered == {"LRRangeTest", "OneCycle", "WarmupCosineLR", "WarmupDecayLR", "WarmupLR"}
