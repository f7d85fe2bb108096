"""Rules for the batch sizes.

The train batch size must equal micro-batch size x accumulation steps x data-parallel ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from engine.config.batch_sizes import (
    BATCH_KEYS,
    BatchError,
    DataRanks,
    count_ranks_per_model,
    derive_batch_sizes,
)
from engine.config.rules.context import Rule, RuleContext
from engine.config.wording import count_noun
from engine.errors import Problem

__all__ = ["RULES"]


def _check_batch_sizes(context: RuleContext) -> Iterator[Problem]:
    autos = [key for key in BATCH_KEYS if context.document.value.get(key) == "auto"]
    if {f"/{key}" for key in BATCH_KEYS if key not in autos} & set(context.unresolved):
        return
    given = {key: context.config[key] for key in BATCH_KEYS if key in context.config}
    train, *others = (given.get(key) for key in BATCH_KEYS)
    if train is None and {BATCH_KEYS[0], BATCH_KEYS[1]} & set(autos):
        return  # an integration can choose a fitting train batch size
    ranks = context.data_ranks
    if ranks is None:
        product = math.prod(other for other in others if other)
        if train is not None and train % product:
            yield _build_unfitting_problem(context, given, product)
            return
        # The sizes are valid for this number of ranks.
        ranks = DataRanks(train // product if train is not None and all(others) else 1)
    try:
        sizes = derive_batch_sizes(given, ranks)
    except BatchError as error:
        pointer = f"/{error.key}" if error.key else ""
        yield context.error("batch-sizes", pointer, str(error), error.hint)
        return
    if context.world_size is None and not autos:
        yield from _check_possible_ranks(context, given)
    if train not in {None, sizes.train} and not autos:
        message = (
            f"`train_batch_size` is {train}, but a batch has only {sizes.train} samples. The value "
            f"counts each sample {ranks.tensor_parallel} times, once per tensor-parallel rank."
        )
        hint = f"Set it to {sizes.train}."
        yield context.note("batch-sizes", "/train_batch_size", message, hint)


def _check_possible_ranks(context: RuleContext, given: Mapping[str, int]) -> Iterator[Problem]:
    """Yield a note if the batch sizes are valid for only one number of ranks."""
    per_model = count_ranks_per_model(context.config)
    if "tensor_parallel.autotp_size" in per_model:  # it does not divide the samples of a batch
        return
    key, *others = (key for key in BATCH_KEYS if key in given)
    per_rank = math.prod(given[other] for other in others)
    if key != BATCH_KEYS[0] or not others or (len(others) == 1 and given[key] != per_rank):
        return
    ranks = count_noun(given[key] // per_rank, "data-parallel rank" if per_model else "rank")
    factors = " x ".join(f"`{other}` ({given[other]})" for other in others)
    message = f"The batch sizes require {ranks}: `{key}` ({given[key]}) = {factors} x {ranks}."
    hint = f"For any other number of ranks, remove `{key}`."
    yield context.note("batch-sizes", f"/{key}", message, hint)


def _build_unfitting_problem(
    context: RuleContext, given: Mapping[str, int], product: int
) -> Problem:
    """Build the error for batch sizes that are invalid for every number of ranks."""
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


def _check_ranks_per_model(context: RuleContext) -> Iterator[Problem]:
    sizes = count_ranks_per_model(context.config)
    product = math.prod(sizes.values())
    if context.world_size is not None and context.world_size % product:
        names = " x ".join(f"`{key}` ({size})" for key, size in sizes.items())
        key = next(iter(sizes))
        message = f"The world size must be a multiple of {names}, got {context.world_size}."
        hint = f"Set the number of ranks to a multiple of {product}, or change these keys."
        yield context.error("batch-sizes", f"/{key.replace('.', '/')}", message, hint)


RULES: tuple[Rule, ...] = (_check_batch_sizes, _check_ranks_per_model)
