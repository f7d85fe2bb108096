"""Preview a config's schedule before launch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from engine.config import ConfigError, Problem, Source, load_document
from engine.config.named_code import find_named_code
from engine.config.param_groups import read_hyperparameters
from engine.config.parser import Document
from engine.config.pointers import dotted_name, join_pointer, split_pointer
from engine.config.rules import RuleContext
from engine.config.schedule_blocks import build_problems
from engine.config.schedule_context import (
    EvaluatedSchedule,
    build_base_values,
    build_horizon,
    get_train_batch_size,
)
from engine.config.validate import examine
from engine.config.wording import quote_value
from engine.display.auto_values import AutoValues, replace_auto_values
from schedules import Horizon, Schedule, ScheduleError
from schedules.core.controller import Base, Curves, Evidence
from schedules.core.curves import constant
from schedules.core.durations import DurationError, get_unit
from schedules.core.imports import imports_allowed
from schedules.core.trace import replay
from schedules.plots import name_columns

__all__ = ["Preview", "preview", "preview_document"]

_MAX_SYNTHETIC_STEPS = 100_000
_MAX_RUN_STEPS = 1_000_000
_OTHERS = "other parameters"
_EPOCHS_HINT = (
    "Use `--steps-per-epoch N`, where N is the number of samples divided by `train_batch_size`."
)


@dataclass(frozen=True)
class Preview:
    """A config's schedule, and the curves of the hyperparameters that the schedule sets."""

    name: str
    configured: Schedule[Any]
    """The schedule before its durations, such as "10ep", were scaled and converted to steps."""
    schedule: Schedule[Any]
    """The schedule after its durations were scaled and converted to steps."""
    curves: Curves
    horizon: Horizon
    base: Base
    groups: Sequence[str] = ()
    """The names of the param groups; empty if the config has no ``optimizer.param_groups``."""
    auto_values: Mapping[str, Any] = field(default_factory=dict)
    """Maps each optimizer or scheduler parameter that was "auto" to the value that replaced it."""

    @property
    def title(self) -> str:
        """The schedule's type, followed by "on a synthetic loss" if the schedule is loss-driven."""
        note = " on a synthetic loss" if self.schedule.feedback else ""
        return f"{self.schedule.type_name}{note}"

    def replay_losses(
        self, losses: Sequence[float]
    ) -> tuple[dict[str, list[float]], Evidence | None]:
        """Compute the values that a loss-driven schedule sets for recorded losses.

        Args:
            losses: recorded loss at each step.

        Returns:
            ``(values, evidence)``: the values of each hyperparameter at each step, and the losses
            and learning rates that led to the end of the warmup; ``evidence`` is None if the
            warmup did not end.

        Raises:
            ValueError: the schedule is not loss-driven.
        """
        if self.schedule.feedback is None:
            name = self.schedule.type_name
            raise ValueError(
                f"`--losses` requires a loss-driven schedule, such as AutoWU, but {name} is not "
                "loss-driven. To plot this schedule, remove the option."
            )
        done = replay(self.configured, losses, base=self.base, horizon=self.horizon)
        columns = {
            name: [row[name][0] for row in done.rows] for name in self.schedule.hyperparameters
        }
        return columns, done.evidence

    def check_length(self, steps: int) -> None:
        """Check that the values of the first ``steps`` steps are finite and quick to compute.

        Raises:
            ValueError: the schedule is a PyTorch scheduler and the number of steps is too large, or
                a value is not finite.
        """
        from schedules.families.custom import WrappedScheduler

        if isinstance(self.schedule, WrappedScheduler) and steps > _MAX_RUN_STEPS:
            raise ValueError(
                f"The PyTorch scheduler {self.schedule.type_name} can be plotted for at most "
                f"{_MAX_RUN_STEPS:,} steps, got {steps:,}. Set a smaller number of steps, for "
                "example `--steps 1000`."
            )
        # The config was checked for its own length, which can be unknown or smaller than `steps`.
        last = Horizon(max(1, steps - 1))  # `find_infinite` also checks the step after the run
        evaluated = EvaluatedSchedule(self.configured, self.schedule, last, self.base, self.curves)
        if infinite := evaluated.find_infinite():
            name, step, value = infinite
            raise ValueError(
                f"The schedule of {self.name} sets `{name}` to {value} at step {step}. The value "
                "must be finite. Lower the learning rates and growth factors, or set a smaller "
                "number of steps."
            )

    @property
    def span(self) -> int:
        """Default number of steps to plot: the run length or, if unknown, the schedule's `span`."""
        return int(self.horizon.scaled_steps or 0) or max(1, self.schedule.span)

    @property
    def num_steps(self) -> int:
        """Number of steps in the run; if unknown, the number of steps in the default plot.

        A plot that stops at the end of the schedule has one point more: it also shows the value
        after the last step.
        """
        is_past_end = self.span - 1 == self.schedule.length and not self.horizon.scaled_steps
        return self.span - 1 if is_past_end else self.span

    @property
    def columns(self) -> dict[str, Any]:
        """The curves, by column name; see `schedules.plots.name_columns`."""
        return name_columns(self.curves)

    def rows(self, steps: int) -> Iterator[tuple[float, ...]]:
        """Return an iterator with one row for each of the first ``steps`` steps.

        A row contains the step, followed by the value of each of the `columns`.
        """
        values = [curve.values(steps) for curve in self.columns.values()]
        return zip(range(steps), *values, strict=True)


