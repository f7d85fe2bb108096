"""Input of the validation rules: the valid values of a config, and values derived from them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from engine.config.backend_choice import BackendChoice, choose_backend, zero_stage
from engine.config.batch_sizes import DataRanks
from engine.config.named_code import find_named_code
from engine.config.parser import Document
from engine.config.pointers import is_within, split_pointer
from engine.config.schedule_context import (
    EvaluatedSchedule,
    build_base_values,
    evaluate_schedule,
    list_possible_horizons,
)
from engine.config.schema import Member
from engine.config.structure import Structure
from engine.errors import Problem
from schedules import SCHEDULES, Horizon, Schedule, ScheduleError
from schedules.core.controller import Base
from schedules.core.durations import DurationError

__all__ = ["Rule", "RuleContext"]


@dataclass(frozen=True)
class RuleContext:
    """Input of the rules: the individually valid values of a config, and values derived from them.

    ``world_size`` is None if the number of ranks is unknown.
    """

    document: Document
    structure: Structure
    world_size: int | None
    needs_deepspeed: str | None = None
    """Model feature or `initialize` argument that requires DeepSpeed; None if there is none."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The config without invalid values and without "auto" values."""
        return self.structure.config

    @property
    def members(self) -> Sequence[Member]:
        """The keys of the config, each with its value and JSON schema."""
        return self.structure.members

    @property
    def unresolved(self) -> Collection[str]:
        """JSON pointers to invalid values, "auto" values, and keys that are probably misspelled.

        For a misspelled key, both the key in the config and the intended key are included.
        """
        return self.structure.unresolved

    @property
    def schedule(self) -> Schedule[Any] | None:
        """The config's schedule, or None if it is absent or cannot be constructed."""
        return self.structure.schedule

    @property
    def group_schedules(self) -> Mapping[int, Schedule[Any]]:
        """The param groups' own schedules, by index in the config's ``optimizer.param_groups``."""
        return self.structure.group_schedules

    @property
    def data_ranks(self) -> DataRanks | None:
        """The number of data-parallel ranks, or None if the world size is unknown."""
        return self.structure.data_ranks

    @cached_property
    def backend(self) -> BackendChoice:
        """The chosen backend and the reason for the choice."""
        return choose_backend(self.config, self.members, self.needs_deepspeed)

    @cached_property
    def stage(self) -> int | None:
        """The ZeRO stage, or None if it is invalid or "auto"."""
        unknown = is_within("/zero_optimization/stage", self.unresolved)
        return None if unknown else int(zero_stage(self.config))

    @property
    def is_run_resolved(self) -> bool:
        """Whether the settings that determine the schedule's curves are all valid and not "auto".

        These are the settings of the optimizer, the schedule and the run length.
        """
        sections = ("/scheduler", "/optimizer", "/engine", "/train_batch_size")
        return not any(each.startswith(sections) for each in self.unresolved)

    def find_incompatibility(self) -> str | None:
        """Return the reason why the schedule cannot run with the config's optimizer.

        Return None if the schedule can run, or if this cannot be determined before launch.
        """
        schedule, config = self.schedule, self.config
        if schedule is None or not self.is_run_resolved:
            return None
        return self.find_schedule_error(
            schedule, build_base_values(config, schedule), config.get("scheduler")
        )

    def find_schedule_error(self, schedule: Schedule[Any], base: Base, block: Any) -> str | None:
        """Return the reason why a schedule cannot run with the given initial hyperparameters.

        Return None if the schedule can run. Also return None for schedules that are not checked:
        schedules that depend on the loss or a metric, and schedules whose block names custom code.

        Args:
            schedule: schedule to check.
            base: initial hyperparameters of the param groups.
            block: config block of the schedule.
        """
        error = None
        if schedule.feedback is not None or any(find_named_code(block)):
            return None
        known = (self.data_ranks, self.structure.steps_per_epoch)
        for horizon in list_possible_horizons(schedule, self.config, *known):
            try:
                schedule.build_curves(base, horizon)
            except ScheduleError:  # reported with the schedule's parameters
                return None
            except ValueError as incompatible:
                error = str(incompatible)
            else:
                return None
        return error

    @cached_property
    def evaluated_schedule(self) -> EvaluatedSchedule | None:
        """The schedule with its curves, or None if the curves cannot be computed before launch."""
        return self.example_schedule if len(self.possible_horizons) == 1 else None

    @cached_property
    def example_schedule(self) -> EvaluatedSchedule | None:
        """The schedule with its curves for one of the possible horizons.

        Use it only for checks that do not depend on the number of steps per epoch.
        """
        if self.schedule is None or not self.possible_horizons:
            return None
        try:
            return evaluate_schedule(self.schedule, self.config, self.possible_horizons[0])
        except ValueError:  # another check, or the start of the run, reports the error
            return None

    @cached_property
    def possible_horizons(self) -> Sequence[Horizon]:
        """The horizons for which the schedule's curves can be computed before launch.

        There are several if the number of steps per epoch or samples per step matters but is
        unknown. There is none if the curves cannot be computed.
        """
        if self.schedule is None or self.schedule.feedback is not None or not self.is_run_resolved:
            return ()
        if not _is_built_in(self.schedule):  # it may import torch or run user code
            return ()
        known = (self.data_ranks, self.structure.steps_per_epoch)
        try:
            return list_possible_horizons(self.schedule, self.config, *known)
        except DurationError:  # another check reports the error
            return ()

    def get_section(self, name: str) -> Mapping[str, Any]:
        """Return a section of the config.

        If the section is absent or not an object, return an empty dict.
        """
        value = self.config.get(name)
        return value if isinstance(value, Mapping) else {}

    def is_enabled(self, name: str) -> bool:
        """Return whether a section exists and its ``enabled`` key is true."""
        return self.get_section(name).get("enabled") is True

    def is_absent(self, pointer: str) -> bool:
        """Return whether a key is absent.

        A key counts as present if its value is invalid or "auto", or if another key is probably a
        misspelling of it.
        """
        if is_within(pointer, self.unresolved):
            return False
        value: Any = self.config
        for key in split_pointer(pointer):
            if not isinstance(value, Mapping) or key not in value:
                return True
            value = value[key]
        return False

    def error(self, rule: str, pointer: str, message: str, hint: str = "", **more: Any) -> Problem:
        """Build an error for a problem that prevents the run from starting."""
        return self.document.build_problem(rule, pointer, message, hint, **more)

    def warning(self, rule: str, pointer: str, message: str, hint: str = "") -> Problem:
        """Build a warning about a likely mistake that does not prevent the run from starting."""
        return self.document.build_problem(rule, pointer, message, hint, severity="warning")

    def note(self, rule: str, pointer: str, message: str, hint: str = "") -> Problem:
        """Build a note about an unusual setting that may be intentional."""
        return self.document.build_problem(rule, pointer, message, hint, severity="note")


def _is_built_in(schedule: Schedule[Any]) -> bool:
    parts = getattr(schedule, "parts", ())
    return schedule.type_name in SCHEDULES and all(map(_is_built_in, parts))


Rule = Callable[[RuleContext], Iterator[Problem]]
