"""The schedule beside the optimizer, and parameters that come to nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from engine.config.problems import Problem
from engine.config.rules.checked import Checked, Rule

__all__ = ["RULES"]

_PARAMS = "/scheduler/params"
_DEEPSPEEDS_PEAK = 0.001


def _params(checked: Checked, *types: str) -> Mapping[str, Any] | None:
    block = checked.section("scheduler")
    return block.get("params", {}) if block.get("type") in types else None


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _learning_rates(checked: Checked) -> Iterator[Problem]:
    own = _number(checked.section("optimizer").get("params", {}).get("lr"))
    if own is None:
        return
    place = "/optimizer/params/lr"
    warmup = _params(checked, "WarmupLR", "WarmupDecayLR")
    if warmup is not None:
        peak = _number(warmup.get("warmup_max_lr"))
        if peak is not None and peak != own:
            message = f"the schedule's peak is `warmup_max_lr` {peak:g}: lr {own:g} is never used."
            yield checked.note("lr-overruled", place, message)
        if (
            checked.lacks(f"{_PARAMS}/warmup_max_lr")
            and checked.section("scheduler").get("type") == "WarmupDecayLR"
            and own != _DEEPSPEEDS_PEAK
        ):
            message = (
                f"`warmup_max_lr` is absent: DeepSpeed takes {_DEEPSPEEDS_PEAK:g} for the peak, "
                f"whatever the optimizer's lr is ({own:g}); onecycle takes lr."
            )
            hint = f'Write "warmup_max_lr": {own:g}, which both understand.'
            yield checked.warning("peak-by-default", _PARAMS, message, hint)
    cycle = _params(checked, "OneCycle")
    if cycle is not None:
        ends = [_number(cycle.get(key)) for key in ("cycle_min_lr", "cycle_max_lr")]
        low, high = ends
        if low is not None and high is not None and not low <= own <= high:
            message = f"the cycle goes from {low:g} to {high:g}: lr {own:g} is never used."
            yield checked.note("lr-overruled", place, message)


def _betas(checked: Checked) -> Iterator[Problem]:
    cycle = _params(checked, "OneCycle")
    betas = checked.section("optimizer").get("params", {}).get("betas")
    if cycle is None or betas is None or cycle.get("cycle_momentum") is False:
        return
    ends = [cycle.get("cycle_min_mom", 0.8), cycle.get("cycle_max_mom", 0.9)]
    message = f"the schedule cycles betas[0] between {ends[0]} and {ends[1]}, whatever it is here."
    hint = "DeepSpeed also sets betas[1] to 0.99; onecycle leaves it."
    yield checked.note("betas-overruled", "/optimizer/params/betas", message, hint)


def _flat_warmup(checked: Checked) -> Iterator[Problem]:
    warmup = _params(checked, "WarmupLR", "WarmupDecayLR") or {}
    low, high = warmup.get("warmup_min_lr"), warmup.get("warmup_max_lr")
    if _number(low) is not None and low == high and warmup.get("warmup_num_steps") != 0:
        message = f"`warmup_min_lr` and `warmup_max_lr` are both {low:g}: nothing warms up."
        hint = 'Write "warmup_min_lr": 0 for a warmup, or choose a schedule without one.'
        yield checked.warning("flat-warmup", f"{_PARAMS}/warmup_min_lr", message, hint)


def _log_warmup(checked: Checked) -> Iterator[Problem]:
    warmup = _params(checked, "WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
    if warmup is not None and checked.lacks(f"{_PARAMS}/warmup_type"):
        message = "`warmup_type` is absent, so the warmup is logarithmic: half of it is over early."
        hint = 'Write "warmup_type": "linear" for a straight one; `onecycle plot` shows both.'
        yield checked.note("log-warmup", "/scheduler/type", message, hint)


def _stairs(checked: Checked) -> Iterator[Problem]:
    cycle = _params(checked, "OneCycle") or {}
    first = cycle.get("cycle_first_step_size", 2000)
    for half, steps in (("first", first), ("second", cycle.get("cycle_second_step_size") or first)):
        key = f"cycle_{half}_stair_count"
        if cycle.get(key) and cycle[key] == steps:
            message = (
                f"`{key}` is as many as the half has updates: the stairs are too small to see."
            )
            yield checked.note("inert-key", f"{_PARAMS}/{key}", message, "0 means the same.")


def _decay_interval(checked: Checked) -> Iterator[Problem]:
    cycle = _params(checked, "OneCycle") or {}
    interval = cycle.get("decay_step_size") or cycle.get("post_cycle_decay_step_size")
    rates = [key for key in ("decay_lr_rate", "decay_mom_rate") if cycle.get(key)]
    absent = checked.lacks(f"{_PARAMS}/decay_step_size") or interval == 0
    if rates and not interval and absent:
        message = f"`{rates[0]}` decays nothing without `decay_step_size`, the interval of it."
        hint = f'Write "decay_step_size": {first_of(cycle)}, or remove `{rates[0]}`.'
        yield checked.warning("decay-without-interval", f"{_PARAMS}/{rates[0]}", message, hint)
    elif interval and not rates and "decay_step_size" in cycle:
        message = "`decay_step_size` decays nothing without `decay_lr_rate` or `decay_mom_rate`."
        yield checked.note("inert-key", f"{_PARAMS}/decay_step_size", message)


def first_of(cycle: Mapping[str, Any]) -> str:
    """Return the length of a cycle's first half, as a config spells it."""
    return json.dumps(cycle.get("cycle_first_step_size", 2000))


def _report(checked: Checked) -> Iterator[Problem]:
    kind = checked.section("scheduler").get("type")
    wanted = checked.section("engine").get("report")
    if wanted is not None and kind not in {"AutoWU", "LRRangeTest"}:
        message = "`engine.report` is read for AutoWU and LRRangeTest alone, which find things out."
        yield checked.note("inert-key", "/engine/report", message)


RULES: tuple[Rule, ...] = (
    _learning_rates,
    _betas,
    _flat_warmup,
    _log_warmup,
    _stairs,
    _decay_interval,
    _report,
)
