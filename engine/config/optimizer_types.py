"""Look up the JSON schema of an optimizer's ``params``, given its ``optimizer.type``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from engine.config.named_code import NamedCode, check_import
from engine.config.parser import Document
from engine.config.schema import OPTIMIZERS, is_import_path, optimizer_name, optimizer_schema
from engine.config.suggestions import suggest_optimizer
from engine.config.wording import quote_value
from engine.errors import Fix, Problem
from schedules.core.imports import are_imports_allowed, import_attribute

__all__ = ["CLOSURE_FIX", "TORCH_ARGUMENTS", "find_optimizer_schema", "needs_closure"]

TORCH_ARGUMENTS = ("maximize", "foreach", "fused", "capturable")
"""Arguments of PyTorch's optimizers that DeepSpeed's own optimizers do not accept."""

CLOSURE_FIX = (
    "An optimizer with a closure computes the loss several times per step, but the engine computes "
    "the gradients before the step. Choose another optimizer, or train without the engine."
)
_POINTER = "/optimizer/type"
_OPTIMIZER_CLASS = "torch.optim.optimizer.Optimizer"
_WITH_CLOSURE = "lbfgs"
_ANY_PARAMS: Mapping[str, Any] = {}


def find_optimizer_schema(document: Document, name: str) -> Mapping[str, Any] | Problem:
    """Return the JSON schema of an optimizer's ``params``, or a `Problem` if the type is invalid.

    If ``name`` is an import path and imports are allowed (see `imports_allowed`), import the class
    and return a schema with the names, but not the types, of its constructor's arguments. If
    imports are not allowed, return the result of `check_import`.

    Args:
        document: parsed config.
        name: value of the key ``optimizer.type``.
    """
    if is_import_path(name):
        if are_imports_allowed():
            return _import_schema(document, name)
        return check_import(document, NamedCode(_POINTER, name))
    known = optimizer_name(name)
    if known is None:
        return _build_unknown_problem(document, name)
    schema = optimizer_schema(known)
    if "x-removed" in schema:
        message = f"The optimizer {known} was removed in DeepSpeed {schema['x-removed']}."
        return document.build_problem("removed-key", _POINTER, message, schema["x-instead"])
    return schema


def _build_unknown_problem(document: Document, name: str) -> Problem:
    usable = [known for known, schema in OPTIMIZERS.items() if "x-removed" not in schema]
    near = suggest_optimizer(name)
    message = f"`optimizer.type` must be one of {', '.join(usable)}, got {quote_value(name)}."
    hint = (
        f"Did you mean `{near}`?"
        if near
        else 'For any other class, write its import path, such as "my_module:MyOptimizer", or pass '
        "the optimizer to `initialize(optimizer=…)`."
    )
    if name.lower() == _WITH_CLOSURE:
        message, hint = "`optimizer.type` must not be LBFGS, which needs a closure.", CLOSURE_FIX
        near = None
    fix = Fix(value=near, is_certain=False) if near else None
    return document.build_problem("unknown-optimizer", _POINTER, message, hint, fix=fix)


def _import_schema(document: Document, path: str) -> Mapping[str, Any] | Problem:
    try:
        found = import_attribute(path)
    except ValueError as error:
        return document.build_problem("named-code", _POINTER, f"`optimizer.type`: {error}")
    if not _is_optimizer_class(found):
        message = (
            f"`optimizer.type` must be the import path of a subclass of torch.optim.Optimizer, got "
            f"{quote_value(path)}, which is {found!r}."
        )
        hint = (
            "If the path names a function that builds an optimizer, pass the function to "
            "`initialize(optimizer=…)` instead."
        )
        return document.build_problem("named-code", _POINTER, message, hint)
    if needs_closure(found):
        message = f"`optimizer.type` must not be {path}, which needs a closure."
        return document.build_problem("unknown-optimizer", _POINTER, message, CLOSURE_FIX)
    return _build_schema(found)


def _is_optimizer_class(found: Any) -> bool:
    # Compare names, because validation does not import PyTorch.
    return isinstance(found, type) and any(
        f"{base.__module__}.{base.__qualname__}" == _OPTIMIZER_CLASS for base in found.__mro__
    )


def needs_closure(optimizer_class: Any) -> bool:
    """Return whether an optimizer class requires a closure in ``step``, as LBFGS does."""
    try:
        parameters = list(inspect.signature(optimizer_class.step).parameters.values())
    except (AttributeError, TypeError, ValueError):  # not every callable has a signature
        return False
    variable = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    return any(each.default is each.empty and each.kind not in variable for each in parameters[1:])


def _build_schema(optimizer_class: type) -> Mapping[str, Any]:
    """Build a JSON schema that accepts a class's keyword arguments, with values of any type."""
    try:
        arguments = list(inspect.signature(optimizer_class).parameters.values())
    except (TypeError, ValueError):
        return _ANY_PARAMS
    keyword = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    named = [each for each in arguments[1:] if each.kind in keyword]  # without the parameters
    return {
        "properties": {each.name: {} for each in named},
        "required": [each.name for each in named if each.default is each.empty],
        "additionalProperties": any(each.kind is each.VAR_KEYWORD for each in arguments),
    }