def preview(
    config: Source,
    *,
    assignments: Sequence[str] = (),
    steps_per_epoch: int | None = None,
    allow_imports: bool = False,
    auto: AutoValues | None = None,
) -> Preview:
    """Validate the schedule of a config, and return a preview of it.

    Problems in sections that do not affect the schedule are ignored.

    Args:
        config: path of the config, or the config as a dict. Only ``scheduler`` is required.
        assignments: ``KEY=VALUE`` strings that override config values.
        steps_per_epoch: number of optimizer steps per epoch; required if the config has durations
            in epochs.
        allow_imports: whether to import the code that the config names, such as
            ``"my_module:MySchedule"``.
        auto: values to use instead of "auto" in the learning rate and the schedule. If None, "auto"
            in the schedule is an error.

    Raises:
        ConfigError: the file cannot be read or parsed; ``scheduler`` is missing; ``scheduler``,
            ``optimizer`` or ``engine`` is invalid; the schedule requires an import, but
            ``allow_imports`` is false; or the run is too long to simulate a loss-driven schedule.

    >>> warmup = {"type": "WarmupLR", "params": {"warmup_num_steps": 2, "warmup_type": "linear"}}
    >>> list(preview({"scheduler": warmup}).rows(3))
    [(0, 0.0), (1, 0.0005), (2, 0.001)]
    """
    from engine.config.overrides import apply_assignments

    document, _ = apply_assignments(load_document(config), assignments)
    return preview_document(
        document, steps_per_epoch=steps_per_epoch, allow_imports=allow_imports, auto=auto
    )


def preview_document(
    document: Document,
    *,
    world_size: int | None = None,
    steps_per_epoch: int | None = None,
    allow_imports: bool = False,
    auto: AutoValues | None = None,
    examined: tuple[Sequence[Problem], RuleContext | None] | None = None,
    epochs_hint: str = _EPOCHS_HINT,
) -> Preview:
    """Validate the schedule of a parsed config, and return a preview of it.

    Args:
        document: parsed config.
        world_size: number of ranks, from which the batch size is derived if the config does not
            set it.
        steps_per_epoch: see `preview`.
        allow_imports: see `preview`.
        auto: see `preview`.
        examined: result of `examine` for the document, to avoid a second validation. Omit this
            argument if the config contains "auto".
        epochs_hint: how to set the number of steps per epoch, for the error message.

    Raises:
        ConfigError: see `preview`.
    """
    replaced: Mapping[str, Any] = {}
    if auto is not None:
        document, replaced = replace_auto_values(document, auto)
    found, context = examined or examine(
        document,
        world_size,
        steps_per_epoch=steps_per_epoch,
        reject_auto=True,
        allow_imports=allow_imports,
    )
    problems = [problem for problem in found if _prevents_curve(problem)]
    if problems or context is None:
        raise ConfigError(document.name, problems)
    if context.schedule is None:
        for code in find_named_code(context.config.get("scheduler")):
            message = f"Previewing the schedule requires importing {quote_value(code.name)}."
            hint = "If you trust the config, pass --allow-imports to import and run the code."
            problems.append(document.build_problem("named-code", code.pointer, message, hint))
        if problems:
            raise ConfigError(document.name, problems)
        message = "The `scheduler` section is missing. Add it to preview a schedule."
        raise ConfigError(document.name, [Problem("missing-key", "error", "", 0, 0, message)])
    if steps_per_epoch is None and (problems := [*_find_epochs(context, epochs_hint)]):
        raise ConfigError(document.name, problems)
    try:
        horizon = build_horizon(
            context.get_section("engine"),
            samples_per_step=get_train_batch_size(context.config, context.data_ranks),
            steps_per_epoch=steps_per_epoch,
        )
        with imports_allowed(allow_imports):
            built = _build_preview(document.name, context, context.schedule, horizon)
            return replace(built, auto_values=replaced)
    except ConfigError:
        raise
    except ScheduleError as error:
        problems = build_problems(document, error, "/scheduler/params")
        raise ConfigError(document.name, problems) from None
    except ValueError as error:
        is_length = isinstance(error, DurationError)
        pointer = "/engine/max_duration" if is_length else "/scheduler/params"
        problem = document.build_problem("schedule", pointer, str(error))
        raise ConfigError(document.name, [problem]) from None


