"""Override config values with command-line arguments of the training script.

`add_config_arguments` adds DeepSpeed's arguments for the config file. `add_schedule_arguments` adds
arguments that override values in the config file. Some of them have the same names and meanings as
in SambaFlow (``--learning_rate``, ``--max_steps``, …). There is also one argument per parameter of
DeepSpeed's schedules.

If the script itself defines an argument with one of these names, before or after calling these
functions, the script's argument is kept. The value of that argument does not override the config.

`apply_assignments` implements ``--set``, an option of onecycle's commands that can set any key.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.config.parser import Document
from engine.config.pointers import dotted_name, join_pointer, split_pointer
from engine.config.source import find_unserializable
from engine.errors import ConfigError
from schedules import Schedule
from schedules.core.descriptions import read_descriptions
from schedules.core.fields import describe_schema, read_fields
from schedules.core.registry import find, import_family

__all__ = [
    "Override",
    "add_config_arguments",
    "add_schedule_arguments",
    "apply_assignments",
    "apply_overrides",
    "parse_assignments",
]


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


_RUN_ARGUMENTS: Mapping[str, tuple[str, Callable[[str], Any], str]] = {
    "learning_rate": ("LR", float, "learning rate of the optimizer (`optimizer.params.lr`)"),
    "lr_schedule": (
        "TYPE",
        str,
        "type of the schedule (`scheduler.type`); see `onecycle schedules`",
    ),
    "warmup_steps": ("N", _parse_json, "length of the warmup (`scheduler.params.warmup_steps`)"),
    "max_steps": (
        "N",
        int,
        "length of the whole run in steps (`engine.max_duration` and `scheduler.params.max_steps`)",
    ),
    "steps_this_run": (
        "N",
        int,
        "stop after this many steps without shortening the schedule (`engine.steps_this_run`)",
    ),
    "end_lr_ratio": (
        "R",
        float,
        "final learning rate as a fraction of the peak (`scheduler.params.end_lr_ratio`)",
    ),
}


@functools.cache
def _find_schedule_parameters() -> dict[str, type[Schedule[Any]]]:
    """Map each parameter name of DeepSpeed's schedules to a schedule that has this parameter."""
    return {
        name: cls
        for cls in import_family("families.deepspeed").values()
        for name in read_fields(cls)
        if name != "last_batch_iteration"
    }


_VALUES = "onecycle_overrides"
"""Name of the namespace attribute that maps each of onecycle's arguments to its value."""


class _StoreOverride(argparse.Action):
    """An argparse action that stores an argument's value in two places.

    The value is stored in the usual namespace attribute and in the namespace's dict
    ``onecycle_overrides``. The script's own arguments are not stored in this dict, even if they
    have the same names.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        del parser, option_string
        setattr(namespace, self.dest, values)
        setattr(namespace, _VALUES, {**getattr(namespace, _VALUES, {}), self.dest: values})


@dataclass(frozen=True)
class Override:
    """A config value set by a command-line argument.

    ``replaced_value`` describes the value in the config file and its position, or the value of an
    earlier argument. It is empty if the file does not contain the key or the value is the same.
    """

    argument: str
    pointer: str
    value: Any
    replaced_value: str

    def __str__(self) -> str:
        replaced = f", overriding {self.replaced_value}" if self.replaced_value else ""
        name, value = dotted_name(self.pointer), json.dumps(self.value)
        return f"`{name}` is set to {value} by {self.argument}{replaced}"


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add DeepSpeed's arguments: ``--deepspeed`` and ``--deepspeed_config``.

    Pass the parsed namespace to ``initialize(args=…)``. If the script itself defines an argument
    with one of these names, before or after this call, the script's argument is kept.

    Returns:
        The parser that was passed in.

    >>> parser = add_config_arguments(argparse.ArgumentParser())
    >>> args = parser.parse_args(["--deepspeed", "--deepspeed_config", "ds_config.json"])
    >>> args.deepspeed, args.deepspeed_config
    (True, 'ds_config.json')
    """
    add = _start_group(parser, "config", "config file; the arguments have DeepSpeed's names")
    add("deepspeed", action="store_true", help="accepted for compatibility; ignored")
    add("deepspeed_config", metavar="FILE", help="path of the config file")
    return parser


