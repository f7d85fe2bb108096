"""What values of a config must be to one another, across its sections."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from engine.config.batch import BATCH_KEYS, BatchError, solve
from engine.config.document import Document
from engine.config.problems import Problem
from engine.config.sections import OPTIMIZERS, optimizer_name
from schedules import from_config

__all__ = ["check_together"]


def check_together(
    document: Document,
    config: Mapping[str, Any],
    world_size: int | None,
    broken: Collection[str],
) -> Iterator[Problem]:
    """Yield the problems between sections.

    Args:
        document: where the places come from.
        config: the top-level keys that are right by themselves.
        world_size: number of ranks, or None for any.
        broken: the top-level keys that are not, about which nothing more is said.
    """
    if not set(BATCH_KEYS) & set(broken):
        yield from _batch(document, config, world_size)
    yield from _precision(document, config)
    yield from _momentum(document, config)


def _batch(
    document: Document, config: Mapping[str, Any], world_size: int | None
) -> Iterator[Problem]:
    given = {key: config[key] for key in BATCH_KEYS if key in config}
    if world_size is None:
        train, *others = (given.get(key) for key in BATCH_KEYS)
        product = math.prod(other for other in others if other)
        # Some number of ranks fits whenever the batch is a multiple of both other sizes.
        fits = train is not None and all(others) and train % product == 0
        world_size = train // product if train is not None and fits else 1
    try:
        solve(given, world_size)
    except BatchError as error:
        pointer = f"/{error.key}" if error.key else ""
        yield document.problem("batch-sizes", pointer, str(error), error.hint)


def _precision(document: Document, config: Mapping[str, Any]) -> Iterator[Problem]:
    if all(config.get(key, {}).get("enabled") for key in ("fp16", "bf16")):
        message = "`fp16.enabled` and `bf16.enabled` must not both be true, but are."
        yield document.problem("precision", "/fp16/enabled", message, "Set one of them to false.")


def _momentum(document: Document, config: Mapping[str, Any]) -> Iterator[Problem]:
    if "scheduler" not in config or "optimizer" not in config:
        return
    block = config["scheduler"]
    schedule = from_config({"type": block["type"], "params": block.get("params", {})})
    name = optimizer_name(config["optimizer"]["type"])
    assert name is not None
    parameters = OPTIMIZERS[name]["properties"]
    if "momentum" in schedule.drives and not {"momentum", "betas"} & parameters.keys():
        message = f"{block['type']} must drive momentum or betas, but {name} has neither."
        hint = 'Set "cycle_momentum": false in scheduler.params, or choose another optimizer.'
        yield document.problem("no-momentum", "/scheduler", message, hint)
