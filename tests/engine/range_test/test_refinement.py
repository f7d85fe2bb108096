"""Refinement by short cycles: it finds the best maximum from any start."""

import math

import numpy as np
import pytest

import schedules
from engine.range_test.recorder import Run
from engine.range_test.refinement import Refinement, build_short_cycle, refine


def make_train(best, noise=0.0, diverges_from=math.inf):
    """Return a fake training function whose final loss is lowest at the maximum ``best``."""
    random = np.random.default_rng(0)

    def train(max_lr, repeat):
        away = np.log2(max_lr / best)
        end = 0.5 + 0.05 * away**2 / (1 + 0.1 * abs(away)) + repeat * 0.1
        losses = np.linspace(3.0, end, 100) + noise * random.standard_normal(100)
        losses[-10:] = end + noise * random.standard_normal(10)
        if max_lr >= diverges_from:
            return Run(losses=[*losses[:20], math.nan, math.nan, math.nan], end="divergence")
        return Run(losses=losses.tolist(), end="steps")

    return train


@pytest.mark.parametrize("off", [1 / 30, 1 / 3, 0.8, 1, 1.3, 3, 30])
def test_refine_finds_best_maximum_from_any_start(off):
    found = refine(make_train(0.01), 0.01 * off, repeats=1, steps=100)
    assert found.lowest == pytest.approx(0.01, rel=0.05)
    maxima = list(found.losses)
    assert maxima == sorted(maxima)


def test_refine_repeats_average_noise_and_show_spread():
    found = refine(make_train(0.01, noise=0.05), 0.02, repeats=4, steps=100)
    assert found.lowest == pytest.approx(0.01, rel=0.25)
    assert len(found.lowest_per_repeat) == 4
    assert min(found.lowest_per_repeat) < found.lowest < max(found.lowest_per_repeat)


def test_refine_diverged_cycles_are_excluded_from_the_fit():
    found = refine(make_train(0.01, diverges_from=0.015), 0.02, repeats=2, steps=100)
    assert math.inf in found.losses[0.02]
    assert 0.005 <= found.lowest < 0.015


def test_refine_all_cycles_diverge_is_an_error():
    with pytest.raises(ValueError, match=r"diverged at every maximum .* 0\.0"):
        refine(make_train(0.01, diverges_from=0), 0.02, repeats=2, steps=100)


def test_refinement_lowest_is_within_tried_maxima():
    falling = {0.01 * 2**k: (1.0 - 0.01 * k,) for k in range(5)}
    found = Refinement(falling, initial_loss=3.0, steps=100)
    assert found.lowest <= 0.16
    assert Refinement({0.1: (1.0,), 0.2: (math.inf,)}, 3.0, 100).lowest == pytest.approx(0.1)


def test_refine_monotonic_losses_ends_the_search():
    runs = []

    def train(max_lr, repeat):
        runs.append(max_lr)
        return Run(losses=[3.0, 1.0 / max_lr], end="steps")

    found = refine(train, 1.0, repeats=1, steps=2)
    assert len(runs) < 12
    assert found.lowest == pytest.approx(max(runs))


def test_refinement_max_lr_decreases_for_longer_training_only():
    tried = {0.01 * 2**k: (1.0 + k**2,) for k in range(-2, 3)}

    def of(updates):
        return Refinement(tried, 9.0, steps=250, training_steps=updates).max_lr

    assert of(None) == of(250) == of(10) == 0.01
    assert of(2500) == 0.0048
    assert of(25_000) == 0.0023


@pytest.mark.parametrize("steps", [2, 3, 10, 251])
@pytest.mark.parametrize("halves", [(1, 10_000), (10_000, 1), (3, 7), ("1ep", "2ep")])
def test_short_cycle_is_valid_and_has_requested_length(steps, halves):
    params = dict(zip(("cycle_first_step_size", "cycle_second_step_size"), halves, strict=True))
    params |= {"cycle_first_stair_count": 1000, "cycle_max_mom": 0.95, "decay_lr_rate": 1.0}
    block = build_short_cycle({"type": "OneCycle", "params": params}, 0.5, steps)
    lrs = schedules.trace(schedules.from_config(block), steps + 1)["lr"]
    assert max(lrs) == 0.5
    assert (lrs[0], lrs[-1]) == (0.05, 0.05)
    assert block["params"]["cycle_max_mom"] == 0.95
