"""Schedules of other libraries: our values equal their recorded values at every step.

If the other library has a bug, the test pins the difference. docs/decisions/0003 and 0005 to 0007
describe where the values differ, and by how much.
"""

import math
from dataclasses import replace

import numpy as np
import pytest

import schedules
from schedules import SCHEDULES, ScheduleError, from_config, trace
from tests.schedules.families import test_golden_deepspeed
from tests.schedules.feedback import test_autowu
from tests.testing import golden
from tests.testing.golden import base_of, cases, compare, horizon_of

COMPOSER = cases("composer")
COMPOSER_PYTORCH = cases("composer_pytorch_ssr")
TOKENS = cases("composer_tokens")
TORCH = cases("torch")
D2L = cases("d2l")
MXNET = cases("mxnet")
SAMBAFLOW = cases("sambaflow")
TRANSFORMERS = cases("transformers")
MEGATRON = cases("megatron")
TIMM = cases("timm")
VARIABLE_BATCH = {
    name: case for name, case in cases("deepspeed").items() if name.startswith("varbatch")
}


def lagging(case):
    """Return Composer's step numbers: its trainer steps the schedulers one batch late."""
    return np.maximum(np.arange(case["n_steps"]) - 1, 0)


def is_scaled_warmup(case):
    return case["params"].get("scale_warmup") and case["scale_schedule_ratio"] != 1


@pytest.mark.parametrize(
    "name", [name for name, case in COMPOSER.items() if not is_scaled_warmup(case)]
)
def test_composer_golden_case_matches(name):
    case = COMPOSER[name]
    params = dict(case["params"])
    if case["scheduler"] == "ConstantWithWarmupScheduler":
        params.pop("t_max", None)  # has no effect in Composer
    block = {"type": case["scheduler"], "params": params}
    compare(case, block, at=lagging(case), horizon=horizon_of(case))
    steps = np.arange(len(case["alpha"]))
    in_run = {**case, "n_steps": len(steps)}
    alpha = np.array(case["alpha"]) * case["optimizer"]["lr"]
    compare(in_run, block, at=steps, theirs=alpha, horizon=horizon_of(case))


@pytest.mark.parametrize(
    "name", [name for name, case in COMPOSER.items() if is_scaled_warmup(case)]
)
def test_composer_scaled_warmup_is_continuous_unlike_composer(name):
    case = COMPOSER[name]
    ratio = case["scale_schedule_ratio"]
    block = {"type": case["scheduler"], "params": case["params"]}
    steps = len(case["alpha"])
    horizon = horizon_of(case)
    ours = trace(block, steps, base=base_of(case), horizon=horizon)["lr"][:, 0]
    theirs = np.array(case["alpha"]) * case["optimizer"]["lr"]
    resolved = from_config(block, horizon=schedules.Horizon(**vars(horizon) | {"scale_ratio": 1.0}))
    unscaled, scaled = int(resolved.t_warmup), int(resolved.t_warmup * ratio)
    ramp = slice(0, min(unscaled, scaled))
    np.testing.assert_allclose(ours[ramp], theirs[ramp], rtol=1e-9, atol=1e-15)
    # Composer ends the ramp after the unscaled warmup: halfway up, or long after it is at the top.
    slope = theirs[1]
    if ratio > 1:
        assert theirs[unscaled] - theirs[unscaled - 1] > 5 * slope
    else:
        assert theirs[scaled] == theirs[unscaled - 1] == theirs.max()
    assert np.abs(np.diff(ours[: scaled + 1])).max() <= slope * (1 + 1e-9)


@pytest.mark.parametrize("name", TOKENS)
def test_composer_durations_in_tokens_match(name):
    case = TOKENS[name]
    block = {"type": case["scheduler"], "params": case["params"]}
    horizon = horizon_of(case)
    compare(case, block, at=lagging(case), horizon=horizon)
    alpha = np.array(case["alpha"]) * case["optimizer"]["lr"]
    compare(case, block, at=np.arange(len(alpha)), theirs=alpha, horizon=horizon)
    with pytest.raises(ScheduleError, match="requires the number of tokens per sample"):
        from_config(block, horizon=replace(horizon, tokens_per_sample=None))


NOT_SCALED = {  # Composer changes T_0, but torch does not read it again
    name
    for name, case in COMPOSER_PYTORCH.items()
    if case["scheduler"] == "CosineAnnealingWarmRestarts" and case["scale_schedule_ratio"] != 1
}


