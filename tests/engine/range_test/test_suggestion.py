"""What a range test suggests: near what was planted, and nothing where nothing was."""

import numpy as np
import pytest

from engine.range_test.recorder import Run
from engine.range_test.report import LRRangeReport
from engine.range_test.suggestion import MIN_POINTS, suggest
from tests.testing.planted_losses import FAMILIES, flat, plant


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.05, 0.1, 0.2])
def test_it_is_within_a_factor_three_of_what_was_planted(noise):
    random = np.random.default_rng(1)
    curves = [plant(family, noise, random) for family in FAMILIES for _ in range(40)]
    found = [suggest(curve.lrs, curve.losses) for curve in curves]
    for name, answers in (
        ("lowest", [suggestion.max_lr for suggestion in found]),
        ("steepest", [suggestion.rules.get("steepest") for suggestion in found]),
    ):
        right = [
            lr is not None and 1 / 3 < lr / getattr(curve, name) < 3
            for lr, curve in zip(answers, curves, strict=True)
        ]
        assert np.mean(right) >= 0.95, name


def test_the_minimum_of_a_flat_basin_is_its_middle():
    """Not its lowest point, which the noise chooses anew with every seed."""
    lrs = np.logspace(-6, 1, 200)
    depth = np.interp(np.log10(lrs), [-5, -3.5, -1.5, -0.5], [2.3, 0.8, 0.8, 4.0])
    found = []
    for seed in range(20):
        noise = 0.05 * np.random.default_rng(seed).standard_normal(lrs.size)
        found.append(np.log10(suggest(lrs, depth + noise).rules["minimum"]))
    assert np.mean(found) == pytest.approx(-2.5, abs=0.15)
    assert np.std(found) < 0.2


def test_a_learning_rate_is_judged_by_the_loss_of_the_next_update():
    """A loss is that of the parameters before its own update; in a short sweep that is a lot."""
    lrs = np.logspace(-3, -1, 61)
    came_of_it = 1 + (np.log10(lrs) + 2) ** 2
    run = Run(lrs.tolist(), [2.0, *came_of_it[:-1]], [None] * 61)
    rules = LRRangeReport((run,)).suggestion.rules
    assert rules["minimum"] == pytest.approx(0.01, rel=0.04)  # a step of the sweep is 8 %
    assert rules == pytest.approx(suggest(lrs[:-1], came_of_it[:-1]).rules)


@pytest.mark.parametrize("kind", ["noise", "rises", "not finite"])
def test_nothing_is_suggested_where_nothing_is_learnt(kind):
    random = np.random.default_rng(2)
    for _ in range(100):
        curve = flat(kind, random)
        suggestion = suggest(curve.lrs, curve.losses)
        assert suggestion.max_lr is None
        assert suggestion.reason


def test_neither_the_order_nor_the_spacing_matters():
    random = np.random.default_rng(3)
    curve = plant("explodes", 0.02, random, updates=2000)
    shuffled = random.permutation(2000)
    lr = suggest(curve.lrs, curve.losses).max_lr
    assert suggest(curve.lrs[shuffled], curve.losses[shuffled]).max_lr == lr
    every_third = suggest(curve.lrs[::3], curve.losses[::3]).max_lr
    assert every_third == pytest.approx(lr, rel=0.3)


def test_scaling_the_loss_changes_nothing():
    curve = plant("rises slowly", 0.05, np.random.default_rng(4))
    lr = suggest(curve.lrs, curve.losses).max_lr
    assert suggest(curve.lrs, 1e-6 * curve.losses - 3e-6).max_lr == pytest.approx(lr, rel=1e-6)


@pytest.mark.parametrize(
    "losses, reason",
    [
        ([1.0] * 5, f"at least {MIN_POINTS} losses are required, got 5"),
        ([float("nan")] * 100, f"at least {MIN_POINTS} finite losses are required, got 0"),
        ([2.5] * 100, "the loss does not fall: it is 2.5 at every learning rate"),
        (list(np.linspace(3, 1, 100)), "the loss still falls at the largest learning rate"),
    ],
)
def test_the_reason_says_what_is_wrong(losses, reason):
    suggestion = suggest(np.geomspace(1e-6, 1, len(losses)), losses)
    assert suggestion.max_lr is None
    assert suggestion.reason.startswith(reason)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="`losses` must have one value .* got 2 for 3"):
        suggest([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="`lrs` must be positive, got 0.0"):
        suggest([0, 1, 2], [1, 2, 3])
