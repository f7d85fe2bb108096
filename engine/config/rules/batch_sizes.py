"""Rule for the batch sizes.

The train batch size must equal micro-batch size x gradient accumulation steps x world size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

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
        # If train_batch_size is a multiple of the product, the sizes are valid for some number of
        # ranks.
        fits = train is not None and all(others) and train % product == 0
        world_size = train // product if train is not None and fits else 1
    try:
        derive_batch_sizes(given, world_size)
    except BatchError as error:
        pointer = f"/{error.key}" if error.key else ""
        yield context.error("batch-sizes", pointer, str(error), error.hint)


RULES: tuple[Rule, ...] = (_check_batch_sizes,)
