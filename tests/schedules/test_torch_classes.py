"""Each schedule with the name of a PyTorch class behaves like that class, run side by side."""

import contextlib
import io
import itertools
import math
import warnings

import pytest
import torch

import schedules
from schedules import attach

OF_TORCH = torch.optim.lr_scheduler
SWALR = "torch.optim.swa_utils:SWALR"
LRS = (0.05, 0.5)
STEPS = 25


def halve(step):
    return 0.5**step


def shrink(step):
    return 0.9 if step % 3 else 0.8


def product(**values):
    """Return one dict of parameters for each combination of values."""
    return [dict(zip(values, row, strict=True)) for row in itertools.product(*values.values())]


CYCLE_LRS = {"base_lr": [0.01, 0.02], "max_lr": [0.1, 0.4]}
CYCLE_MOMENTA = {"base_momentum": [0.7, 0.6], "max_momentum": [0.9, 0.8]}
PARAMETERS = {
    "StepLR": product(step_size=[1, 3, 10], gamma=[0.0, 0.1, 0.7, 2.0]),
    "MultiStepLR": product(
        milestones=[[2, 5, 9], [9, 2, 5], [1], [3, 3, 7], [30], [], [0]], gamma=[0.1, 0.7]
    ),
    "ConstantLR": product(factor=[0.1, 0.5, 1.0], total_iters=[1, 4, 40]),
    "LinearLR": product(start_factor=[0.1, 1 / 3, 1.0], end_factor=[0.0, 0.7], total_iters=[1, 8]),
    "ExponentialLR": product(gamma=[0.0, 0.1, 0.9, 1.0, 1.1]),
    "PolynomialLR": product(total_iters=[1, 5, 40], power=[0, 0.5, 1.0, 3.0]),
    "CosineAnnealingLR": product(T_max=[STEPS, 60], eta_min=[0.0, 0.01]),
    "CosineAnnealingWarmRestarts": product(T_0=[1, 4, 30], T_mult=[1, 2, 3], eta_min=[0.0, 0.01]),
    "CyclicLR": [
        CYCLE_LRS | CYCLE_MOMENTA | each
        for each in product(
            step_size_up=[1, 4],
            step_size_down=[None, 6],
            mode=["triangular", "triangular2", "exp_range"],
            gamma=[0.9, 0.0],
            cycle_momentum=[True, False],
        )
    ],
    "OneCycleLR": [
        {"max_lr": [0.5, 0.9], "div_factor": 10.0, **CYCLE_MOMENTA, **each}
        for each in product(
            total_steps=[STEPS, 40],
            pct_start=[0.0, 0.3, 0.45],
            anneal_strategy=["cos", "linear"],
            final_div_factor=[10.0, 1e4],
            three_phase=[True, False],
        )
    ]
    + [
        {"max_lr": [0.5, 0.9], "epochs": 5, "steps_per_epoch": 8, "cycle_momentum": False},
    ],
    "LambdaLR": [{"lr_lambda": halve}, {"lr_lambda": [halve, shrink]}],
    "MultiplicativeLR": [{"lr_lambda": shrink}, {"lr_lambda": [halve, shrink]}],
    SWALR: product(
        swa_lr=[0.01, [0.01, 0.02]], anneal_epochs=[4], anneal_strategy=["cos", "linear"]
    ),
}
CASES = [
    pytest.param(name, params, id=f"{name.split(':')[-1]}-{index}")
    for name, rows in PARAMETERS.items()
    for index, params in enumerate(rows)
]
FIRST = {name: rows[0] for name, rows in PARAMETERS.items()}
every_case = pytest.mark.parametrize(("name", "params"), CASES)
every_class = pytest.mark.parametrize(
    ("name", "params"), FIRST.items(), ids=[each.split(":")[-1] for each in FIRST]
)


def build_optimizer(is_tensor=False):
    groups = [
        {"params": [torch.nn.Parameter(torch.ones(1))], "lr": torch.tensor(lr) if is_tensor else lr}
        for lr in LRS
    ]
    return torch.optim.SGD(groups, momentum=0.9)


