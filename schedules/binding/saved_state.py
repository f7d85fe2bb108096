"""Identify a schedule and its initial hyperparameters, and compare them with a saved state."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from schedules.core.controller import DEFAULT_BASE, Base, OpenLoop
from schedules.core.durations import MAX_STEPS, Horizon
from schedules.core.fields import Range
from schedules.core.per_group import PRECISION, broadcast
from schedules.core.saved_state import OPTIONAL, StateMismatchError, describe, restore
from schedules.core.schedule import Schedule
from schedules.feedback.base import FeedbackController

__all__ = [
    "BaseValues",
    "build_identity",
    "check_origin",
    "check_state",
    "complete_base",
    "read_base",
    "read_state",
]

BaseValues = float | Sequence[float] | Mapping[str, float | Sequence[float]]
"""Initial hyperparameters. A number is the learning rate of all param groups, and a list contains
one learning rate per group. A dict maps the names of hyperparameters to numbers or lists."""

_NAMES = tuple(DEFAULT_BASE)


@dataclass(frozen=True)
class _SavedState:
    """Contents of the dict that `ScheduleBinder.state_dict` returns."""

    type: str
    params: dict[str, Any]
    step: Annotated[int, Range(at_least=-1, at_most=MAX_STEPS)]
    base: dict[str, tuple[Annotated[float, Range()], ...]]
    state: dict[str, Any] | None = field(default=None, metadata=OPTIONAL)
    is_written: bool = field(default=True, metadata=OPTIONAL)
    """Whether the param groups contained this schedule's values when the state was saved."""


def complete_base(base: BaseValues | None, groups: int) -> Base:
    """Convert ``base`` to a dict that maps each given hyperparameter to one value per param group.

    Raises:
        ValueError: a name is unknown, or a list does not have one number per param group.

    >>> complete_base(0.1, groups=2)
    {'lr': (0.1, 0.1)}
    """
    given = base if isinstance(base, Mapping) else {} if base is None else {"lr": base}
    unknown = [name for name in given if name not in _NAMES]
    if unknown:
        raise ValueError(
            f"`base` may contain only the keys {', '.join(_NAMES)}, but it contains "
            f"{unknown[0]!r}. Remove this key."
        )
    found = {}
    for name, value in given.items():
        # Tensors and the arrays and numbers of NumPy have the method `tolist`.
        plain = value.tolist() if hasattr(value, "tolist") else value
        numbers = plain if isinstance(plain, int | float) else tuple(map(float, plain))
        found[name] = broadcast(f"base[{name!r}]", numbers, (0.0,) * groups)
    return found


def build_identity(schedule: Schedule[Any], horizon: Horizon | None) -> dict[str, Any]:
    """Return a schedule's type and parameters as JSON values, with durations in steps."""
    horizon = horizon or Horizon()
    params: dict[str, Any] = {}
    if schedule.has_rate_per_step and horizon.scale_ratio != 1:
        params["scale_schedule_ratio"] = horizon.scale_ratio
        horizon = replace(horizon, scale_ratio=1.0)
    params |= schedule.resolve(horizon).params()
    return {"type": schedule.type_name, "params": _to_json(params)}


def _to_json(value: Any) -> Any:
    """Convert a value to JSON types.

    A tensor or an array becomes a list, and a function or a class becomes its import path. Any
    other object becomes the import path of its class.
    """
    if isinstance(value, Mapping):
        return {str(key): _to_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(each) for each in value]
    if value is None or isinstance(value, str | int | float):
        return value
    if hasattr(value, "tolist"):  # a tensor or an array
        return value.tolist()
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}:{named.__qualname__}"


def check_origin(state: Mapping[str, Any], type_name: str | None = None) -> None:
    """Check that a state was saved by a schedule of this package and is not damaged.

    Args:
        state: saved state.
        type_name: required type of the schedule that saved the state; None to accept any type.

    Raises:
        StateMismatchError: the state is from another library or another schedule.
        ValueError: the state is damaged.
    """
    if not {"type", "params", "step", "base"} <= state.keys():
        raise StateMismatchError(
            "The saved state must be from a onecycle schedule, got a state with these keys: "
            f"{', '.join(map(str, state)) or 'none'}. To continue without a saved state, set the "
            "argument `at` of `attach` to the current step."
        )
    if type_name not in (None, state["type"]):
        raise StateMismatchError(
            f"The saved state of {state['type']} does not contain the past losses or metrics that "
            f"{type_name} requires. Attach the schedule without loading this state."
        )
    fields = ("type", "params", "step", "base", "state", "is_written")
    restore(_SavedState, {name: state[name] for name in fields if name in state}, "lr_scheduler")


