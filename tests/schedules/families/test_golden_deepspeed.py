"""DeepSpeed's own values: equal through its clock, and each difference pinned.

DeepSpeed's clock (docs/decisions/0003-deepspeed-schedules.md): OneCycle and LRRangeTest use update
t's value at t, as we do; the warmups lag one update, but WarmupCosineLR's cosine does not.
"""

import numpy as np
import pytest

from schedules import ScheduleError, from_config, trace
from tests.testing.golden import cases

CASES = {name: case for name, case in cases("deepspeed").items() if not name.startswith("varbatch")}

REFUSED = {
    "onecycle_decay_mom_only": "decay_mom_rate",  # -0.02: DeepSpeed's only way to decay momentum
    "onecycle_inverted_min_gt_max": "cycle_max_lr",
    "onecycle_second_size_zero": "cycle_second_step_size",  # never comes to its peak
    "onecycle_stair_more_than_steps": "cycle_first_stair_count",
    "warmupcosinelr_total_lt_warmup": "warmup_num_steps",
}


def params_of(name):
    """The case's parameters, with what DeepSpeed puts in place of them written out."""
    params = dict(CASES[name]["params"])
    if params.get("warmup_num_steps") == 1:
        params["warmup_num_steps"] = 2
    if name == "warmupdecaylr_default_max":
        params["warmup_max_lr"] = 0.001
    return params


def index_map(name, steps):
    """The count of ours whose value DeepSpeed uses at each of its updates."""
    updates = np.arange(steps)
    lagging = np.maximum(updates - 1, 0)
    scheduler = CASES[name]["scheduler"]
    if scheduler in {"OneCycle", "LRRangeTest"}:
        return updates
    if scheduler == "WarmupCosineLR":
        return np.where(updates > params_of(name)["warmup_num_steps"], updates, lagging)
    return lagging


@pytest.mark.parametrize("name", [name for name in CASES if name not in REFUSED])
def test_values(name):
    case = CASES[name]
    groups = case["optimizer"]["n_param_groups"]
    base = np.broadcast_to(case["optimizer"]["lr"], groups).tolist()
    at = index_map(name, case["n_steps"])
    block = {"type": case["scheduler"], "params": params_of(name)}
    ours = trace(block, int(at.max()) + 1, base={"lr": base})
    theirs = np.array(case["lr"]).reshape(case["n_steps"], groups)
    first = 0
    if case["scheduler"] == "WarmupCosineLR" and case["params"].get("warmup_min_ratio"):
        first = 1
        assert theirs[0] == 0 < ours["lr"][0]  # DeepSpeed's first update ignores warmup_min_ratio
    np.testing.assert_allclose(ours["lr"][at][first:], theirs[first:], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(
    "name", [name for name in CASES if "betas" in CASES[name] and name not in REFUSED]
)
def test_momentum(name):
    case = CASES[name]
    ours = trace({"type": "OneCycle", "params": case["params"]}, case["n_steps"])["momentum"][:, 0]
    theirs = np.array(case["betas"])
    np.testing.assert_allclose(ours[1:], theirs[1:, 0], rtol=1e-9)
    # DeepSpeed's first update runs at the minimum of the cycle, and its beta2 is 0.99 for good.
    assert ours[0] == case["params"].get("cycle_max_mom", 0.9)
    assert theirs[0, 0] == case["params"].get("cycle_min_mom", 0.8)
    assert (theirs[:, 1] == 0.99).all()


@pytest.mark.parametrize(("name", "field"), REFUSED.items())
def test_refused(name, field):
    with pytest.raises(ScheduleError) as error:
        from_config({"type": CASES[name]["scheduler"], "params": CASES[name]["params"]})
    assert field in [fault.field for fault in error.value.faults]


def test_every_schedule_of_deepspeed_is_covered():
    covered = {case["scheduler"] for name, case in CASES.items() if name not in REFUSED}
    assert covered == {"LRRangeTest", "OneCycle", "WarmupCosineLR", "WarmupDecayLR", "WarmupLR"}
