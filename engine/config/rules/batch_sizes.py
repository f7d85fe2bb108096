"""Rule for the batch sizes.

The train batch size must equal micro-batch size x gradient accumulation steps x world size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from engine.config.batch_sizes import BATCH_KEYS, BatchError, derive_batch_sizes
from engine.config.rules.context import Rule, RuleContext
from engine.errors import Problem

__all__ = ["RULES"]


def _check_batch_sizes(context: RuleContext) -> Iterator[Problem]:
    if {f"/{key}" for key in BATCH_KEYS} & set(context.unresolved):
        return
    given = {key: context.config[key] for key in BATCH_KEYS if key in context.config}
    world_size = context.world_size
    if world_size is None:
        train, *others = (given.get(key) for key in BATCH_KEYS)
        product = math.prod(other for other in others if other)
        if train is not None and train % product:
            yield _build_unfitting_problem(context, given, product)
            return
        # The sizes are valid for this number of ranks.
        world_size = train // product if train is not None and all(others) else 1
    try:
        derive_batch_sizes(given, world_size)
    except BatchError as error:
        pointer = f"/{error.key}" if error.key else ""
        yield context.error("batch-sizes", pointer, str(error), error.hint)


def _build_unfitting_problem(
    context: RuleContext, given: Mapping[str, int], product: int
) -> Problem:
    """Build the problem of sizes that do not fit any number of ranks."""
    key, *others = (key for key in BATCH_KEYS if key in given)
    factors = " x ".join(f"`{other}` ({given[other]})" for other in others)
    total = f" = {product}" if len(others) > 1 else ""
    train = given[key]
    message = (
        f"`{key}` must be a multiple of {factors}{total} for any number of ranks, got {train}."
    )
    near = [size for size in (train // product * product, (train // product + 1) * product) if size]
    hint = f"Set `{key}` to {' or '.join(map(str, near))}, or remove one of the keys."
    return context.error("batch-sizes", f"/{key}", message, hint)


RULES: tuple[Rule, ...] = (_check_batch_sizes,)