def _find_epochs(context: RuleContext, hint: str) -> Iterator[Problem]:
    """Yield an error for each setting that contains a duration in epochs.

    Only the first one has the hint.
    """
    durations = {"/engine/max_duration": context.get_section("engine").get("max_duration")}
    schedules = {"/scheduler": context.schedule}
    for group, own in context.group_schedules.items():
        schedules[f"/optimizer/param_groups/{group}/scheduler"] = own
    for pointer, schedule in schedules.items():
        for name in schedule.unresolved_fields if schedule is not None else ():
            durations[join_pointer(f"{pointer}/params", name)] = getattr(schedule, name)
    for pointer, value in durations.items():
        for epochs in itertools.islice(_list_epochs(value), 1):  # one problem per parameter
            name = f"`{dotted_name(pointer)}`"
            message = f"{name}: {quote_value(epochs)} requires the number of steps per epoch."
            yield context.document.build_problem("schedule", pointer, message, hint)
            hint = ""


def _list_epochs(value: Any) -> Iterator[str]:
    """Yield each duration in epochs in a value, which may be a list, a dict or a schedule."""
    if isinstance(value, Schedule):
        value = [getattr(value, name) for name in value.unresolved_fields]
    elif isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for each in value:
            yield from _list_epochs(each)
    elif get_unit(value) == "ep":
        yield value


def _build_preview(
    name: str, context: RuleContext, schedule: Schedule[Any], horizon: Horizon
) -> Preview:
    resolved = schedule.resolve(horizon)
    if schedule.feedback is not None and resolved.span > _MAX_SYNTHETIC_STEPS:
        raise ValueError(
            f"The loss-driven schedule {schedule.type_name} can be previewed for at most "
            f"{_MAX_SYNTHETIC_STEPS:,} steps, got {resolved.span:,}. To preview the schedule, "
            "shorten the run in a copy of the config."
        )
    base, curves, groups = _build_curves(context, schedule, horizon)
    return Preview(name, schedule, resolved, curves, horizon, base, groups)


def _build_curves(
    context: RuleContext, schedule: Schedule[Any], horizon: Horizon
) -> tuple[Base, Curves, tuple[str, ...]]:
    """Return the initial hyperparameters, the curves and the names of the param groups.

    The last group contains the parameters that no entry of ``optimizer.param_groups`` selects.
    """
    config = context.config
    entries = context.get_section("optimizer").get("param_groups", [])
    shared = build_base_values(config, schedule)
    if not entries or schedule.lists_per_group:
        return shared, schedule.build_curves(shared, horizon), ()
    names = [*(entry.get("name") or _get_first(entry["params"]) for entry in entries), _OTHERS]
    settings = [*(read_hyperparameters(entry) for entry in entries), {}]
    rows = [build_base_values(config, schedule, each) for each in settings]
    sharing = [index for index in range(len(rows)) if index not in context.group_schedules]
    try:
        of_shared = schedule.build_curves(_select(rows, sharing), horizon)
    except ValueError:
        if len(sharing) == 1:
            raise
        # The last group does not fit the schedule, but the model may have no such parameters.
        del sharing[-1], rows[-1], names[-1]
        of_shared = schedule.build_curves(_select(rows, sharing), horizon)
    of_groups = {
        group: {name: curves[position] for name, curves in of_shared.items()}
        for position, group in enumerate(sharing)
    }
    for group, own in context.group_schedules.items():
        try:
            of_own = own.build_curves(rows[group], horizon)
        except ScheduleError as error:
            pointer = f"/optimizer/param_groups/{group}/scheduler/params"
            problems = build_problems(context.document, error, pointer)
            raise ConfigError(context.document.name, problems) from None
        of_groups[group] = {name: curves[0] for name, curves in of_own.items()}
    curves = {
        name: tuple(
            of_groups[group].get(name) or constant(rows[group][name][0])
            for group in range(len(rows))
        )
        for name in dict.fromkeys(itertools.chain.from_iterable(of_groups.values()))
    }
    return _select(rows, range(len(rows))), curves, tuple(names)


def _select(rows: Sequence[Base], groups: Iterable[int]) -> Base:
    """Merge the initial hyperparameters of the selected param groups into one dict."""
    chosen = [rows[group] for group in groups]
    return {name: tuple(row[name][0] for row in chosen) for name in rows[0]}


def _get_first(patterns: str | Sequence[str]) -> str:
    return patterns if isinstance(patterns, str) else patterns[0]


def _prevents_curve(problem: Problem) -> bool:
    """Return whether a problem prevents the computation of the schedule's curves."""
    if problem.severity != "error" or problem.rule == "batch-sizes":
        return False
    section, *_ = [*split_pointer(problem.pointer), ""]
    if problem.rule == "unresolved-auto":
        return section == "scheduler"
    return section in {"", "optimizer", "scheduler", "engine"}