@pytest.mark.parametrize("name", COMPOSER_PYTORCH)
def test_pytorch_scheduler_with_composers_scale_ratio_matches(name):
    case = COMPOSER_PYTORCH[name]
    at = np.arange(case["n_steps"])
    horizon = horizon_of({**case, "batch_size": None})
    if not case["step_schedulers_every_batch"]:  # it is stepped once per epoch
        at //= case["dataloader_len"]
    if name in NOT_SCALED:
        horizon = schedules.Horizon(scale_ratio=1.0)
    block = {"type": case["scheduler"], "params": case["params"]}
    compare(case, block, at=at, horizon=horizon)


def phases(*rows):
    keys = ("from", "to", "duration", "shape")
    lr = [dict(zip(keys, row, strict=False)) for row in rows]
    return {"type": "Phases", "params": {"lr": lr}}


def lambda_sqrt(step):
    return (step + 1) ** -0.5


def always_less(step):
    return 0.95


FUNCTIONS = {"lambda_sqrt": lambda_sqrt, "multiplicative": always_less}


def torch_block(name):
    case = TORCH[name]
    params = dict(case["params"])
    if name in FUNCTIONS:
        params["lr_lambda"] = f"{__name__}:{FUNCTIONS[name].__name__}"
    if "schedulers" in params:
        params["schedulers"] = [{"type": t, "params": p} for t, p in params["schedulers"]]
    return {"type": case["scheduler"], "params": params}


PAST_THE_END = {
    "cosine": 40,
    "cosine_eta0": 30,
    "sequential_linear_cosine": 60,
}  # torch's cosine rises again after T_max


@pytest.mark.parametrize("name", TORCH)
def test_torch_golden_case_matches(name):
    case = TORCH[name]
    block = torch_block(name)
    rows = slice(None)
    if name in PAST_THE_END:
        rows = slice(PAST_THE_END[name] + 1)
        assert case["lr"][PAST_THE_END[name] + 5] > case["lr"][PAST_THE_END[name]]
    if name == "onecycle_linear_at_total":
        rows = slice(40)
        assert case["lr"][40] < 0  # torch extrapolates below the minimum; ours stays constant
    compare(case, block, rows=rows)
    recorded = {key for key in ("momentum", "betas") if key in case}
    for key in recorded:
        theirs = np.array(case[key], dtype=float).reshape(case["n_steps"], -1)[:, 0]
        compare(case, block, name="momentum", theirs=theirs, rows=rows)


@pytest.mark.parametrize("name", D2L)
def test_d2l_golden_case_matches(name):
    case = D2L[name]
    params = dict(case["params"])
    if case["scheduler"] == "SquareRootScheduler":
        params["base_lr"] = params.pop("lr")
    compare(case, {"type": case["scheduler"], "params": params})


@pytest.mark.parametrize("name", MXNET)
def test_mxnet_golden_case_matches(name):
    """MXNet's trainer uses step k + 1. Its factor schedules lag by one step, which cancels that."""
    case = MXNET[name]
    params = dict(case["params"])
    steps = np.arange(case["n_steps"])
    ahead = steps + 1
    at = ahead
    if "Factor" in case["scheduler"]:
        at = np.where(ahead <= params.get("warmup_steps", 0), ahead, steps)
    compare(case, {"type": case["scheduler"], "params": {"base_lr": 0.01} | params}, at=at)


@pytest.mark.parametrize("name", SAMBAFLOW)
def test_sambaflow_golden_case_matches(name):
    case = SAMBAFLOW[name]
    params = case["params"]
    arguments = case.get("sambaflow_args", {})
    kind = case["scheduler"]
    ours = {
        "StepLR": lambda: ("step_schedule", {"decay_steps": params["step_size"], "gamma": 0.5}),
        "step_schedule": lambda: ("step_schedule", params),
        "fixed_lr": lambda: ("fixed_lr", arguments),
    }.get(kind, lambda: (kind, arguments))
    type_name, block = ours()
    block = {key: value for key, value in block.items() if key in schedule_fields(type_name)}
    compare(case, {"type": type_name, "params": block})


def schedule_fields(type_name):
    return schedules.core.fields.read_fields(SCHEDULES[type_name])


