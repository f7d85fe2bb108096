"""Rules that check the schedule in a config.

For example, they report keys that have no effect, and a schedule that does not fit the optimizer or
the length of the run.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from engine.config.param_groups import find_group_schedulers
from engine.config.rules.context import Rule, RuleContext
from engine.config.schedule_context import (
    END_HINT,
    EvaluatedSchedule,
    find_end_mismatch,
)
from engine.errors import Problem
from schedules import SCHEDULES
from schedules.core.fields import read_fields

__all__ = ["RULES"]

_PARAMS = "/scheduler/params"
_DEEPSPEED_PEAK = 0.001
_TOKENS = re.compile(r"\d\s*tok\b", re.IGNORECASE)
_MAX_PIECES = 5000


def _get_params(context: RuleContext, *types: str) -> Mapping[str, Any] | None:
    block = context.get_section("scheduler")
    return block.get("params", {}) if block.get("type") in types else None


def _as_number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _check_warmup_peak(context: RuleContext) -> Iterator[Problem]:
    own = _as_number(context.get_section("optimizer").get("params", {}).get("lr"))
    if own is None:
        return
    pointer = "/optimizer/params/lr"
    warmup = _get_params(context, "WarmupLR", "WarmupDecayLR")
    if warmup is not None:
        peak = _as_number(warmup.get("warmup_max_lr"))
        if peak is not None and peak != own:
            message = (
                f"`lr` ({own:g}) is never used, because `warmup_max_lr` ({peak:g}) sets the peak."
            )
            hint = "Set both to the same value, or remove `warmup_max_lr` to use `lr` as the peak."
            yield context.note("unused-lr", pointer, message, hint)
        if (
            context.is_absent(f"{_PARAMS}/warmup_max_lr")
            and context.get_section("scheduler").get("type") == "WarmupDecayLR"
            and own != _DEEPSPEED_PEAK
        ):
            message = (
                "`warmup_max_lr` is not set. DeepSpeed uses a peak of "
                f"{_DEEPSPEED_PEAK:g}; onecycle uses the optimizer's lr ({own:g})."
            )
            hint = f'Set "warmup_max_lr": {own:g}, so that both use the same peak.'
            yield context.warning("peak-by-default", _PARAMS, message, hint)


def _check_overwritten(context: RuleContext) -> Iterator[Problem]:
    """Yield a note for each optimizer hyperparameter that the schedule overwrites.

    Do not report an ``lr`` within the range of the schedule's learning rates.
    """
    evaluated = context.example_schedule
    if evaluated is None:
        return
    params = context.get_section("optimizer").get("params", {})
    own = _as_number(params.get("lr"))
    if own is not None and evaluated.overwrites("lr"):
        low, high = evaluated.get_range("lr")
        if not low <= own <= high and own not in _list_bounds(evaluated):
            message = (
                f"`lr` ({own:g}) is never used, because the schedule sets learning rates from "
                f"{low:g} to {high:g}."
            )
            hint = "Remove the key, or change the learning rates of the schedule."
            yield context.note("unused-lr", "/optimizer/params/lr", message, hint)
    for name in ("betas", "momentum"):
        if (
            name in params
            and "momentum" in evaluated.schedule.hyperparameters
            and evaluated.overwrites("momentum")
        ):
            low, high = evaluated.get_range("momentum")
            what = "betas[0]" if name == "betas" else name
            message = f"The schedule overwrites `{what}` with values from {low:g} to {high:g}."
            hint = ""
            if name == "betas" and evaluated.schedule.type_name == "OneCycle":
                hint = "DeepSpeed also sets betas[1] to 0.99; onecycle does not change it."
            pointer = f"/optimizer/params/{name}"
            yield context.note("unused-betas", pointer, message, hint)


def _list_bounds(evaluated: EvaluatedSchedule) -> set[float]:
    """Return the learning rates at the start of each piece of the curve, even between two steps.

    For example, the peak of OneCycleLR is between two steps if ``pct_start * total_steps`` is not a
    whole number.
    """
    curve, bounds, step = evaluated.curves["lr"][0], set(), 0.0
    for _ in range(_MAX_PIECES):
        piece = curve.piece(step)
        bounds.add(piece.formula(piece.start))
        step = max(piece.end, math.nextafter(step, math.inf))
        if step > evaluated.schedule.span:
            break
    return bounds


def _check_end(context: RuleContext) -> Iterator[Problem]:
    """Yield a problem if the schedule is noticeably shorter or longer than the run.

    If the number of steps per epoch is unknown, yield a problem only if it does not depend on it.
    """
    horizons = context.possible_horizons
    if context.schedule is None:
        return
    try:
        found = find_end_mismatch(context.schedule, context.config, horizons)
    except ValueError:  # another check, or the start of the run, reports the error
        return
    if found is not None:
        message = found.describe(in_steps=len(horizons) == 1)
        report = context.warning if found.is_harmful else context.note
        yield report("end-of-schedule", "/engine/max_duration", message, END_HINT)


def _check_values(context: RuleContext) -> Iterator[Problem]:
    """Yield an error if the schedule does not fit the optimizer or sets a non-finite value."""
    error = context.find_incompatibility()
    if error is not None:
        yield context.error("schedule", _PARAMS, error)
        return
    evaluated = context.evaluated_schedule
    infinite = evaluated.find_infinite() if evaluated else None
    if infinite is not None:
        name, step, value = infinite
        message = f"The schedule sets `{name}` to {value} at step {step}. The value must be finite."
        hint = "Lower the learning rates and growth factors, or shorten the run."
        yield context.error("schedule", _PARAMS, message, hint)


def _check_jumps(context: RuleContext) -> Iterator[Problem]:
    """Yield a note for each jump in a hyperparameter between two phases of the schedule."""
    evaluated = context.evaluated_schedule
    for joint, before, after in evaluated.find_jumps() if evaluated else ():
        message = (
            f"The schedule's {joint.hyperparameter} jumps from {before:.3g} to {after:.3g} at step "
            f"{joint.step:g}, where the next phase starts."
        )
        yield context.note("jump", f"{_PARAMS}/{joint.field}", message, joint.fix)


def _check_flat_warmup(context: RuleContext) -> Iterator[Problem]:
    warmup = _get_params(context, "WarmupLR", "WarmupDecayLR") or {}
    low, high = warmup.get("warmup_min_lr"), warmup.get("warmup_max_lr")
    if _as_number(low) is not None and low == high and warmup.get("warmup_num_steps") != 0:
        message = f"`warmup_min_lr` and `warmup_max_lr` are both {low:g}, so there is no warmup."
        hint = 'Set "warmup_min_lr": 0, or choose a schedule without a warmup.'
        yield context.warning("flat-warmup", f"{_PARAMS}/warmup_min_lr", message, hint)


def _check_log_warmup(context: RuleContext) -> Iterator[Problem]:
    warmup = _get_params(context, "WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
    if warmup is not None and context.is_absent(f"{_PARAMS}/warmup_type"):
        message = (
            '`warmup_type` is not set. With the default, "log", the learning rate rises quickly at '
            "first."
        )
        hint = 'Set "warmup_type" to "linear" for a linear warmup, or to "log" to keep the default.'
        yield context.note("log-warmup", "/scheduler/type", message, hint)


def _check_stair_count(context: RuleContext) -> Iterator[Problem]:
    cycle = _get_params(context, "OneCycle")
    if cycle is None:
        return
    first = cycle.get("cycle_first_step_size", _get_onecycle_default("cycle_first_step_size"))
    for half, steps in (("first", first), ("second", cycle.get("cycle_second_step_size") or first)):
        key = f"cycle_{half}_stair_count"
        if cycle.get(key) and cycle[key] == steps:
            message = (
                f"`{key}` equals the number of steps in the {half} half, so the staircase is a "
                "continuous ramp."
            )
            hint = "Use fewer stairs, or 0 for a continuous ramp."
            yield context.note("no-effect", f"{_PARAMS}/{key}", message, hint)


def _check_decay_interval(context: RuleContext) -> Iterator[Problem]:
    cycle = _get_params(context, "OneCycle") or {}
    interval = cycle.get("decay_step_size") or cycle.get("post_cycle_decay_step_size")
    is_zero = cycle.get("decay_step_size") == 0
    rates = [key for key in ("decay_lr_rate", "decay_mom_rate") if cycle.get(key)]
    if rates and not interval and (is_zero or context.is_absent(f"{_PARAMS}/decay_step_size")):
        why = "is 0" if is_zero else "is not set"
        message = f"`{rates[0]}` has no effect, because `decay_step_size` {why}."
        hint = f'Set "decay_step_size": {_format_first_step_size(cycle)}, or remove `{rates[0]}`.'
        yield context.warning("decay-without-interval", f"{_PARAMS}/{rates[0]}", message, hint)
    elif interval and not rates and "decay_step_size" in cycle:
        message = "`decay_step_size` has no effect without `decay_lr_rate` or `decay_mom_rate`."
        hint = "Set one of the two rates, or remove `decay_step_size`."
        yield context.note("no-effect", f"{_PARAMS}/decay_step_size", message, hint)


def _get_onecycle_default(name: str) -> Any:
    return read_fields(SCHEDULES["OneCycle"])[name].default


def _format_first_step_size(cycle: Mapping[str, Any]) -> str:
    """Return ``cycle_first_step_size``, or its default if it is not set, as JSON text."""
    return json.dumps(
        cycle.get("cycle_first_step_size", _get_onecycle_default("cycle_first_step_size"))
    )


def _check_tokens(context: RuleContext) -> Iterator[Problem]:
    run = context.get_section("engine")
    blocks = [context.get_section("scheduler"), *find_group_schedulers(context.config)]
    if "tokens_per_sample" in run and not _TOKENS.search(f"{run.get('max_duration')} {blocks}"):
        message = "`engine.tokens_per_sample` has no effect, because no duration is in tokens."
        hint = 'Specify a duration in tokens, such as "1e9tok", or remove the key.'
        yield context.note("no-effect", "/engine/tokens_per_sample", message, hint)


RULES: tuple[Rule, ...] = (
    _check_warmup_peak,
    _check_overwritten,
    _check_end,
    _check_values,
    _check_jumps,
    _check_flat_warmup,
    _check_log_warmup,
    _check_stair_count,
    _check_decay_interval,
    _check_tokens,
)