def build_torchs(name, optimizer, **params):
    of_class = torch.optim.swa_utils.SWALR if name == SWALR else getattr(OF_TORCH, name)
    return of_class(optimizer, **params)


def step(scheduler, *metric):
    scheduler.optimizer.step()
    scheduler.step(*metric)


def read(scheduler):
    """Return the values of the param groups and the step of a scheduler."""
    groups = scheduler.optimizer.param_groups
    lrs = [float(group["lr"]) for group in groups]
    assert [float(lr) for lr in scheduler.get_last_lr()] == lrs
    momenta = [group["momentum"] for group in groups]
    return [*lrs, *momenta, scheduler.last_epoch]


def assert_equal_runs(ours, theirs, steps, rel=1e-10):
    for _ in range(steps):
        assert read(ours) == pytest.approx(read(theirs), rel=rel, abs=1e-15)
        step(ours)
        step(theirs)


def load(optimizer):
    """Return a new optimizer with the saved state of another one."""
    loaded = build_optimizer()
    loaded.load_state_dict(optimizer.state_dict())
    return loaded


@every_case
def test_class_values_per_step_equal_those_of_torch(name, params):
    ours = attach(name, build_optimizer(), **params)
    theirs = build_torchs(name, build_optimizer(), **params)
    assert ours.base_lrs == list(LRS)
    # In its last step, torch's OneCycleLR leaves its curve.
    assert_equal_runs(ours, theirs, STEPS - 1)


@pytest.mark.parametrize("three_phase", [True, False])
@pytest.mark.parametrize("strategy", ["cos", "linear"])
@pytest.mark.parametrize("total_steps", [1, 2, 3, 4, 5])
def test_onecycle_shorter_than_its_climb_equals_that_of_torch(total_steps, strategy, three_phase):
    params = {"max_lr": [0.5, 0.9], "total_steps": total_steps, **CYCLE_MOMENTA}
    params |= {"anneal_strategy": strategy, "three_phase": three_phase}
    ours = attach("OneCycleLR", build_optimizer(), **params)
    theirs = build_torchs("OneCycleLR", build_optimizer(), **params)
    assert_equal_runs(ours, theirs, total_steps - 1)
    assert read(ours) == pytest.approx(read(theirs), rel=1e-10, abs=1e-15)


@pytest.mark.parametrize("name", ["ConstantLR", "LinearLR", "PolynomialLR"])
def test_class_of_0_iterations_is_rejected_because_torchs_own_formulas_disagree(name):
    theirs = build_torchs(name, build_optimizer(), total_iters=0)
    step(theirs)
    stepped = theirs.get_last_lr()
    with contextlib.suppress(ZeroDivisionError):
        assert theirs._get_closed_form_lr() != stepped
    with pytest.raises(ValueError, match="`total_iters` must be .* at least 1, got 0"):
        attach(name, build_optimizer(), total_iters=0)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        case
        for case in CASES
        if hasattr(getattr(OF_TORCH, case.values[0], None), "_get_closed_form_lr")
    ],
)
def test_class_closed_form_equals_that_of_torch(name, params):
    ours = attach(name, build_optimizer(), **params).controller.curves["lr"]
    theirs = build_torchs(name, build_optimizer(), **params)
    for k in range(STEPS):
        theirs.last_epoch = k
        assert [curve(k) for curve in ours] == pytest.approx(
            theirs._get_closed_form_lr(), rel=1e-13, abs=1e-17
        )


@every_class
def test_class_on_a_tensor_lr_writes_in_place_as_torch_does(name, params):
    ours = attach(name, build_optimizer(is_tensor=True), **params)
    theirs = build_torchs(name, build_optimizer(is_tensor=True), **params)
    tensors = [group["lr"] for group in ours.optimizer.param_groups]
    assert_equal_runs(ours, theirs, 6, rel=1e-5)
    for group, tensor in zip(ours.optimizer.param_groups, tensors, strict=True):
        assert group["lr"] is tensor
        assert tensor.dtype is torch.float32


