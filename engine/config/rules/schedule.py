"""The schedule beside the optimizer, and parameters that come to nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from engine.config.rules.context import Rule, RuleContext
from engine.errors import Problem
from schedules import SCHEDULES
from schedules.core.fields import fields_of

__all__ = ["RULES"]

_PARAMS = "/scheduler/params"
_DEEPSPEEDS_PEAK = 0.001
_NEAR = 0.02  # of the run: so far apart two ends are one
_NEXT_TO_NOTHING = 0.01  # of the peak


def _params(context: RuleContext, *types: str) -> Mapping[str, Any] | None:
    block = context.section("scheduler")
    return block.get("params", {}) if block.get("type") in types else None


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _learning_rates(context: RuleContext) -> Iterator[Problem]:
    own = _number(context.section("optimizer").get("params", {}).get("lr"))
    if own is None:
        return
    place = "/optimizer/params/lr"
    warmup = _params(context, "WarmupLR", "WarmupDecayLR")
    if warmup is not None:
        peak = _number(warmup.get("warmup_max_lr"))
        if peak is not None and peak != own:
            message = f"the schedule's peak is `warmup_max_lr` {peak:g}: lr {own:g} is never used."
            yield context.note("lr-overruled", place, message)
        if (
            context.lacks(f"{_PARAMS}/warmup_max_lr")
            and context.section("scheduler").get("type") == "WarmupDecayLR"
            and own != _DEEPSPEEDS_PEAK
        ):
            message = (
                f"`warmup_max_lr` is absent: DeepSpeed takes {_DEEPSPEEDS_PEAK:g} for the peak, "
                f"whatever the optimizer's lr is ({own:g}); onecycle takes lr."
            )
            hint = f'Write "warmup_max_lr": {own:g}, which both understand.'
            yield context.warning("peak-by-default", _PARAMS, message, hint)


def _overruled(context: RuleContext) -> Iterator[Problem]:
    """Yield what the optimizer is given and the schedule drives by values of its own."""
    driven = context.driven
    if driven is None:
        return
    params = context.section("optimizer").get("params", {})
    own = _number(params.get("lr"))
    if own is not None and driven.ignores("lr"):
        low, high = driven.range_of("lr")
        if not low <= own <= high:
            message = f"the schedule goes from {low:g} to {high:g}: lr {own:g} is never used."
            yield context.note("lr-overruled", "/optimizer/params/lr", message)
    for name in ("betas", "momentum"):
        if name in params and "momentum" in driven.schedule.drives and driven.ignores("momentum"):
            low, high = driven.range_of("momentum")
            what = "betas[0]" if name == "betas" else name
            message = (
                f"the schedule drives {what} between {low:g} and {high:g}, whatever it is here."
            )
            hint = "DeepSpeed also sets betas[1] to 0.99; onecycle leaves it."
            place = f"/optimizer/params/{name}"
            yield context.note("betas-overruled", place, message, hint if name == "betas" else "")


def _ends(context: RuleContext) -> Iterator[Problem]:
    """Yield how the schedule's end lies to the run's, where the file tells of both."""
    driven = context.driven
    if driven is None or driven.horizon.scaled_steps is None or driven.end is None:
        return
    place, total, end = "/engine/max_duration", int(driven.horizon.scaled_steps), driven.end
    if abs(end - total) <= _NEAR * total:
        return
    curve = driven.curves["lr"][0]
    last, peak = curve(end), driven.range_of("lr")[1]
    if end > total and curve(total) != last:
        message = (
            f"the schedule ends at update {end:g}, but the run after {total:g}: the learning rate "
            f"is {curve(total):.3g} then, and not yet {last:.3g}."
        )
        hint = 'Write durations as shares of the run, as "1dur", or set `max_duration`.'
        yield context.warning("end-of-schedule", place, message, hint)
    elif end < total and last < peak:
        message = (
            f"the schedule ends at update {end:g} of {total:g}: the learning rate stays at "
            f"{last:.3g} from there on."
        )
        hint = 'Write durations as shares of the run, as "1dur", or set `max_duration`.'
        idle = last <= _NEXT_TO_NOTHING * peak
        say = context.warning if idle else context.note
        yield say("end-of-schedule", place, message, hint)


def _flat_warmup(context: RuleContext) -> Iterator[Problem]:
    warmup = _params(context, "WarmupLR", "WarmupDecayLR") or {}
    low, high = warmup.get("warmup_min_lr"), warmup.get("warmup_max_lr")
    if _number(low) is not None and low == high and warmup.get("warmup_num_steps") != 0:
        message = f"`warmup_min_lr` and `warmup_max_lr` are both {low:g}: nothing warms up."
        hint = 'Write "warmup_min_lr": 0 for a warmup, or choose a schedule without one.'
        yield context.warning("flat-warmup", f"{_PARAMS}/warmup_min_lr", message, hint)


def _log_warmup(context: RuleContext) -> Iterator[Problem]:
    warmup = _params(context, "WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
    if warmup is not None and context.lacks(f"{_PARAMS}/warmup_type"):
        message = "`warmup_type` is absent, so the warmup is logarithmic: half of it is over early."
        hint = 'Write "warmup_type": "linear" for a straight one; `plot --compare` shows both.'
        yield context.note("log-warmup", "/scheduler/type", message, hint)


def _stairs(context: RuleContext) -> Iterator[Problem]:
    cycle = _params(context, "OneCycle")
    if cycle is None:
        return
    first = cycle.get("cycle_first_step_size", _default("cycle_first_step_size"))
    for half, steps in (("first", first), ("second", cycle.get("cycle_second_step_size") or first)):
        key = f"cycle_{half}_stair_count"
        if cycle.get(key) and cycle[key] == steps:
            message = (
                f"`{key}` is as many as the half has updates: the stairs are too small to see."
            )
            yield context.note("inert-key", f"{_PARAMS}/{key}", message, "0 means the same.")


def _decay_interval(context: RuleContext) -> Iterator[Problem]:
    cycle = _params(context, "OneCycle") or {}
    interval = cycle.get("decay_step_size") or cycle.get("post_cycle_decay_step_size")
    rates = [key for key in ("decay_lr_rate", "decay_mom_rate") if cycle.get(key)]
    absent = context.lacks(f"{_PARAMS}/decay_step_size") or interval == 0
    if rates and not interval and absent:
        message = f"`{rates[0]}` decays nothing without `decay_step_size`, the interval of it."
        hint = f'Write "decay_step_size": {first_of(cycle)}, or remove `{rates[0]}`.'
        yield context.warning("decay-without-interval", f"{_PARAMS}/{rates[0]}", message, hint)
    elif interval and not rates and "decay_step_size" in cycle:
        message = "`decay_step_size` decays nothing without `decay_lr_rate` or `decay_mom_rate`."
        yield context.note("inert-key", f"{_PARAMS}/decay_step_size", message)


def _default(name: str) -> Any:
    return fields_of(SCHEDULES["OneCycle"])[name].default


def first_of(cycle: Mapping[str, Any]) -> str:
    """Return the length of a cycle's first half, as a config spells it."""
    return json.dumps(cycle.get("cycle_first_step_size", _default("cycle_first_step_size")))


def _report(context: RuleContext) -> Iterator[Problem]:
    kind = context.section("scheduler").get("type")
    wanted = context.section("engine").get("report")
    if wanted is not None and kind not in {"AutoWU", "LRRangeTest"}:
        message = "`engine.report` is read for AutoWU and LRRangeTest alone, which find things out."
        yield context.note("inert-key", "/engine/report", message)


RULES: tuple[Rule, ...] = (
    _learning_rates,
    _overruled,
    _ends,
    _flat_warmup,
    _log_warmup,
    _stairs,
    _decay_interval,
    _report,
)