def transformers_block(case):
    params, kind = case["params"], case["scheduler"]
    lr = base_of(case)["lr"][0]
    warmup, total = params.get("num_warmup_steps", 0), params.get("num_training_steps", 0)
    both = {"warmup_steps": warmup, "max_steps": max(warmup, total)}
    match kind:
        case "get_constant_schedule":
            return {"type": "fixed_lr"}
        case "get_constant_schedule_with_warmup":
            return {"type": "ConstantWithWarmupScheduler", "params": {"t_warmup": warmup}}
        case "get_linear_schedule_with_warmup":
            return {"type": "polynomial_decay_schedule_with_warmup", "params": both}
        case "get_cosine_schedule_with_warmup":
            return {"type": "cosine_schedule_with_warmup", "params": both | {"end_lr_ratio": 0}}
        case "get_cosine_with_min_lr_schedule_with_warmup":
            ratio = {"end_lr_ratio": params["min_lr"] / lr}
            return {"type": "cosine_schedule_with_warmup", "params": both | ratio}
        case "get_polynomial_decay_schedule_with_warmup":
            power = {"t_warmup": warmup, "t_max": total, "alpha_f": params["lr_end"] / lr}
            power["power"] = params.get("power", 1.0)
            return {"type": "PolynomialWithWarmupScheduler", "params": power}
        case "get_inverse_sqrt_schedule" if warmup:
            scale = {"warmup_steps": warmup, "timescale": params["timescale"] or warmup}
            return {"type": "InverseSquareRoot", "params": scale}
    return None


def one_minus_sqrt_warmup(step):
    """Warmup with the mirrored shape of "1-sqrt", then a constant phase, then a cosine."""
    if step < 10:
        return 1 - (1 - step / 10) ** 0.5
    return 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, (step - 50) / 30))))