def check_state(
    state: Mapping[str, Any], identity: Mapping[str, Any], base: Base, compared: Iterable[str]
) -> None:
    """Check that a saved state is from the same schedule with the same initial hyperparameters.

    Args:
        state: saved state.
        identity: type and parameters of this schedule; see `build_identity`.
        base: initial hyperparameters of this schedule.
        compared: names of the hyperparameters whose initial values must be equal.

    Raises:
        StateMismatchError: the state is from another library or a different schedule, or has
            different initial hyperparameters or a different number of param groups.
        ValueError: the state is damaged.
    """
    check_origin(state)
    missing = [name for name in ("lr", *compared) if name not in state["base"]]
    if missing:
        raise ValueError(
            f"The saved state of the schedule is damaged: `lr_scheduler.base` must have the key "
            f"`{missing[0]}`."
        )
    saved_groups, groups = len(state["base"]["lr"]), len(base["lr"])
    if saved_groups == 0:
        raise ValueError("The saved state of the schedule is damaged: it has 0 param groups.")
    if saved_groups != groups:
        raise StateMismatchError(
            f"The saved state has {saved_groups} param groups, but the optimizer has {groups}. "
            "Build the optimizer with the same param groups, or add the missing groups with "
            "add_param_group() before loading the state."
        )
    changed = [*_compare_schedules(state, identity), *_compare_bases(state["base"], base, compared)]
    if changed:
        raise StateMismatchError(
            f"The schedule does not match the saved state: {'; '.join(changed)}. Change these "
            "values back, or call load_state_dict() with `override=True` to continue from the "
            "saved step with the current values."
        )


def _compare_schedules(state: Mapping[str, Any], identity: Mapping[str, Any]) -> Iterator[str]:
    now, saved = ({"type": each["type"], **each["params"]} for each in (identity, state))
    for name in dict.fromkeys([*saved, *now]):
        if saved.get(name) != now.get(name):
            yield (
                f"`{name}` is {_show(saved, name)} in the saved state but {_show(now, name)} now"
            )


def _show(params: Mapping[str, Any], name: str) -> str:
    return describe(params[name]) if name in params else "absent"


def _compare_bases(
    saved: Mapping[str, Sequence[float]], base: Base, compared: Iterable[str]
) -> Iterator[str]:
    for name in compared:
        pairs = zip(saved[name], base[name], strict=True)
        if not all(math.isclose(*pair, rel_tol=PRECISION) for pair in pairs):
            yield (
                f"the initial `{name}` of the param groups is {list(saved[name])} in the saved "
                f"state but {list(base[name])} now"
            )


def read_base(state: Mapping[str, Any]) -> Base:
    """Return the initial hyperparameters in a saved state."""
    return {name: tuple(values) for name, values in state["base"].items()}


def read_state(
    state_dict: Mapping[str, Any], schedule: Schedule[Any], base: Base, horizon: Horizon | None
) -> Any:
    """Return the saved state of a feedback schedule's controller.

    For a schedule without feedback, return None.

    Args:
        state_dict: state that `ScheduleBinder.state_dict` returned.
        schedule: schedule that will continue from the state.
        base: initial hyperparameters by name, with one value per param group.
        horizon: length of the run.

    Raises:
        ValueError: the state is damaged, or the schedule would set values that are not finite.
    """
    state, values = None, {}
    try:
        controller = schedule.bind(base, horizon)
        if isinstance(controller, FeedbackController):
            state = controller.from_json(state_dict["state"])
            values = dict(controller.values(state))
        elif isinstance(controller, OpenLoop):
            values = dict(controller.values(max(0, state_dict["step"])))
    except Exception as error:
        raise ValueError(f"The saved state of the schedule is damaged: {error}") from error
    if not all(math.isfinite(each) for group in values.values() for each in group):
        raise ValueError(
            "The saved state of the schedule is damaged: the schedule would set values that are "
            f"not finite ({values})."
        )
    return state
