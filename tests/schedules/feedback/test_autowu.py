"""AutoWU: comparison with the published code on recorded losses, robustness, and resume."""

import gzip
import json
import math

import numpy as np
import pytest
import torch
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel

import schedules
from schedules import Horizon, trace
from schedules.feedback.gaussian_process import (
    LENGTH_SCALE,
    Hyperparameters,
    Posterior,
    compute_statistics,
    features,
)
from schedules.feedback.minimum_tests import _certainty, run_robust_test
from tests.testing.golden import FOLDER, cases

pytestmark = pytest.mark.filterwarnings("ignore:AutoWU's warmup")

RECORDED = FOLDER / "autowu_recorded"
UNIT = json.loads((RECORDED / "unit.json").read_text())
SEQUENCES = json.loads((RECORDED / "lr_sequences.json").read_text())
GRID = np.linspace(0, 1, 500)


def recorded(name):
    with gzip.open(RECORDED / f"{name}.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


CURVES = recorded("synthetic") + recorded("fashion")


def optimizer(lr=0.1, groups=1):
    return torch.optim.SGD(
        [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr * 2**i} for i in range(groups)],
        lr=lr,
    )


def attach_autowu(**params):
    return schedules.attach("AutoWU", optimizer(), **params)


def find_decision(curve, **params):
    """Return the decision of a run on a recorded warmup."""
    scheduler = attach_autowu(
        steps_per_epoch=curve["steps_per_epoch"],
        total_epochs=curve["total_epochs"],
        immediate_cooldown=True,
        **params,
    )
    for loss in curve["losses"]:
        scheduler.step(float(loss))
        if scheduler.decision is not None:
            break
    else:
        scheduler.step(1.0)
    return scheduler.decision


@pytest.mark.parametrize("case", UNIT["cases"], ids=lambda case: case["n"])
def test_gaussian_process_matches_the_published_code(case):
    data = compute_statistics(np.array(case["x"]), np.array(case["y"]))
    start = Hyperparameters.initial().with_mean(float(np.mean(case["y"])))
    assert start.loss(data) == pytest.approx(case["init"]["nll_per_datum"], abs=1e-9)
    slopes = case["init"]["grad_raw"]
    names = ("likelihood.noise_covar.raw_noise", "mean_module.raw_constant")
    names += ("base_covar_module.raw_outputscale",)
    assert start.gradient(data) == pytest.approx([slopes[name] for name in names], abs=1e-9)
    fit, after = start.fit(data), case["after_100_adam"]
    theirs = (after["noise"], after["mean"], after["outputscale"])
    assert (fit.noise, fit.mean, fit.scale) == pytest.approx(theirs, abs=1e-9)
    posterior, expected = Posterior.from_statistics(data, fit, features(GRID)), case["posterior"]
    grid = expected["grid_idx"]
    np.testing.assert_allclose(posterior.mean[grid], expected["mean"], atol=1e-9)
    np.testing.assert_allclose(posterior.variance[grid], expected["var"], atol=1e-9)
    assert posterior.mean.argmin() == expected["argmin_idx"]
    assert _certainty(posterior, -1, 1e-4) == pytest.approx(case["past_minimum_prob"], abs=1e-9)


def test_posterior_matches_scikit_learn():
    random = np.random.default_rng(0)
    x, y = np.sort(random.uniform(0, 1, 80)), random.normal(0, 1, 80)
    by = Hyperparameters.initial(noise=0.05, scale=0.7)
    posterior = Posterior.from_statistics(compute_statistics(x, y), by, features(GRID))
    kernel = ConstantKernel(by.scale, "fixed") * RBF(LENGTH_SCALE, "fixed")
    peer = GaussianProcessRegressor(kernel, alpha=by.noise, optimizer=None).fit(x[:, None], y)
    mean, covariance = peer.predict(GRID[:, None], return_cov=True)
    np.testing.assert_allclose(posterior.mean, mean, atol=1e-8)
    np.testing.assert_allclose(posterior.root @ posterior.root.T, covariance, atol=1e-8)