TRANSFORMERS_BLOCKS = {
    "cosine_hard_restarts": phases((0.0, 0.01, 10), *[(0.01, 0.0, 70 / 3, "cosine")] * 3),
    "cosine_min_lr_warmup_rate": phases((0.002, 0.01, 9), (0.01, 0.001, 70, "cosine")),
    "inverse_sqrt_warmup0": {"type": "InverseSquareRoot", "params": {"timescale": 20}},
    "wsd_1_sqrt": phases((0.001, 0.01, 10), (0.01, 0.01, 30), (0.01, 0.001, 30, "1-sqrt")),
    "wsd_warmup_1_sqrt": {"type": f"{__name__}:one_minus_sqrt_warmup"},
    "wsd_warmup_cosine": phases((0.0, 0.01, 10, "cosine"), (0.01, 0.01, 40), (0.01, 0.0, 30)),
}
# The cosines of transformers rise again after their last step.
LAST_STEPS = {
    "cosine_warmup": 80,
    "cosine_warmup0": 80,
    "cosine_min_lr": 80,
    "cosine_min_lr_warmup_rate": 79,
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_golden_case_matches(name):
    case = TRANSFORMERS[name]
    block = TRANSFORMERS_BLOCKS.get(name) or transformers_block(case)
    if name == "linear_total_lt_warmup":
        block["params"]["max_steps"] = 10
        with pytest.raises(ScheduleError, match="`warmup_steps` must be at most `max_steps`"):
            from_config(block)
        return
    rows = slice(None)
    if name in LAST_STEPS:
        rows = slice(LAST_STEPS[name] + 1)
        assert case["lr"][-1] > case["lr"][LAST_STEPS[name]]
    compare(case, block, rows=rows)


@pytest.mark.parametrize("name", MEGATRON)
def test_megatron_golden_case_matches(name):
    case = MEGATRON[name]
    block = {"type": "OptimizerParamScheduler", "params": case["params"]}
    compare(case, block)
    compare(case, block, name="weight_decay")


def tanh_decay(step):
    x = min(1.0, step / 60)
    shape = 0.5 * (1 - np.tanh(-7.0 * (1 - x) + 3.0 * x))
    return (0.001 + 0.099 * shape) / 0.1 if step < 60 else 0.01


def scheduler_block(type_name, **params):
    return {"type": type_name, "params": params}


COSINE = scheduler_block("CosineAnnealingLR", T_max=60, eta_min=0.001)
# "cosine_warmup" has two blocks: timm counts the steps of the warmup as steps of the cosine, so the
# learning rate drops at the end of the warmup.
TIMM_BLOCKS = {
    "cosine": [(0, COSINE)],
    "cosine_restarts": [(0, phases(*[(peak, 0.001, 20, "cosine") for peak in (0.1, 0.05, 0.025)]))],
    "cosine_restarts_mul2": [(0, phases(*[(0.1, 0.001, n, "cosine") for n in (10, 20, 40)]))],
    "cosine_warmup": [(0, phases((0.0001, 0.1, 10))), (10, COSINE)],
    "cosine_warmup_prefix": [(0, phases((0.0001, 0.1, 10), (0.1, 0.001, 60, "cosine")))],
    "multistep": [(0, scheduler_block("MultiStepLR", milestones=[20, 50], gamma=0.1))],
    "poly": [(0, scheduler_block("PolynomialScheduler", power=0.5, t_max=60, alpha_f=0.01))],
    "step": [
        (0, phases((0.001, 0.1, 5), *[(0.1 / 2**n, 0.1 / 2**n, 15) for n in range(7)])),
    ],
    "tanh": [(0, scheduler_block(f"{__name__}:tanh_decay"))],
    "wsd": [(0, phases((0.0, 0.1, 10), (0.1, 0.1, 60), (0.1, 0.001, 20, "1-sqrt")))],
}


@pytest.mark.parametrize("name", TIMM)
def test_timm_golden_case_matches(name):
    case = TIMM[name]
    blocks = TIMM_BLOCKS[name]
    ends = [start for start, _ in blocks[1:]] + [case["n_steps"]]
    if name == "tanh":  # timm's first step uses the optimizer's learning rate
        assert case["lr"][0] == 0.1 != pytest.approx(trace(blocks[0][1], 1)["lr"][0, 0], rel=1e-7)
        blocks = [(1, blocks[0][1])]
    # timm's milestones are one step early; its other schedules are not.
    at = np.arange(case["n_steps"]) + (name == "multistep")
    for (start, block), end in zip(blocks, ends, strict=True):
        compare(case, block, at=at, rows=slice(start, end))


@pytest.mark.parametrize("name", VARIABLE_BATCH)
def test_deepspeed_variable_batch_size_scales_a_base_schedule(name):
    """DeepSpeed's data pipeline multiplies a schedule by the relative batch size."""
    case = VARIABLE_BATCH[name]
    params = case["params"]
    kind, base_params = params["base"]
    steps = case["n_steps"]
    sizes = np.resize(params["batch_sizes"], steps) / params["base_batch_size"]
    scale = np.sqrt(sizes) if params["lr_scaling_method"] == "sqrt" else sizes
    theirs = np.array(case["lr"]) / scale
    # DeepSpeed's constructor steps the base schedule once, so it is one step ahead. Warmup
    # schedules lag by one step, which cancels that.
    at = np.arange(steps) + (kind == "OneCycle")
    block = {"type": "fixed_lr"} if kind == "constant" else {"type": kind, "params": base_params}
    compare(case, block, at=at, theirs=theirs)


TESTS = {
    "autowu": [test_autowu.test_autowu_golden_case_matches_the_published_code],
    "composer": [
        test_composer_golden_case_matches,
        test_composer_scaled_warmup_is_continuous_unlike_composer,
    ],
    "composer_pytorch_ssr": [test_pytorch_scheduler_with_composers_scale_ratio_matches],
    "composer_tokens": [test_composer_durations_in_tokens_match],
    "d2l": [test_d2l_golden_case_matches],
    "deepspeed": [
        test_deepspeed_variable_batch_size_scales_a_base_schedule,
        test_golden_deepspeed.test_golden_case_with_invalid_parameters_is_rejected,
        test_golden_deepspeed.test_deepspeed_lr_matches_golden_values,
    ],
    "megatron": [test_megatron_golden_case_matches],
    "mxnet": [test_mxnet_golden_case_matches],
    "sambaflow": [test_sambaflow_golden_case_matches],
    "timm": [test_timm_golden_case_matches],
    "torch": [test_torch_golden_case_matches],
    "transformers": [test_transformers_golden_case_matches],
}
RECORDED = "autowu_recorded"  # recorded losses for test_autowu, not golden cases


def names_of_cases(test):
    """Return the case names in the parametrize mark of a test."""
    (mark,) = (mark for mark in test.pytestmark if mark.name == "parametrize")
    return [row if isinstance(row, str) else row[0] for row in mark.args[1]]


def test_golden_files_are_all_used_by_a_test():
    files = {path for path in golden.FOLDER.glob("*/*.json") if path.parent.name != RECORDED}
    tested = {
        golden.FOLDER / family / f"{name}.json"
        for family, tests in TESTS.items()
        for test in tests
        for name in names_of_cases(test)
    }
    assert tested == files
