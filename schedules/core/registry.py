"""Schedules by the name that a config calls them: the class name is the JSON ``type``."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, TypeVar, cast

from schedules.core.descriptions import descriptions_of, read_index
from schedules.core.durations import Horizon
from schedules.core.fields import accepts, fields_of, wanted
from schedules.core.imports import import_attribute
from schedules.core.schedule import Fault, Schedule, ScheduleError
from schedules.core.spelling import nearest

__all__ = ["SCHEDULES", "find", "from_config", "register"]

FAMILIES = (
    "families.deepspeed",
    "families.composer",
    "families.pytorch",
    "families.d2l",
    "families.sambaflow",
    "families.general",
    "families.megatron",
    "families.composites",
    "feedback.autowu",
    "feedback.plateau",
)
"""The modules whose ``__all__`` are schedules, in the order in which they are listed."""


class _Schedules(MutableMapping[str, "type[Schedule[Any]]"]):
    """All schedules by name; a family is imported when one of its schedules is first asked for.

    A command that reads one config needs one family, and all of them take longer to import than
    the config takes to check.
    """

    def __init__(self) -> None:
        self._families = {name: entry["family"] for name, entry in read_index().items()}
        self._loaded: dict[str, type[Schedule[Any]]] = {}

    def __getitem__(self, name: str) -> type[Schedule[Any]]:
        if name not in self._loaded and name in self._families:
            self._loaded |= of_family(self._families[name])
        return self._loaded[name]

    def __setitem__(self, name: str, cls: type[Schedule[Any]]) -> None:
        self._loaded[name] = cls

    def __delitem__(self, name: str) -> None:
        del self._loaded[name]
        self._families.pop(name, None)

    def __contains__(self, name: object) -> bool:
        return name in self._families or name in self._loaded

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._families, *self._loaded]))

    def __len__(self) -> int:
        return len(self._families.keys() | self._loaded.keys())


def of_family(family: str) -> dict[str, type[Schedule[Any]]]:
    """Return the schedules of a module of this package, by name."""
    module = importlib.import_module(f"schedules.{family}")
    classes = (getattr(module, name) for name in module.__all__)
    return {cls.type_name: cls for cls in classes}


SCHEDULES: MutableMapping[str, type[Schedule[Any]]] = _Schedules()
"""Every schedule that a config can name."""

ENTRY_POINTS = "onecycle.schedules"
_CUSTOM = "schedules.families.custom"
C = TypeVar("C", bound=type[Schedule[Any]])


def register(cls: C) -> C:
    """Make a schedule of your own known by its class name; usable as a decorator.

    Raises:
        ValueError: the name is taken, or the class is not a frozen, keyword-only dataclass with a
            string under each field. The strings are not required if the source is not available,
            as at a prompt.

    >>> import dataclasses, schedules
    >>> from schedules.core.curves import linear
    >>> @schedules.register
    ... @dataclasses.dataclass(frozen=True, kw_only=True)
    ... class ToZero(schedules.Schedule):
    ...     drives = ("lr",)
    ...     span = 10
    ...     def curves(self, base):
    ...         return {"lr": tuple(linear(lr, 0.0, self.span) for lr in base["lr"])}
    >>> schedules.from_config({"type": "ToZero"})
    ToZero()
    >>> del schedules.SCHEDULES["ToZero"]
    """
    if cls.type_name in SCHEDULES:
        raise ValueError(
            f"`{cls.type_name}` must be a name of its own, but a schedule has it already."
        )
    _refuse_no_schedule(cls)
    SCHEDULES[cls.type_name] = cls
    return cls


def _refuse_no_schedule(cls: type[Schedule[Any]]) -> None:
    name = cls.type_name
    settings = getattr(cls, "__dataclass_params__", None)
    if settings is None or not settings.frozen or "__dataclass_fields__" not in vars(cls):
        raise ValueError(
            f"`{name}` must be a dataclass(frozen=True, kw_only=True); decorate the class with it."
        )
    names = [field.name for field in dataclasses.fields(cls)]
    undocumented = [name for name in names if name not in (descriptions_of(cls) if names else {})]
    if undocumented or not all(field.kw_only for field in dataclasses.fields(cls)):
        raise ValueError(
            f"`{name}` must be keyword-only with a string under each field, which is missing under "
            f"{', '.join(undocumented) or 'none'}."
        )
    fields_of(cls)


def find(name: str) -> type[Schedule[Any]]:
    """Return the schedule of that name.

    Args:
        name: that of a known schedule; of an entry point in the group ``onecycle.schedules``; or
            ``module:attribute``, where the attribute is a schedule's class, checked as in
            `register`; or a function from the update to a multiplier of the learning rate; or a
            scheduler class in PyTorch's manner, for which a bare name of PyTorch's own will do.

    Raises:
        ValueError: there is none; the message names the nearest, or all of them.

    >>> find("math:exp").__name__
    'exp'
    """
    if ":" in name:
        return _load(name)
    if name not in SCHEDULES:
        from importlib.metadata import entry_points

        for entry in entry_points(group=ENTRY_POINTS, name=name):
            return _proved(name, entry.load())
        custom = importlib.import_module(_CUSTOM)
        if name in custom.torch_scheduler_names():
            return _load(f"{custom.TORCH_MODULE}:{name}")
        near = nearest(name, SCHEDULES)
        cure = f"Did you mean `{near}`?" if near else "`onecycle schedules` lists them."
        raise ValueError(
            f"`scheduler.type` must name a known schedule, but is {name!r} instead. {cure}"
        )
    return SCHEDULES[name]


def from_config(block: Mapping[str, Any], *, horizon: Horizon | None = None) -> Schedule[Any]:
    """Return the schedule of a ``{"type": …, "params": {…}}`` block.

    Args:
        block: its type and parameters.
        horizon: the run that its durations are resolved against, if they are to be.

    Raises:
        ScheduleError: a parameter is unknown, missing or wrong; ``faults`` has them all.
        ValueError: the type is unknown, or the block is none.

    >>> from_config({"type": "WarmupLR", "params": {"warmup_num_steps": 1e2}}).warmup_num_steps
    100
    >>> from_config({"type": "WarmupLR", "params": {"warmup_steps": 100}})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    schedules.core.schedule.ScheduleError: WarmupLR: ...Did you mean `warmup_num_steps`?
    """
    unknown = set(block) - {"type", "params"}
    if "type" not in block or unknown:
        raise ValueError(
            "a scheduler block must hold `type` and `params` alone, "
            f"but holds {', '.join(sorted(block)) or 'nothing'} instead."
        )
    cls = find(block["type"])
    params = block.get("params", {})
    fields = fields_of(cls)
    faults = [Fault(name, _unknown(cls, name, params)) for name in params if name not in fields]
    faults += [
        Fault(None, f"`{name}` must be given, but is missing. It takes {wanted(field.schema)}.")
        for name, field in fields.items()
        if field.required and name not in params
    ]
    if faults:
        raise ScheduleError(cls.type_name, faults)
    made = cls(**params)
    return made if horizon is None else made.resolve(horizon)


@functools.cache
def _load(path: str) -> type[Schedule[Any]]:
    try:
        found = import_attribute(path)
    except ValueError as error:
        raise ValueError(f"`scheduler.type` {error}") from error
    return _proved(path, found)


def _proved(path: str, found: Any) -> type[Schedule[Any]]:
    if isinstance(found, type) and issubclass(found, Schedule):
        _refuse_no_schedule(found)
        return found
    return cast("type[Schedule[Any]]", importlib.import_module(_CUSTOM).adapt(found, path))


def _unknown(cls: type[Schedule[Any]], name: str, params: Mapping[str, Any]) -> str:
    message = f"`{name}` is no parameter of {cls.type_name}."
    absent = {other: field for other, field in fields_of(cls).items() if other not in params}
    fitting = [other for other, field in absent.items() if accepts(field.schema, params[name])]
    if near := nearest(name, fitting) or nearest(name, absent):
        return f"{message} Did you mean `{near}`?"
    owners = [other for other, known in SCHEDULES.items() if name in fields_of(known)]
    if owners:
        return f"{message} It is one of {' and '.join(owners)}."
    return f"{message} It has {', '.join(fields_of(cls))}."
