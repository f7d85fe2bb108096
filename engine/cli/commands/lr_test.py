"""``onecycle lr-test``: run an LR range test on an unmodified training script."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from engine.cli.commands.arguments import SET_HELP, add_examples, parse_positive_int
from engine.distributed.environment import INVALID, OK, SET
from schedules.core.extras import require_package

if TYPE_CHECKING:
    from rich.console import Console

    from engine.range_test.recorder import Run
    from engine.range_test.report import LRRangeReport
    from engine.range_test.sweep import Sweep

__all__ = ["add_arguments", "run"]

_END_REASONS = {"divergence": "divergence", "steps": "step limit"}
_LINES_OF_FAILURE = 15
_DEFAULT_SIZES = (
    "By default, the learning rate increases for 2,000 steps and then decreases for 2,000 steps. "
    "Set `cycle_first_step_size`, or set `engine.max_duration` before the test."
)
_GRACE = 30.0  # seconds to wait after the test before the script is killed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``onecycle lr-test`` to a parser."""
    parser.description = (
        "Run an LR range test on an unmodified training script: sweep the learning rate from "
        "--min to --max, and suggest learning-rate bounds for OneCycle. The sweep replaces the "
        "script's schedule, and no checkpoints are written. The script is stopped when the loss "
        "diverges or the sweep ends."
    )
    parser.epilog = "exit status: 0 a suggestion was found; 1 no suggestion; 2 usage error"
    add_examples(
        parser,
        "onecycle lr-test -- train.py ds_config.json",
        "onecycle lr-test --repeat 3 --write ds_config.json -- train.py ds_config.json",
        "onecycle lr-test --refine --training-steps 20000 -- train.py ds_config.json",
        "onecycle lr-test --nproc 2 --max 1 --steps 300 -- train.py ds_config.json",
        "onecycle lr-test --set train_batch_size=64 -- train.py ds_config.json",
    )
    _add_sweep_arguments(parser)
    _add_repetition_arguments(parser)
    _add_script_arguments(parser)


def _add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="config to use instead of the script's config. If the schedule in FILE is "
        "LRRangeTest, the sweep uses this schedule",
    )
    parser.add_argument(
        "--min",
        type=float,
        default=1e-6,
        metavar="LR",
        help="learning rate at the start of the sweep (default: 1e-6)",
    )
    parser.add_argument(
        "--max",
        type=float,
        default=10.0,
        metavar="LR",
        help="learning rate at the end of the sweep (default: 10)",
    )
    parser.add_argument(
        "--steps",
        type=parse_positive_int,
        default=250,
        help="number of steps in the sweep, at least 21 (default: 250)",
    )
    parser.add_argument(
        "--shape",
        choices=["exponential", "linear", "staircase"],
        default="exponential",
        help="shape of the learning-rate curve (default: exponential, which multiplies the "
        "learning rate by the same factor at each step)",
    )
    parser.add_argument(
        "--momentum",
        nargs=2,
        type=float,
        metavar=("FROM", "TO"),
        help="momentum at the start and at the end of the sweep, such as 0.95 0.85 (default: the "
        "momentum stays constant)",
    )
    parser.add_argument(
        "--divergence",
        type=float,
        default=4.0,
        metavar="X",
        help="end the sweep when the smoothed loss exceeds X times its lowest value so far "
        "(default: 4)",
    )


def _add_repetition_arguments(parser: argparse.ArgumentParser) -> None:
    repeat_help = "number of runs, each with a different seed (default: 1)"
    parser.add_argument(
        "--repeat", type=parse_positive_int, default=1, metavar="N", help=repeat_help
    )
    parser.add_argument(
        "--refine",
        action="store_true",
        help="after the sweep, refine the suggested maximum learning rate with short 1Cycle runs "
        "of --steps steps. The first five runs use 1/4, 1/2, 1, 2 and 4 times the suggestion. If "
        "the smallest or the largest value gives the lowest final loss, more runs extend the range "
        "at that end. The refined suggestion is computed from the final losses. With --refine, the "
        "test takes five to ten times as long",
    )
    parser.add_argument(
        "--training-steps",
        type=parse_positive_int,
        metavar="N",
        help="with --refine: number of steps in the planned training run. If N is larger than "
        "--steps, the suggestion is multiplied by (steps / N)**0.32, because a longer run needs a "
        "smaller learning rate (https://arxiv.org/abs/2409.19913)",
    )