@pytest.mark.parametrize("library", ["ours", "torch"])
@every_class
def test_class_at_a_step_continues_a_run_of_either_library(name, params, library):
    """As `last_epoch` of torch's classes does, except for StepLR and MultiStepLR at a decay."""
    whole = build_torchs(name, build_optimizer(), **params)
    first = attach(name, build_optimizer(), **params) if library == "ours" else whole
    for _ in range(5):
        for scheduler in {first, whole}:
            step(scheduler)
    resumed = attach(name, load(first.optimizer), at=5, **params)
    assert_equal_runs(resumed, whole, 8)


@every_class
def test_class_saved_with_torch_save_continues_like_torch(name, params):
    ours = attach(name, build_optimizer(), **params)
    theirs = build_torchs(name, build_optimizer(), **params)
    for _ in range(5):
        step(ours)
        step(theirs)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    resumed = attach(name, load(ours.optimizer), **params)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.state_dict() == ours.state_dict()
    assert_equal_runs(resumed, theirs, 8)


@every_class
def test_class_initial_step_restarts_like_torch(name, params):
    """Torch's SequentialLR calls `_initial_step` of its first part."""
    ours = attach(name, build_optimizer(), **params)
    before = read(ours)
    step(ours)
    ours._initial_step()
    assert read(ours) == before


PARTS = {
    "chained": {
        "one": [("StepLR", {"step_size": 3})],
        "warmup and milestones": [
            ("LinearLR", {"start_factor": 0.4, "total_iters": 3}),
            ("MultiStepLR", {"milestones": [4, 8, 10]}),
        ],
        "three": [
            ("ExponentialLR", {"gamma": 0.9}),
            ("ConstantLR", {"factor": 0.2, "total_iters": 4}),
            ("StepLR", {"step_size": 3}),
        ],
        "to 0": [
            ("PolynomialLR", {"total_iters": 5, "power": 0.9}),
            ("ConstantLR", {"factor": 0.1}),
        ],
        "cosine": [
            ("CosineAnnealingLR", {"T_max": 30}),
            ("LinearLR", {"start_factor": 0.4, "end_factor": 0.9, "total_iters": 4}),
        ],
    },
    "sequential": {
        "two": [("ExponentialLR", {"gamma": 0.8}), ("StepLR", {"step_size": 4})],
        "three": [
            ("ConstantLR", {"factor": 0.1, "total_iters": 3}),
            ("ExponentialLR", {"gamma": 0.8}),
            ("StepLR", {"step_size": 2}),
        ],
        "warmup and cosine": [
            ("LinearLR", {"start_factor": 0.1, "total_iters": 4}),
            ("CosineAnnealingLR", {"T_max": 30, "eta_min": 0.01}),
        ],
        "warmup and restarts": [
            ("LinearLR", {"start_factor": 0.1, "total_iters": 4}),
            ("CosineAnnealingWarmRestarts", {"T_0": 3, "T_mult": 2}),
        ],
        "warmup, decay and polynomial": [
            ("LinearLR", {"start_factor": 0.1, "total_iters": 4}),
            ("MultiStepLR", {"milestones": [2]}),
            ("PolynomialLR", {"total_iters": 10}),
        ],
    },
}
COMBINATIONS = [(kind, name) for kind, rows in PARTS.items() for name in rows]


def combine_ours(optimizer, kind, parts, milestones):
    blocks = [getattr(schedules, name)(**params) for name, params in parts]
    if kind == "chained":
        return attach("ChainedScheduler", optimizer, schedulers=blocks)
    return attach("SequentialLR", optimizer, schedulers=blocks, milestones=milestones)


def combine_torchs(optimizer, kind, parts, milestones, build=build_torchs):
    built = [build(name, optimizer, **params) for name, params in parts]
    if kind == "chained":
        return OF_TORCH.ChainedScheduler(built, optimizer)
    return OF_TORCH.SequentialLR(optimizer, built, milestones=milestones)