@pytest.mark.parametrize("name", cases("autowu"))
def test_autowu_golden_case_matches_the_published_code(name):
    """The published code uses float32 losses, so its values after the warmup are float32 too."""
    case = cases("autowu")[name]
    block = {"type": "AutoWU", "params": case["params"]}
    ours = trace(block, case["n_steps"], losses=case["loss"])["lr"][:, 0]
    np.testing.assert_allclose(ours, case["lr"], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("case", SEQUENCES, ids=lambda case: case["tag"])
def test_autowu_recorded_run_matches_the_published_lrs(case):
    steps = case["steps_per_epoch"] * case["total_epochs"]
    losses = [float(loss) for loss in case["losses"]]
    losses += [float(case["later_losses_constant"])] * (steps - len(losses))
    params = {name: case[name] for name in ("steps_per_epoch", "total_epochs")} | case["kwargs"]
    ours = trace({"type": "AutoWU", "params": params}, steps, losses=losses)["lr"][:, 0]
    np.testing.assert_allclose(ours, case["lr_used_for_step"], rtol=1e-6, atol=1e-12)


def check_published_decision(curve):
    decision = find_decision(curve)
    assert decision.step == curve["trans_step"], curve["id"]
    assert ("passed" in decision.reason) == (curve["how"] == "test"), curve["id"]
    assert decision.lr == pytest.approx(curve["peak_lr"], rel=0.025), curve["id"]


def test_reference_decision_on_some_curves_matches_the_published_code():
    for curve in CURVES[::12]:
        check_published_decision(curve)


@pytest.mark.slow
def test_reference_decision_on_all_curves_matches_the_published_code():
    for curve in CURVES:
        check_published_decision(curve)


def test_robust_test_finds_more_minima_than_the_published_test():
    """It must find none on monotone losses."""
    known = [curve for curve in CURVES if curve.get("u_star") and curve["total_epochs"] == 20]
    found, off = 0, []
    for curve in known[::2]:
        decision = find_decision(curve, test="robust")
        if "passed" in decision.reason:
            found += 1
            off.append(abs(math.log10(decision.lr) - curve["u_star"]))
    theirs = sum(curve["how"] == "test" for curve in known[::2])
    assert found > theirs
    assert np.median(off) < 0.15
    monotone = [curve for curve in CURVES if curve.get("kind") == "mono"]
    assert all("passed" not in find_decision(curve, test="robust").reason for curve in monotone)


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_robust_test_scaled_losses_give_the_same_result(scale):
    losses = np.array([float(loss) for loss in CURVES[0]["losses"]])
    found, scaled = run_robust_test(losses), run_robust_test(scale * losses - 3)
    assert scaled == pytest.approx(found, abs=1e-6)


@pytest.mark.parametrize("test", ["reference", "robust"])
@pytest.mark.parametrize(
    "losses",
    [
        [math.nan] * 400,
        [math.inf] * 400,
        [1e30] * 400,
        [1.0] * 400,
        [math.nan, *[1.0] * 399],
        [1.0] * 100 + [math.nan] * 300,
    ],
    ids=["nan", "inf", "huge", "constant", "nan first", "nan at the end"],
)
def test_autowu_extreme_losses_keep_the_lr_finite(test, losses):
    scheduler = attach_autowu(steps_per_epoch=20, total_epochs=20, test=test)
    for loss in losses:
        scheduler.step(loss)
        assert math.isfinite(scheduler.get_last_lr()[0])
    assert scheduler.decision is not None


@pytest.mark.parametrize("params", [{}, {"test": "robust"}, {"decay_phase_stat": "loss"}])
@pytest.mark.parametrize("cut", [37, 250, 380])
def test_autowu_resumed_has_the_same_lrs_as_uninterrupted(params, cut):
    run = {"steps_per_epoch": 20, "total_epochs": 20, "decay_phase_factor": 0.7, **params}
    random = np.random.default_rng(1)

    def train(scheduler, steps):
        rows = []
        for _ in range(steps):
            lr = scheduler.get_last_lr()[0]
            rows.append(lr)
            scheduler.step(1 + 0.3 * math.log10(lr / 0.01 + 1e-9) ** 2 + random.normal(0, 0.02))
        return rows

    whole = train(attach_autowu(**run), 400)
    random = np.random.default_rng(1)
    first = attach_autowu(**run)
    before = train(first, cut)
    state = json.loads(json.dumps(first.state_dict()))
    resumed = attach_autowu(**run)
    resumed.load_state_dict(state)
    assert before + train(resumed, 400 - cut) == whole


def test_controller_update_does_not_change_earlier_states():
    rule = schedules.AutoWU(steps_per_epoch=5, total_epochs=20).bind({"lr": (0.1,)})
    states = [rule.init()]
    for step in range(40):
        states.append(rule.update(states[-1], -float(step)))
    assert [len(state.losses) for state in states[:20]] == list(range(20))
    branch = rule.update(states[3], 99.0)
    assert list(branch.losses) == [0.0, -1.0, -2.0, 99.0]
    assert list(states[4].losses) == [0.0, -1.0, -2.0, -3.0]


def test_autowu_two_groups_keep_the_ratio_of_lrs():
    two_groups = optimizer(groups=2)
    scheduler = schedules.attach("AutoWU", two_groups, steps_per_epoch=5, total_epochs=20)
    for _ in range(60):
        scheduler.step(1.0)
        first, second = scheduler.get_last_lr()
        assert second == pytest.approx(2 * first)


@pytest.mark.parametrize(
    "params, message",
    [
        ({"cooldown_fraction": 0}, "`cooldown_fraction` must be"),
        ({"cooldown_fraction": 1.5}, "`cooldown_fraction` must be"),
        ({"min_lr": 1.0, "max_lr": 0.1}, "`min_lr` must be less than `max_lr`"),
        ({"steps_per_epoch": None}, "`steps_per_epoch` must be set"),
        ({"total_epochs": None}, "`total_epochs` must be set"),
        ({"warmup_unit": "batch"}, "`warmup_unit` must be one of"),
    ],
)
def test_autowu_invalid_parameter_is_rejected(params, message):
    with pytest.raises(schedules.ScheduleError, match=message):
        attach_autowu(**{"steps_per_epoch": 20, "total_epochs": 20} | params)


def test_autowu_step_accepts_only_a_scalar_loss():
    scheduler = attach_autowu(steps_per_epoch=20, total_epochs=20)
    with pytest.raises(ValueError, match="requires the loss"):
        scheduler.step()
    with pytest.raises(ValueError, match="must be a single number, got a tensor of shape"):
        scheduler.step(torch.ones(3))
    loss = (torch.ones(1, requires_grad=True) * 2).sum()
    scheduler.step(loss)
    assert scheduler.last_epoch == 1


@pytest.mark.parametrize(
    "params, message",
    [
        ({"total_epochs": 6}, "its test of the loss cannot end it"),
        ({"total_epochs": 6, "test": "robust"}, "rarely confident"),
    ],
)
def test_autowu_short_run_warns(params, message):
    with pytest.warns(UserWarning, match=message):
        attach_autowu(steps_per_epoch=20, **params)


@pytest.mark.parametrize(("test", "unit"), [("reference", 1.0), ("robust", 1.0), ("robust", 1e3)])
def test_evidence_band_contains_the_true_loss(test, unit):
    """The band must be on the scale of the loss, also for the robust test, which rescales it."""
    random = np.random.default_rng(0)
    scheduler = attach_autowu(steps_per_epoch=10, total_epochs=60, test=test)
    step = 0
    while scheduler.evidence is None:
        truth = 1 + 4 * (step / 300 - 0.5) ** 2
        scheduler.step(unit * (truth + 0.02 * random.standard_normal()))
        step += 1
    band, count = scheduler.evidence.band, len(scheduler.evidence.losses)
    truth = unit * (1 + 4 * (np.array(band.positions) * count / 300 - 0.5) ** 2)
    mean, low, high = (np.array(line) for line in band[1:])
    assert ((low <= truth) & (truth <= high))[5:-5].mean() > 0.85
    assert np.abs(mean - truth).max() < 0.05 * unit
    assert (high - low).max() < 0.3 * unit


def test_autowu_scaled_to_more_steps_than_a_float_holds_is_an_error():
    schedule = schedules.AutoWU(steps_per_epoch=10, total_epochs=20)
    with pytest.raises(schedules.ScheduleError, match=r"`total_epochs`, scaled by 1e\+308, must"):
        schedule.resolve(Horizon(scale_ratio=1e308))


def test_autowu_keeps_a_group_with_lr_0_at_0_and_the_ratios_of_the_others():
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in (0.0, 0.2, 0.1)]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    scheduler = schedules.attach("AutoWU", optimizer, steps_per_epoch=5, total_epochs=10)
    for _ in range(3):
        optimizer.step()
        scheduler.step(loss=1.0)
    first, second, third = scheduler.get_last_lr()
    assert (first, third) == (0.0, second / 2)
    assert second > 1e-5


def test_autowu_without_a_warmup_starts_at_max_lr_and_warns_that_no_test_can_run():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    params = {"steps_per_epoch": 5, "total_epochs": 10, "max_warmup_fraction": 0, "max_lr": 0.5}
    with pytest.warns(UserWarning, match=r"at most 0 steps .* will end at lr 0\.5"):
        binder = schedules.attach("AutoWU", optimizer, **params)
    assert binder.get_last_lr() == [0.5]
