"""Read golden cases, which are recorded values of other libraries, and compare ours with them."""

import json
import re
from pathlib import Path

import numpy as np

from schedules import Horizon, trace

FOLDER = Path(__file__).parent.parent / "golden"


def cases(family):
    """Return the golden cases of a family of schedules, as a dict from file name to case."""
    paths = sorted((FOLDER / family).glob("*.json"))
    assert paths
    return {path.stem: json.loads(path.read_text()) for path in paths}


def base_of(case):
    """Return the learning rates that the optimizer was built with, one per param group."""
    optimizer = case["optimizer"]
    groups = optimizer.get("n_param_groups", np.size(optimizer.get("lr", 0.1)))
    lr = np.broadcast_to(optimizer.get("lr", 0.1), groups).tolist()
    return {"lr": lr}


def horizon_of(case):
    """Return the horizon of a case that was run by Composer's trainer."""
    per_epoch, batch = case["dataloader_len"], case.get("batch_size")
    value, unit = re.fullmatch(r"([\d.]+)(\w+)", case["max_duration"]).groups()
    tokens = case.get("tokens_per_batch")
    lengths = {"ep": per_epoch, "ba": 1, "sp": 1 / (batch or 1), "tok": 1 / (tokens or 1)}
    steps = float(value) * lengths[unit]
    return Horizon(
        total_steps=steps,
        steps_per_epoch=per_epoch,
        samples_per_step=batch,
        scale_ratio=case["scale_schedule_ratio"],
        counts_samples=unit in ("sp", "tok"),
        tokens_per_sample=tokens and tokens / batch,
    )


def compare(case, block, *, at=None, name="lr", theirs=None, horizon=None, rows=slice(None)):
    """Assert that our value at step ``at[t]`` equals the recorded value at each step t of ``rows``.

    Args:
        case: golden case.
        block: scheduler block of our schedule.
        at: our step for each recorded step; the same by default.
        name: hyperparameter to compare.
        theirs: recorded values, if they are not ``case[name]``.
        horizon: length of the run.
        rows: recorded steps to compare.
    """
    at = np.arange(case["n_steps"]) if at is None else at
    ours = trace(block, int(at.max()) + 1, base=base_of(case), horizon=horizon)[name][at]
    theirs = np.array(case[name] if theirs is None else theirs, dtype=float)
    theirs = theirs.reshape(len(theirs), -1)
    assert len(theirs) == len(at)
    expected = np.broadcast_to(theirs, ours.shape)
    np.testing.assert_allclose(ours[rows], expected[rows], rtol=1e-9, atol=1e-15)
