"""``onecycle memory``: estimate the memory of the model states on each rank."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, TextIO

from engine.cli.commands.arguments import add_examples, parse_positive_int
from engine.distributed.environment import OK

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine.memory import MemorySettings, ParameterSize

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onecycle memory`` to a parser."""
    parser.description = (
        "Estimate the memory that the model states (parameters, gradients and optimizer states) "
        "need on each rank, for the config and for other ZeRO stages and kinds of offloading. No "
        "GPU is needed."
    )
    parser.add_argument(
        "file", metavar="FILE", help='path of a ds_config.json, or "-" for standard input'
    )
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument(
        "--params",
        type=_parse_count,
        metavar="N",
        help="number of parameters in the model, such as 7e9",
    )
    size.add_argument(
        "--model",
        metavar="MODULE:FUNCTION",
        help="the model's class, or a function that returns the model. MODULE is imported; the "
        "current directory is searched first. If possible, the model is built on the meta device, "
        "without allocating its weights",
    )
    parser.add_argument(
        "--world-size",
        type=parse_positive_int,
        default=1,
        metavar="N",
        help="number of ranks (default: 1)",
    )
    parser.add_argument(
        "--format", choices=("text", "json"), default="text", help="output format (default: text)"
    )
    add_examples(
        parser,
        "onecycle memory ds_config.json --params 7e9 --world-size 8",
        "onecycle memory ds_config.json --model train:build_model",
    )


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Print memory estimates for each ZeRO stage, and return the exit status."""
    from engine.display.memory_table import describe_estimate, print_estimate
    from engine.memory.alternatives import list_alternatives

    settings, wrap = _read_config(args.file, args.world_size)
    model = _read_count(args.params) if args.model is None else _read_model(args.model, wrap)
    alternatives = list(list_alternatives(model, settings))
    if args.format == "json":
        print(json.dumps(describe_estimate(model, alternatives), indent=2), file=out)
    else:
        print_estimate(args.file, model, alternatives, out)
    return OK


def _parse_count(text: str) -> int:
    try:
        count = float(text)
    except ValueError:
        count = 0.0
    if not 1 <= count <= 2**53 or count != int(count):
        raise argparse.ArgumentTypeError(
            f"must be a whole number from 1 to 2**53, such as 7e9, got {text[:20]!r}"
        )
    return int(count)


def _read_config(name: str, world_size: int) -> tuple[MemorySettings, Sequence[str]]:
    """Return the memory settings of a config, and the class names in ``engine.wrap``."""
    from engine.config import ConfigError, load_document
    from engine.config.validate import examine
    from engine.memory import read_settings

    document = load_document(name)
    problems, context = examine(document, world_size)
    errors = [problem for problem in problems if problem.severity == "error"]
    if errors or context is None:
        raise ConfigError(document.name, errors)
    return read_settings(context, world_size), context.get_section("engine").get("wrap", ())


def _read_count(count: int) -> list[ParameterSize]:
    from engine.memory import ParameterSize

    return [ParameterSize((count,))]


def _read_model(path: str, wrap: Sequence[str]) -> list[ParameterSize]:
    from engine.cli.commands.models import build_model
    from engine.memory import ParameterSize
    from engine.training.activation_checkpointing import find_blocks

    model = build_model(path)
    in_blocks = {id(each) for block in find_blocks(model, wrap) for each in block.parameters()}
    sizes = [
        ParameterSize(
            tuple(each.shape), each.element_size(), each.requires_grad, id(each) in in_blocks
        )
        for each in model.parameters()
    ]
    if not sizes:
        raise ValueError(
            f"The model built by {path!r} has no parameters. Choose a different model."
        )
    return sizes
