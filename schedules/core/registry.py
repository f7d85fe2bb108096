"""Registry of schedules: find a schedule by name, and build it from a config."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, TypeVar, cast

from schedules.core.descriptions import read_descriptions, read_index
from schedules.core.durations import Horizon
from schedules.core.fields import accepts, describe_schema, read_fields
from schedules.core.imports import import_attribute, require_imports
from schedules.core.schedule import ParameterProblem, Schedule, ScheduleError
from schedules.core.spelling import find_abbreviation, find_nearest, suggest_fraction

__all__ = ["SCHEDULES", "build", "find", "from_config", "register", "suggest", "to_class"]

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
"""Modules that define the built-in schedules. `SCHEDULES` lists the schedules in this order."""

_OTHER_NAMES = {
    "1cycle": "OneCycle",
    "constant": "ConstantScheduler",
    "constant_with_warmup": "ConstantWithWarmupScheduler",
    "cosine": "cosine_schedule_with_warmup",
    "cosine_annealing": "CosineAnnealingLR",
    "cosine_annealing_warm_restarts": "CosineAnnealingWarmRestarts",
    "cosine_decay": "CosineAnnealingLR",
    "cosine_warmup": "cosine_schedule_with_warmup",
    "cosine_with_min_lr": "cosine_schedule_with_warmup",
    "cosine_with_restarts": "CosineAnnealingWarmRestarts",
    "cosine_with_warmup": "cosine_schedule_with_warmup",
    "cosineannealing": "CosineAnnealingLR",
    "cosinelr": "CosineAnnealingLR",
    "cosinewarmup": "cosine_schedule_with_warmup",
    "cyclic": "CyclicLR",
    "exponential": "ExponentialLR",
    "exponential_decay": "ExponentialLR",
    "inverse_sqrt": "InverseSquareRoot",
    "linear": "LinearWithWarmupScheduler",
    "linear_warmup": "LinearWithWarmupScheduler",
    "linear_with_warmup": "LinearWithWarmupScheduler",
    "multistep": "MultiStepLR",
    "one_cycle": "OneCycle",
    "onecyclescheduler": "OneCycle",
    "plateau": "ReduceLROnPlateau",
    "polynomial": "polynomial_decay_schedule_with_warmup",
    "polynomial_with_warmup": "polynomial_decay_schedule_with_warmup",
    "reduce_lr_on_plateau": "ReduceLROnPlateau",
    "step": "StepLR",
    "warmup": "WarmupLR",
    "warmup_cosine": "WarmupCosineLR",
    "warmup_decay": "WarmupDecayLR",
    "warmup_linear": "WarmupDecayLR",
    "warmuplinear": "WarmupDecayLR",
    "warmuplineardecaylr": "WarmupDecayLR",
    "warmuplinearlr": "WarmupDecayLR",
    "wsd": "WarmupStableDecay",
}
"""Maps lowercase names of schedules in other libraries to the closest built-in schedules."""


class _Schedules(MutableMapping[str, "type[Schedule[Any]]"]):
    """Mapping from names to schedule classes. A class is imported when it is first looked up.

    A config usually needs only one class, and importing all of them would take longer than
    validating the config.
    """

    def __init__(self) -> None:
        self._families = {name: entry["family"] for name, entry in read_index().items()}
        self._loaded: dict[str, type[Schedule[Any]]] = {}

    def __getitem__(self, name: str) -> type[Schedule[Any]]:
        if name not in self._loaded and name in self._families:
            self._loaded |= import_family(self._families[name])
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


def import_family(family: str) -> dict[str, type[Schedule[Any]]]:
    """Import a module of schedules, such as "families.pytorch", and return its classes by name."""
    module = importlib.import_module(f"schedules.{family}")
    classes = (getattr(module, name) for name in module.__all__)
    return {cls.type_name: cls for cls in classes}


SCHEDULES: MutableMapping[str, type[Schedule[Any]]] = _Schedules()
"""Maps names to schedule classes, for all built-in and registered schedules."""

ENTRY_POINTS = "onecycle.schedules"
_CUSTOM = "schedules.families.custom"
_MAX_DESCRIBED = 20  # unknown parameters, because the search for suggestions takes time
C = TypeVar("C", bound=type[Schedule[Any]])


def register(cls: C) -> C:
    """Register a custom schedule under its class name, and return the class.

    This function can be used as a decorator.

    Raises:
        ValueError: the name is already in use, the class is not a frozen, keyword-only dataclass,
            or a field has no docstring. Docstrings are not checked if the source code is not
            available, for example in an interactive session.
        TypeError: an annotation cannot be expressed in JSON Schema.

    >>> import dataclasses, schedules
    >>> from schedules.core.curves import linear
    >>> @schedules.register
    ... @dataclasses.dataclass(frozen=True, kw_only=True)
    ... class ToZero(schedules.Schedule):
    ...     hyperparameters = ("lr",)
    ...     span = 10
    ...     def curves(self, base):
    ...         return {"lr": tuple(linear(lr, 0.0, self.span) for lr in base["lr"])}
    >>> schedules.from_config({"type": "ToZero"})
    ToZero()
    >>> del schedules.SCHEDULES["ToZero"]
    """
    if cls.type_name in SCHEDULES:
        raise ValueError(
            f"A schedule named `{cls.type_name}` already exists. Choose a different class name."
        )
    _check_class(cls)
    SCHEDULES[cls.type_name] = cls
    return cls


def _check_class(cls: type[Schedule[Any]]) -> None:
    name = cls.type_name
    settings = getattr(cls, "__dataclass_params__", None)
    if settings is None or not settings.frozen or "__dataclass_fields__" not in vars(cls):
        raise ValueError(
            f"`{name}` must be a frozen, keyword-only dataclass. "
            "Decorate the class with `@dataclasses.dataclass(frozen=True, kw_only=True)`."
        )
    names = [field.name for field in dataclasses.fields(cls)]
    undocumented = [name for name in names if name not in (read_descriptions(cls) if names else {})]
    if not all(field.kw_only for field in dataclasses.fields(cls)):
        raise ValueError(
            f"`{name}` must be a keyword-only dataclass. Pass `kw_only=True` to the decorator."
        )
    if undocumented:
        raise ValueError(
            f"Each field of `{name}` must have a docstring below it. Add a docstring to: "
            f"{', '.join(undocumented)}."
        )
    read_fields(cls)


def find(name: str) -> type[Schedule[Any]]:
    """Return the schedule class with the given name or import path.

    Args:
        name: name of a built-in or registered schedule, of an entry point in the group
            ``onecycle.schedules``, or of a scheduler in ``torch.optim.lr_scheduler``.
            Alternatively, the import path ``module:attribute`` of a schedule class, a PyTorch
            scheduler class, or a function that maps the step to a learning rate factor.

    Raises:
        ImportForbiddenError: the schedule is neither built in nor registered, and imports are not
            allowed here (see `schedules.core.imports.imports_allowed`).
        ValueError: the name is unknown, the import fails, or the imported object is not a valid
            schedule class, PyTorch scheduler class or function. The message suggests a known name
            if one is similar to ``name``.

    >>> find("math:exp").__name__
    'exp'
    """
    if ":" in name:
        require_imports(name)  # even if imported already: it must not run
        return _load(name)
    if name not in SCHEDULES:
        from importlib.metadata import entry_points

        for entry in entry_points(group=ENTRY_POINTS, name=name):
            require_imports(name)
            return to_class(name, entry.load())
        if read_torch_parameters(name) is not None:
            require_imports(name)
            custom = importlib.import_module(_CUSTOM)
            return _load(f"{custom.TORCH_MODULE}:{name}")
        near = suggest(name)
        fix = f"Did you mean `{near}`?" if near else "Run `onecycle schedules` for a list."
        raise ValueError(f"`scheduler.type` must be the name of a schedule, got {name!r}. {fix}")
    return SCHEDULES[name]


def suggest(name: str) -> str | None:
    """Return the known schedule name that is closest to an unknown name; None if no name is close.

    >>> suggest("OneCicle"), suggest("1Cycle"), suggest("nonsense")
    ('OneCycle', 'OneCycle', None)
    """
    name = name.rpartition(".")[2]  # without the module in "torch.optim.lr_scheduler.StepLR"
    return _OTHER_NAMES.get(name.lower()) or find_nearest(name, SCHEDULES)


def read_torch_parameters(name: str) -> dict[str, bool] | None:
    """Return the parameters of a PyTorch scheduler without importing PyTorch.

    Returns:
        A dict that maps each parameter to whether it is required; None if PyTorch is not installed
        or has no scheduler with this name.

    >>> read_torch_parameters("LambdaLR")
    {'lr_lambda': True}
    """
    custom = importlib.import_module(_CUSTOM)
    parameters: dict[str, bool] | None = custom.read_torch_parameters(name)
    return parameters


def from_config(block: Mapping[str, Any], *, horizon: Horizon | None = None) -> Schedule[Any]:
    """Build the schedule described by a ``{"type": …, "params": {…}}`` block.

    Args:
        block: type and parameters of the schedule.
        horizon: length of the run. If set, durations are converted to steps and multiplied by
            ``horizon.scale_ratio``.

    Raises:
        ImportForbiddenError: the block names code that must be imported, but imports are not
            allowed here (see `schedules.core.imports.imports_allowed`).
        ScheduleError: a parameter is unknown, missing or invalid. The error's ``problems``
            attribute lists all of them.
        ValueError: ``type`` is missing or unknown, the block has an unknown key, or ``type`` or
            ``params`` has the wrong JSON type.

    >>> from_config({"type": "WarmupLR", "params": {"warmup_num_steps": 1e2}}).warmup_num_steps
    100
    >>> from_config({"type": "WarmupLR", "params": {"warmup_steps": 100}})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    schedules.core.schedule.ScheduleError: WarmupLR: ...Did you mean `warmup_num_steps`?
    """
    unknown = set(block) - {"type", "params"}
    if "type" not in block or unknown:
        raise ValueError(
            "The keys of a scheduler block must be `type` and, optionally, `params`, got "
            f"{', '.join(sorted(block)) or 'no keys'}."
        )
    name, params = block["type"], block.get("params", {})
    if not isinstance(name, str) or not isinstance(params, Mapping):
        raise ValueError(  # noqa: TRY004  # it is a value of the config
            "In a scheduler block, `type` must be a string and `params` must be an object, got "
            f"{type(name).__name__} and {type(params).__name__}."
        )
    schedule = build(find(name), params)
    return schedule if horizon is None else schedule.resolve(horizon)


def build(cls: type[Schedule[Any]], params: Mapping[str, Any]) -> Schedule[Any]:
    """Build a schedule from its class and its parameters.

    Args:
        cls: class of the schedule.
        params: parameters of the schedule.

    Raises:
        ScheduleError: a parameter is unknown, missing or invalid.
    """
    fields = read_fields(cls)
    unknown_params = [name for name in params if name not in fields]
    problems = [
        ParameterProblem(name, _describe_unknown(cls, name, params))
        for name in unknown_params[:_MAX_DESCRIBED]
    ]
    if len(unknown_params) > _MAX_DESCRIBED:
        more = len(unknown_params) - _MAX_DESCRIBED
        problems.append(ParameterProblem(None, f"There are {more:,} more unknown parameters."))
    problems += [
        ParameterProblem(None, f"`{name}` is required. Set it to {describe_schema(field.schema)}.")
        for name, field in fields.items()
        if field.required and name not in params
    ]
    if problems:
        raise ScheduleError(cls.type_name, problems)
    return cls(**params)


@functools.cache
def _load(path: str) -> type[Schedule[Any]]:
    try:
        found = import_attribute(path)
    except ValueError as error:
        raise ValueError(f"`scheduler.type` {error}") from error
    return to_class(path, found)


def to_class(path: str, found: Any) -> type[Schedule[Any]]:
    """Convert an imported object to a schedule class.

    Args:
        path: import path of ``found``, or the name of its entry point.
        found: schedule class, PyTorch scheduler class, function that builds a PyTorch scheduler, or
            function that maps the step to a learning rate factor.

    Raises:
        ValueError: ``found`` is not one of these objects, or is a class that cannot be used as a
            schedule.
    """
    if isinstance(found, type) and issubclass(found, Schedule):
        _check_class(found)
        return found
    if isinstance(found, Schedule):
        raise ValueError(  # noqa: TRY004  # it is a value of the config
            f"{path!r} must be a schedule class or a function of the step, got the instance "
            f"{found!r}. Set `type` and `params` to the class and parameters of this instance."
        )
    return cast("type[Schedule[Any]]", importlib.import_module(_CUSTOM).adapt(found, path))


def _describe_unknown(cls: type[Schedule[Any]], name: str, params: Mapping[str, Any]) -> str:
    message = f"Unknown parameter `{name}` of {cls.type_name}."
    absent = {other: field for other, field in read_fields(cls).items() if other not in params}
    fitting = [other for other, field in absent.items() if accepts(field.schema, params[name])]
    if hint := suggest_fraction(name, params[name], absent):
        return f"{message} {hint}"
    near = find_nearest(name, fitting) or find_nearest(name, absent)
    if near := near or find_abbreviation(name, fitting):
        return f"{message} Did you mean `{near}`?"
    owners = [other for other, known in SCHEDULES.items() if name in read_fields(known)]
    if owners:
        return f"{message} It is a parameter of {' and '.join(owners)}."
    return f"{message} Valid parameters: {', '.join(read_fields(cls))}."