def _add_script_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"{SET_HELP}. The overrides apply to each config that the script passes to "
        "engine.initialize, and to the configs that this command reads from the --config and "
        "--write files",
    )
    parser.add_argument(
        "--engine",
        type=parse_positive_int,
        metavar="N",
        help="run the LR range test on the Nth engine that the script creates (required if the "
        "script creates several engines); the other engines train with their own schedules",
    )
    parser.add_argument(
        "--nproc",
        type=parse_positive_int,
        default=1,
        metavar="N",
        help="number of ranks (default: 1)",
    )
    parser.add_argument(
        "--write",
        type=Path,
        metavar="FILE",
        help="config file to write the suggested OneCycle block to. The original file is kept as "
        "FILE.bak",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("lr_test"),
        metavar="DIR",
        help="directory for lr_range.png, report.json and the script's logs (default: lr_test)",
    )
    parser.add_argument(
        "script",
        nargs=argparse.REMAINDER,
        help="-- followed by the training script and its arguments, or by a command that runs it",
    )


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Run the LR range test, print the suggested bounds, and return the exit status."""
    from rich.console import Console

    from engine.range_test.refinement import check_training_steps
    from engine.range_test.report import LRRangeReport
    from engine.range_test.suggestion import MIN_POINTS
    from engine.range_test.sweep import Sweep

    if args.steps <= MIN_POINTS:
        raise ValueError(
            f"`--steps` must be >= {MIN_POINTS + 1}, got {args.steps}. A suggestion requires "
            f"{MIN_POINTS} losses after the first step. Use more steps, for example 250."
        )
    require_package("matplotlib", "`onecycle lr-test`")
    require_package("plotext", "`onecycle lr-test`")
    command = _build_command(args)
    check_training_steps(args.refine, args.training_steps)
    sweep = Sweep(
        args.min,
        args.max,
        args.steps,
        args.shape,
        tuple(args.momentum) if args.momentum else None,
        _read_range_test_block(args),
        args.divergence,
        config=args.config and str(Path(args.config).resolve()),
        engine=args.engine,
    )
    target = args.write or args.config
    # Read the config before the test, so that an unreadable file is reported immediately.
    current = _read_cycle(Path(target), args.nproc, args.set) if target else None
    console = Console(file=out, soft_wrap=not out.isatty())
    args.output.mkdir(parents=True, exist_ok=True)

    def sweep_once(repeat: int) -> Run:
        return _train(command, replace(sweep, seed_offset=repeat), "sweep", args, console)

    def cycle_once(block: dict[str, Any], repeat: int) -> Run:
        cycle = replace(sweep, block=block, divergence_factor=math.inf, seed_offset=repeat)
        name = f"cycle to {block['params']['cycle_max_lr']:.2g}"
        run = _train(command, cycle, name, args, console)
        if not run.end:
            raise _TestFailedError(
                f"the script exited after {len(run.lrs)} of the {args.steps} steps of a short "
                "1Cycle run. Train for more epochs, or reduce `--steps`."
            )
        return run

    try:
        report = LRRangeReport(tuple(sweep_once(repeat) for repeat in range(args.repeat)))
        if args.refine:
            steps, training_steps = args.steps, args.training_steps
            report = report.refine(
                cycle_once, steps=steps, training_steps=training_steps, known=current
            )
    except _TestFailedError as error:
        console.print(f"no suggestion: {error}", markup=False)
        return INVALID
    return _print_result(report, current, args, console)


class _TestFailedError(Exception):
    """Raised if a run of the training script produces no usable result.

    The message states the reason and how to fix the problem.
    """


def _train(
    command: Sequence[str], sweep: Sweep, name: str, args: argparse.Namespace, console: Console
) -> Run:
    """Run the script once with the learning rates of ``sweep``, and return the recorded run.

    Raises:
        _TestFailedError: if the script failed, did not call `engine.initialize`, or exited after
            too few steps.
    """
    from engine.range_test.recorder import RECORD, Run

    log = args.output / f"{name.replace(' ', '_')}.{sweep.seed_offset}.log"
    with tempfile.TemporaryDirectory(prefix="onecycle-") as directory:
        record = Path(directory, RECORD)
        environment = replace(sweep, directory=directory).to_environment()
        if args.set:
            environment[SET] = json.dumps(args.set)
        status = _run_with_progress(command, environment, record, log, name, args, console)
        run = Run.read(record) if record.is_file() else Run()
    problem = _find_problem(status, run, log, args)
    if problem:
        raise _TestFailedError(problem)
    return run


def _build_command(args: argparse.Namespace) -> list[str]:
    script = args.script[1:] if args.script[:1] == ["--"] else args.script
    if not script:
        raise ValueError("No script was given. Usage: `onecycle lr-test -- train.py ARGS`.")
    if script[0].endswith(".py") and not Path(script[0]).is_file():
        raise FileNotFoundError(2, "script not found", script[0])
    python = [sys.executable] if script[0].endswith(".py") else []
    if args.nproc == 1:
        return [*python, *script]
    from engine.launch.request import build_module_command

    torchrun = build_module_command(sys.executable, "engine.launch.torchrun")
    flags = [] if python else ["--no-python"]
    return [*torchrun, "--standalone", "--nproc-per-node", str(args.nproc), *flags, *script]


def _read_range_test_block(args: argparse.Namespace) -> Any:
    """Return the scheduler block of `--config` if its type is LRRangeTest, and None otherwise."""
    block = _read_block(Path(args.config), args.nproc, args.set) if args.config else None
    return block if block and block.get("type") == "LRRangeTest" else None


def _read_cycle(path: Path, nproc: int, assignments: Sequence[str] = ()) -> dict[str, Any]:
    """Return the OneCycle block whose params the suggested block keeps."""
    from engine.config.source import load_document
    from engine.range_test.refinement import fit_cycle

    block = _read_block(path, nproc, assignments)
    # `--set` applies only to this command, so the length must be in the file.
    section = load_document(path).value.get("engine") or {}
    return fit_cycle(block, has_length=section.get("max_duration") is not None)


def _read_block(path: Path, nproc: int, assignments: Sequence[str] = ()) -> dict[str, Any] | None:
    from engine.config import load_config

    config = load_config(path, world_size=nproc, assignments=assignments)
    block = config.raw.get("scheduler")
    return None if block is None else dict(block)


def _run_with_progress(
    command: Sequence[str],
    environment: dict[str, str],
    record: Path,
    log: Path,
    name: str,
    args: argparse.Namespace,
    console: Console,
) -> int:
    """Run the script, show a progress bar until the script exits, and return its exit status.

    If the script is still running 30 seconds after the LR range test ends, kill it and return 0.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from engine.range_test.recorder import Run

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("lr {task.fields[lr]:.2e}  loss {task.fields[loss]:.4g}"),
        console=console,
        transient=True,
    )
    with log.open("wb") as file, bar:
        task = bar.add_task(name, total=args.steps, lr=args.min, loss=float("nan"))
        process = subprocess.Popen(  # noqa: S603  # the user's command
            command,
            env=os.environ | environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        ended_at = None
        try:
            while process.poll() is None:
                time.sleep(0.1)
                run = Run.read(record) if record.is_file() else Run()
                if run.lrs:
                    bar.update(task, completed=len(run.lrs), lr=run.lrs[-1], loss=run.losses[-1])
                if run.end:
                    ended_at = ended_at or time.monotonic()
                    if time.monotonic() - ended_at > _GRACE:
                        _kill(process)
        except KeyboardInterrupt:
            _kill(process)
            raise
    # If the test was complete, it succeeded even if the script did not exit and was killed.
    return 0 if ended_at is not None and process.returncode < 0 else process.returncode


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the script and all its descendants.

    Killing the process group is not sufficient, because torchrun starts each worker in a
    separate session.
    """
    import signal

    from engine.launch.agent import find_descendants
    from engine.launch.torchrun import remove_directory

    children = find_descendants(process.pid)
    os.killpg(process.pid, signal.SIGKILL)
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    remove_directory(process.pid)


def _find_problem(status: int, run: Run, log: Path, args: argparse.Namespace) -> str:
    """Return the reason why a run's result is unusable, or an empty string if it is usable."""
    from engine.range_test.suggestion import MIN_POINTS

    name = " ".join(args.script).removeprefix("-- ")
    if status != 0 and not run.end:
        last = log.read_text(encoding="utf-8", errors="replace").splitlines()
        lines = "\n".join(last[-_LINES_OF_FAILURE:])
        return f"{name} failed with exit status {status}. Last lines of {log}:\n{lines}"
    if not run.facts:
        if args.engine not in (None, 1):
            return (
                f"{name} created fewer than {args.engine} engines. Pass a lower number to "
                "`--engine`."
            )
        return (
            f"{name} exited without calling engine.initialize. Call it in the script, and train "
            f"with the engine that it returns. The script's output is in {log}."
        )
    if len(run.curve[0]) < MIN_POINTS and not run.end:
        return (
            f"{name} ended after {len(run.lrs)} steps, but the test needs at least "
            f"{MIN_POINTS + 1}. Train for more epochs, or use smaller batches."
        )
    return ""


def _print_result(
    report: LRRangeReport,
    current: dict[str, Any] | None,
    args: argparse.Namespace,
    console: Console,
) -> int:
    from engine.config.edits import write_scheduler
    from engine.display.terminal import supports_color

    picture, data = report.write(args.output)
    terminal = console.file
    width = min(100, shutil.get_terminal_size().columns)
    terminal.write(report.draw_in_terminal(width, color=supports_color(terminal)) + "\n")
    console.print(report.table())
    ends = ", ".join(_END_REASONS.get(run.end, "end of the script") for run in report.runs)
    steps = ", ".join(str(len(run.lrs)) for run in report.runs)
    console.print(f"Stopped after {steps} steps ({ends}). Results: {picture}, {data}", markup=False)
    if report.max_lr is None:
        console.print(f"no suggestion: {report.suggestion.reason}", markup=False)
        return INVALID
    block = report.block(current)
    console.print_json(json.dumps({"scheduler": block}))
    if args.write is not None:
        backup = write_scheduler(args.write, block)
        console.print(
            f"Wrote the OneCycle block to {args.write}. The original file is kept as {backup}.",
            markup=False,
        )
        if "cycle_first_step_size" not in block["params"]:
            console.print(_DEFAULT_SIZES, markup=False)
    return OK