def read_lrs(scheduler, steps=STEPS):
    lrs = []
    for _ in range(steps):
        lrs.append([float(group["lr"]) for group in scheduler.optimizer.param_groups])
        step(scheduler)
    return torch.tensor(lrs, dtype=torch.float64)


@pytest.mark.parametrize(("kind", "name"), COMBINATIONS)
def test_combination_values_equal_those_of_torch(kind, name):
    parts = PARTS[kind][name]
    milestones = [6 * index for index in range(1, len(parts))]
    theirs = read_lrs(combine_torchs(build_optimizer(), kind, parts, milestones))
    ours = combine_ours(build_optimizer(), kind, parts, milestones)
    torch.testing.assert_close(read_lrs(ours), theirs, rtol=1e-10, atol=1e-15)
    if kind == "sequential":  # torch's class runs our parts, too
        mixed = combine_torchs(build_optimizer(), kind, parts, milestones, attach)
        torch.testing.assert_close(read_lrs(mixed), theirs, rtol=1e-10, atol=1e-15)


@pytest.mark.filterwarnings("ignore:Detected call of:UserWarning")  # torch's sequence itself
def test_sequence_with_a_chain_in_it_equals_that_of_torch():
    # Torch starts a chain of some other classes one step late, ExponentialLR for example.
    chain, last = PARTS["chained"]["warmup and milestones"], ("ExponentialLR", {"gamma": 0.5})

    def build(name, optimizer, **params):
        if name == "chain":
            return combine_torchs(optimizer, "chained", chain, [])
        return build_torchs(name, optimizer, **params)

    theirs = combine_torchs(build_optimizer(), "sequential", [("chain", {}), last], [5], build)
    blocks = [
        schedules.ChainedScheduler(
            schedulers=[getattr(schedules, name)(**params) for name, params in chain]
        ),
        schedules.ExponentialLR(gamma=0.5),
    ]
    ours = attach("SequentialLR", build_optimizer(), schedulers=blocks, milestones=[5])
    torch.testing.assert_close(read_lrs(ours), read_lrs(theirs), rtol=1e-10, atol=1e-15)


METRICS = {
    "improving slowly": [10 - k * 0.0165 for k in range(STEPS)],
    "improving": [1.5 * 0.85**k for k in range(STEPS)],
    "growing": [1.5 * 1.025**k for k in range(STEPS)],
    "flat": [1.0] * 7 + [0.6] + [0.5] * (STEPS - 8),
    "negative": [-0.8] * 2 + [-0.234] * (STEPS - 2),
    "with NaN and infinity": [1.0, math.nan, 0.5, math.inf, 0.7, *[math.nan] * (STEPS - 5)],
}


@pytest.mark.parametrize("metrics", METRICS.values(), ids=METRICS)
@pytest.mark.parametrize("threshold", [("rel", 0.1), ("rel", 1e-4), ("abs", 0.1)])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_plateau_decisions_equal_those_of_torch(mode, threshold, metrics):
    """All combinations of the modes, thresholds and waits, on metrics of six shapes."""
    for patience, cooldown, min_lr in itertools.product([0, 5], [0, 5], [0.0, [0.04, 0.001]]):
        params = {"mode": mode, "patience": patience, "cooldown": cooldown, "min_lr": min_lr}
        params |= dict(zip(("threshold_mode", "threshold"), threshold, strict=True))
        pair = [
            attach("ReduceLROnPlateau", build_optimizer(), **params),
            OF_TORCH.ReduceLROnPlateau(build_optimizer(), **params),
        ]
        for metric in metrics:
            for scheduler in pair:
                step(scheduler, metric)
            ours, theirs = (
                [each.best, each.num_bad_epochs, each.cooldown_counter, each.in_cooldown]
                + [float(lr) for lr in each.get_last_lr()]
                for each in pair
            )
            assert ours == pytest.approx(theirs, rel=1e-12), params