def add_schedule_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add arguments that override values in the config, such as ``--learning_rate``.

    Pass the parsed namespace to ``initialize(args=…)``. Arguments that are not given on the command
    line do not change the config. If the script itself defines an argument with one of these names,
    the script's argument is kept, and the value of that argument does not override the config.

    Returns:
        The parser that was passed in.

    >>> parser = add_schedule_arguments(argparse.ArgumentParser())
    >>> args = parser.parse_args(["--max_steps", "100"])
    >>> args.max_steps, args.learning_rate
    (100, None)
    """
    add = _start_group(
        parser, "run", "override config values; the arguments have SambaFlow's names"
    )
    for name, (metavar, kind, text) in _RUN_ARGUMENTS.items():
        add(name, action=_StoreOverride, metavar=metavar, type=kind, help=text)
    add = _start_group(
        parser, "schedule", "override parameters of DeepSpeed's schedules in `scheduler.params`"
    )
    for name, cls in _find_schedule_parameters().items():
        field = read_fields(cls)[name]
        default = "" if field.required else f" (default: {json.dumps(field.default)})"
        accepted = f"Accepts {describe_schema(field.schema)}{default}."
        text = f"{cls.type_name}: {read_descriptions(cls)[name]} {accepted}".replace("%", "%%")
        # A flag without a value means true, like DeepSpeed's --cycle_momentum.
        flag: dict[str, Any] = (
            {"nargs": "?", "const": True} if field.default in (True, False) else {}
        )
        add(name, action=_StoreOverride, metavar="VALUE", type=_parse_json, help=text, **flag)
    return parser


def _start_group(
    parser: argparse.ArgumentParser, title: str, description: str
) -> Callable[..., None]:
    """Create an argument group, and return a function that adds an argument to the group.

    The returned function skips arguments that the script already defines.
    """
    # Let the script replace our arguments. `argparse` copies this setting to each group, so set it
    # in the existing ones as well.
    groups = (*parser._action_groups, *parser._mutually_exclusive_groups)  # noqa: SLF001  # no public name
    for holder in (parser, *groups):
        holder.conflict_handler = "resolve"
    group = parser.add_argument_group(title, description)

    def add(name: str, **settings: Any) -> None:
        is_taken = any(
            name == action.dest or f"--{name}" in action.option_strings
            for action in parser._actions  # noqa: SLF001  # no public name
        )
        if not is_taken:
            group.add_argument(f"--{name}", **settings)

    return add


def apply_overrides(
    document: Document, args: argparse.Namespace
) -> tuple[Document, list[Override]]:
    """Override config values with command-line arguments.

    Args:
        document: parsed config. It is not modified.
        args: parsed command-line arguments. Only arguments from `add_schedule_arguments` are used.

    Returns:
        The config with the new values, and one `Override` per value that was set.
    """
    given: dict[str, Any] = getattr(args, _VALUES, {})
    if not given or not isinstance(document.value, dict):
        return document, []
    value = json.loads(json.dumps(document.value))
    schedule = value.get("scheduler")
    is_replaced = "lr_schedule" in given and isinstance(schedule, dict)
    if is_replaced and schedule.get("type") != given["lr_schedule"]:
        schedule.pop("params", None)  # These params are for the old schedule.
    changes = [
        Override(f"--{argument}", pointer, new, _describe_value(document, pointer, new))
        for argument, pointer, new in _find_values_to_set(given, value)
        if _set_value(value, pointer, new)  # if it cannot be set, `check` reports the section
    ]
    return _replace_values(document, value, changes), changes


def apply_assignments(
    document: Document, assignments: Sequence[str]
) -> tuple[Document, list[Override]]:
    """Override config values with the ``KEY=VALUE`` strings of the option ``--set``.

    A key is a dotted name or a JSON pointer. A value is JSON, or a string without quotes. Missing
    sections are added.

    Args:
        document: parsed config. It is not modified.
        assignments: keys and their new values. If a key is repeated, its last value is used.

    Returns:
        The config with the new values, and one `Override` per assignment.

    Raises:
        ConfigError: if a value contains NaN, an infinity or an integer too large for a float.
        ValueError: if a string does not have the form ``KEY=VALUE``, or a parent of the key is not
            an object.

    >>> from engine.config.source import load_document
    >>> document = load_document({"optimizer": {"type": "SGD"}})
    >>> apply_assignments(document, ["optimizer.params.lr=0.1", "fp16.enabled=true"])[0].value
    {'optimizer': {'type': 'SGD', 'params': {'lr': 0.1}}, 'fp16': {'enabled': True}}
    """
    if not assignments or not isinstance(document.value, dict):
        return document, []
    value = json.loads(json.dumps(document.value))
    changes = []
    for assignment, (name, pointer, new) in zip(
        assignments, parse_assignments(assignments), strict=True
    ):
        replaced_value = _describe_value(document, pointer, new)
        if not _set_value(value, pointer, new):
            raise ValueError(
                f"`--set {assignment}` cannot be applied, because a parent of `{name}` is not an "
                "object. Run `onecycle config FILE` to list the config's keys."
            )
        changes.append(Override("--set", pointer, new, replaced_value))
    unserializable = list(find_unserializable(value, ""))
    if unserializable:
        raise ConfigError(document.name, unserializable)
    return _replace_values(document, value, changes), changes


def parse_assignments(assignments: Sequence[str]) -> list[tuple[str, str, Any]]:
    """Return the key, the JSON pointer and the new value of each ``KEY=VALUE`` string.

    Raises:
        ValueError: if a string does not have the form ``KEY=VALUE``.

    >>> parse_assignments(["fp16.enabled=true", "/engine/report=plots"])
    [('fp16.enabled', '/fp16/enabled', True), ('/engine/report', '/engine/report', 'plots')]
    """
    parsed = []
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not name or not equals:
            raise ValueError(
                f"`--set` must have the form KEY=VALUE, got {assignment!r}. For example, write "
                "`--set optimizer.params.lr=0.01`."
            )
        is_pointer = name.startswith("/")
        pointer = name if is_pointer else functools.reduce(join_pointer, name.split("."), "")
        parsed.append((name, pointer, _parse_json(text)))
    return parsed


def _set_value(config: dict[str, Any], pointer: str, new: Any) -> bool:
    """Set a value in a config, adding missing sections. Return whether the value could be set."""
    *sections, key = split_pointer(pointer)
    around: Any = config
    for section in sections:
        if isinstance(around, list):
            around = _get_item(around, section)
        elif isinstance(around, dict):
            if around.get(section) is None:  # a section may be null, such as `offload_param`
                around[section] = {}
            around = around[section]
    if isinstance(around, list) and _get_item(around, key) is not None:
        around[int(key)] = new
    elif isinstance(around, dict):
        around[key] = new
    else:
        return False
    return True


def _get_item(items: list[Any], index: str) -> Any:
    return items[int(index)] if index.isdecimal() and int(index) < len(items) else None


def _describe_value(document: Document, pointer: str, new: Any) -> str:
    """Describe the value at a JSON pointer; return "" if it is absent or equals ``new``."""
    location = document.locations.get(pointer)
    if location is None or document.get_value(pointer) == new:
        return ""
    line, column = location.value
    where = f"at {document.name}:{line}:{column}"
    if pointer in document.arguments:
        where = f"from {document.arguments[pointer]}"
    return f"{json.dumps(document.get_value(pointer))} {where}"


def _replace_values(document: Document, value: Any, changes: Sequence[Override]) -> Document:
    """Return a copy of a document with a new value and a record of the changes.

    The copy lacks the source locations of keys inside the changed values.

    Args:
        document: parsed config. It is not modified.
        value: new value, with the changes already applied.
        changes: changes to record in the copy's ``arguments``.
    """
    origins = {change.pointer: change.argument for change in changes}
    below = tuple(f"{pointer}/" for pointer in origins)
    added = {
        parent: change.argument
        for change in changes
        for parent in _list_added_sections(document.value, change.pointer)
    }
    origins = {**document.arguments, **added, **origins}
    locations = {
        pointer: location
        for pointer, location in document.locations.items()
        if not pointer.startswith(below)
    }
    return replace(document, value=value, locations=locations, arguments=origins)


def _list_added_sections(config: dict[str, Any], pointer: str) -> Iterator[str]:
    """Yield the JSON pointers of the sections that `_set_value` adds to a config for a value."""
    around: Any = config
    section = ""
    for key in split_pointer(pointer)[:-1]:
        section = join_pointer(section, key)
        if isinstance(around, list):
            around = _get_item(around, key)
        elif isinstance(around, dict):
            around = around.get(key)
        if around is None:
            yield section


def _find_values_to_set(
    given: Mapping[str, Any], config: Mapping[str, Any]
) -> Iterator[tuple[str, str, Any]]:
    """Yield ``(argument, pointer, value)`` for each config value that the given arguments set.

    ``scheduler.type`` is yielded first.
    """
    if "lr_schedule" in given:
        yield "lr_schedule", "/scheduler/type", given["lr_schedule"]
    schedule = config.get("scheduler")
    schedule = schedule if isinstance(schedule, dict) else {}
    params = schedule.get("params") or {}
    fields = _get_schedule_fields(given.get("lr_schedule") or schedule.get("type"))
    if "learning_rate" in given:
        if "optimizer" in config:
            yield "learning_rate", "/optimizer/params/lr", given["learning_rate"]
        if "optimizer" not in config or "learning_rate" in params:
            yield "learning_rate", "/scheduler/params/learning_rate", given["learning_rate"]
    if "max_steps" in given:
        yield "max_steps", "/engine/max_duration", given["max_steps"]
        if "max_steps" in fields:
            yield "max_steps", "/scheduler/params/max_steps", given["max_steps"]
    if "steps_this_run" in given:
        yield "steps_this_run", "/engine/steps_this_run", given["steps_this_run"]
    for name in ("warmup_steps", "end_lr_ratio", *_find_schedule_parameters()):
        if name in given:
            yield name, join_pointer("/scheduler/params", name), given[name]


def _get_schedule_fields(name: object) -> Mapping[str, Any]:
    try:
        return read_fields(find(name)) if isinstance(name, str) else {}
    except ValueError:
        return {}  # `check` reports the unknown type
