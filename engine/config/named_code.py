"""Find the code that a config refers to, such as ``my_module:MySchedule``, without importing it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

from engine.config.parser import Document
from engine.config.pointers import dotted_name, join_pointer
from engine.config.schema import is_import_path
from engine.config.wording import quote_value
from engine.errors import Problem
from schedules import SCHEDULES
from schedules.core.imports import check_import_path
from schedules.core.registry import ENTRY_POINTS, read_torch_parameters

__all__ = [
    "NamedCode",
    "check_import",
    "check_named_code",
    "find_named_code",
    "find_optimizer_code",
]


class NamedCode(NamedTuple):
    """An import path or entry point in a config, and the JSON pointer of its key."""

    pointer: str
    name: str


def find_named_code(block: Any, pointer: str = "/scheduler") -> Iterator[NamedCode]:
    """Yield each import path and entry point in a ``scheduler`` block and its nested schedules.

    Args:
        block: value of the config's ``scheduler`` key. If it is not a dict, nothing is yielded.
        pointer: JSON pointer of the block.

    >>> block = {"type": "LambdaLR", "params": {"lr_lambda": "my_module:warmup"}}
    >>> [code.name for code in find_named_code(block)]
    ['my_module:warmup']
    """
    if not isinstance(block, Mapping) or not isinstance(block.get("type"), str):
        return
    name, params = block["type"], block.get("params")
    params_pointer = join_pointer(pointer, "params")
    if name in SCHEDULES:
        nested = params.get("schedulers") if isinstance(params, Mapping) else None
        if isinstance(nested, list):
            around = join_pointer(params_pointer, "schedulers")
            for index, each in enumerate(nested):
                yield from find_named_code(each, join_pointer(around, index))
        return
    if ":" in name or _is_entry_point(name):
        yield NamedCode(join_pointer(pointer, "type"), name)
    elif read_torch_parameters(name) is None:
        return
    yield from _find_import_paths(params, params_pointer)


def find_optimizer_code(block: Any) -> list[NamedCode]:
    """Return a list that contains ``optimizer.type`` if it is an import path.

    Otherwise, return an empty list.

    >>> [code.name for code in find_optimizer_code({"type": "my_module:MyOptimizer"})]
    ['my_module:MyOptimizer']
    """
    name: Any = block.get("type") if isinstance(block, Mapping) else None
    is_path = isinstance(name, str) and is_import_path(name)
    return [NamedCode("/optimizer/type", name)] if is_path else []


def _is_entry_point(name: str) -> bool:
    return bool(entry_points(group=ENTRY_POINTS, name=name))


def _find_import_paths(value: Any, pointer: str) -> Iterator[NamedCode]:
    """Yield every import path in the params of a PyTorch or custom scheduler, at any depth."""
    if isinstance(value, str) and ":" in value:
        yield NamedCode(pointer, value)
    members = value.items() if isinstance(value, Mapping) else ()
    for key, below in enumerate(value) if isinstance(value, list) else members:
        yield from _find_import_paths(below, join_pointer(pointer, key))


def check_named_code(
    document: Document, block: Mapping[str, Any], pointer: str = "/scheduler"
) -> Iterator[Problem]:
    """Yield one problem for each import path and entry point in a ``scheduler`` block.

    Even a valid import path yields a problem: a note that the code is not checked.

    Args:
        document: parsed config.
        block: ``scheduler`` block.
        pointer: JSON pointer of the block.
    """
    for code in find_named_code(block, pointer):
        yield check_import(document, code)


def check_import(document: Document, code: NamedCode) -> Problem:
    """Check an import path or entry point without importing the code that it names.

    Return an error if an import path is malformed, a warning if its module is not found, and
    otherwise a note that the code itself is not checked.
    """
    pointer, path = code
    name = dotted_name(pointer)
    severity = "note"
    message = f"`{name}` refers to {quote_value(path)}, which cannot be checked without an import."
    hint = "If you trust the config, pass --allow-imports to import and check the code."
    try:
        # A script is usually started in its own directory, next to its modules.
        if ":" in path and not check_import_path(path, [str(Path.cwd())]):
            severity = "warning"
            message = f"`{name}` refers to {quote_value(path)}, but its module was not found."
            hint = (
                "If the module is in neither the current directory nor the training script's "
                "directory, add its directory to PYTHONPATH."
            )
    except ValueError:
        severity = "error"
        message = f"`{name}` must be an import path, got {quote_value(path)}."
        hint = "Write it as module:attribute, such as my_package.my_module:my_function."
    return document.build_problem("named-code", pointer, message, hint, severity=severity)
