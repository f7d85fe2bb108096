"""Suggestions for synthetic curves with a known best learning rate, and for flat curves."""

import numpy as np
import pytest

from engine.range_test.recorder import Run
from engine.range_test.report import LRRangeReport
from engine.range_test.suggestion import MIN_POINTS, suggest
from tests.testing.planted_losses import FAMILIES, flat, plant


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.05, 0.1, 0.2])
def test_suggest_is_within_a_factor_of_three_of_the_true_value(noise):
    random = np.random.default_rng(1)
    curves = [plant(family, noise, random) for family in FAMILIES for _ in range(40)]
    found = [suggest(curve.lrs, curve.losses) for curve in curves]
    for name, answers in (
        ("lowest", [suggestion.max_lr for suggestion in found]),
        ("steepest", [suggestion.rules.get("steepest") for suggestion in found]),
    ):
        close = [
            lr is not None and 1 / 3 < lr / getattr(curve, name) < 3
            for lr, curve in zip(answers, curves, strict=True)
        ]
        assert np.mean(close) >= 0.95, name


def test_suggest_minimum_of_flat_basin_is_its_middle():
    """The lowest point depends on the noise and differs between seeds."""
    lrs = np.logspace(-6, 1, 200)
    depth = np.interp(np.log10(lrs), [-5, -3.5, -1.5, -0.5], [2.3, 0.8, 0.8, 4.0])
    found = []
    for seed in range(20):
        noise = 0.05 * np.random.default_rng(seed).standard_normal(lrs.size)
        found.append(np.log10(suggest(lrs, depth + noise).rules["minimum"]))
    assert np.mean(found) == pytest.approx(-2.5, abs=0.15)
    assert np.std(found) < 0.2


def test_report_pairs_each_lr_with_loss_of_next_step():
    """Each loss is measured before its own step, so a step's effect shows in the next loss."""
    lrs = np.logspace(-3, -1, 61)
    resulting_losses = 1 + (np.log10(lrs) + 2) ** 2
    run = Run(lrs.tolist(), [2.0, *resulting_losses[:-1]], [None] * 61)
    rules = LRRangeReport((run,)).suggestion.rules
    assert rules["minimum"] == pytest.approx(
        0.01, rel=0.04
    )  # each step multiplies the learning rate by 1.08
    assert rules == pytest.approx(suggest(lrs[:-1], resulting_losses[:-1]).rules)


@pytest.mark.parametrize("kind", ["noise", "rises", "not finite"])
def test_suggest_without_learning_gives_no_suggestion(kind):
    random = np.random.default_rng(2)
    for _ in range(100):
        curve = flat(kind, random)
        suggestion = suggest(curve.lrs, curve.losses)
        assert suggestion.max_lr is None
        assert suggestion.reason


def test_suggest_is_independent_of_order_and_spacing():
    random = np.random.default_rng(3)
    curve = plant("explodes", 0.02, random, updates=2000)
    shuffled = random.permutation(2000)
    lr = suggest(curve.lrs, curve.losses).max_lr
    assert suggest(curve.lrs[shuffled], curve.losses[shuffled]).max_lr == lr
    every_third = suggest(curve.lrs[::3], curve.losses[::3]).max_lr
    assert every_third == pytest.approx(lr, rel=0.3)


def test_suggest_is_independent_of_loss_scale_and_offset():
    curve = plant("rises slowly", 0.05, np.random.default_rng(4))
    lr = suggest(curve.lrs, curve.losses).max_lr
    assert suggest(curve.lrs, 1e-6 * curve.losses - 3e-6).max_lr == pytest.approx(lr, rel=1e-6)


@pytest.mark.parametrize(
    "losses, reason",
    [
        ([1.0] * 5, f"at least {MIN_POINTS} losses are required, got 5"),
        ([float("nan")] * 100, f"at least {MIN_POINTS} finite losses are required, got 0"),
        ([2.5] * 100, "the loss does not fall: it is 2.5 at every learning rate"),
        ([1.0] * 50 + list(np.linspace(1 - 1e-12, 1.05, 50)), "the loss does not fall"),
        (list(2 + 0.1 * np.random.default_rng(0).normal(size=100)), "the loss falls by 0."),
        (list(np.linspace(3, 1, 100)), "the loss still falls at the largest learning rate"),
    ],
)
def test_suggest_unusable_curve_gives_a_reason(losses, reason):
    suggestion = suggest(np.geomspace(1e-6, 1, len(losses)), losses)
    assert suggestion.max_lr is None
    assert suggestion.reason.startswith(reason)


def test_suggest_invalid_arguments_are_rejected():
    with pytest.raises(ValueError, match=r"same length, got shapes \(3,\) and \(2,\)"):
        suggest([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="`lrs` must be positive, got 0.0"):
        suggest([0, 1, 2], [1, 2, 3])