def count_warnings(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return len(caught)


@pytest.mark.parametrize("start", ["from 0", "from a step", "from a saved state"])
@pytest.mark.parametrize("is_in_order", [True, False])
def test_step_in_either_order_warns_as_torch_does(start, is_in_order):
    def run(build, resume):
        scheduler = build(build_optimizer())
        if start != "from 0":
            for _ in range(3):
                step(scheduler)
            scheduler = resume(scheduler)
        if is_in_order:
            scheduler.optimizer.step()
        scheduler.step()
        scheduler.optimizer.step()
        scheduler.step()

    def resume_ours(scheduler):
        at = 3 if start == "from a step" else 0
        resumed = attach("StepLR", load(scheduler.optimizer), step_size=2, at=at)
        if start == "from a saved state":
            resumed.load_state_dict(scheduler.state_dict())
        return resumed

    def resume_torchs(scheduler):
        at = 2 if start == "from a step" else -1
        resumed = OF_TORCH.StepLR(load(scheduler.optimizer), step_size=2, last_epoch=at)
        if start == "from a saved state":
            resumed.load_state_dict(scheduler.state_dict())
        return resumed

    ours = count_warnings(lambda: run(lambda o: attach("StepLR", o, step_size=2), resume_ours))
    theirs = count_warnings(lambda: run(lambda o: OF_TORCH.StepLR(o, step_size=2), resume_torchs))
    assert ours == theirs == (0 if is_in_order or start == "from a saved state" else 1)


INVALID = [
    ("ConstantLR", {"factor": -0.5}),
    ("CosineAnnealingWarmRestarts", {"T_0": 0}),
    ("CosineAnnealingWarmRestarts", {"T_0": 1.5}),
    ("CosineAnnealingWarmRestarts", {"T_0": 2, "T_mult": 0}),
    ("CyclicLR", {"base_lr": [0.1], "max_lr": [0.2, 0.3]}),
    ("CyclicLR", {**CYCLE_LRS, "mode": "square"}),
    ("LambdaLR", {"lr_lambda": [halve]}),
    ("LinearLR", {"start_factor": -0.1}),
    ("LinearLR", {"end_factor": -0.1}),
    ("OneCycleLR", {"max_lr": [0.5, 0.9]}),
    ("OneCycleLR", {"max_lr": [0.5, 0.9], "total_steps": 0}),
    ("OneCycleLR", {"max_lr": [0.5, 0.9], "epochs": 5}),
    ("OneCycleLR", {"max_lr": [0.5, 0.9], "total_steps": 9, "pct_start": 1.1}),
    ("OneCycleLR", {"max_lr": [0.5, 0.9], "total_steps": 9, "anneal_strategy": "step"}),
    ("OneCycleLR", {"max_lr": [0.5], "total_steps": 9}),
    ("ReduceLROnPlateau", {"factor": 1.0}),
    ("ReduceLROnPlateau", {"mode": "least"}),
    ("ReduceLROnPlateau", {"threshold_mode": "both"}),
    ("ReduceLROnPlateau", {"min_lr": [0.1, 0.2, 0.3]}),
    (SWALR, {"swa_lr": 0.1, "anneal_strategy": "exponential"}),
    (SWALR, {"swa_lr": 0.1, "anneal_epochs": -1}),
]


@pytest.mark.parametrize(("name", "params"), INVALID)
def test_class_rejects_the_parameters_that_torch_rejects(name, params):
    with pytest.raises(ValueError):
        build_torchs(name, build_optimizer(), **params)
    with pytest.raises(ValueError):
        attach(name, build_optimizer(), **params)


def test_every_class_of_torch_is_compared_here():
    classes = {
        name
        for name, each in vars(OF_TORCH).items()
        if isinstance(each, type) and issubclass(each, OF_TORCH.LRScheduler)
    }
    compared = {*PARAMETERS, "ReduceLROnPlateau", "SequentialLR", "ChainedScheduler"}
    assert classes - compared == {"LRScheduler", "_LRScheduler"}
