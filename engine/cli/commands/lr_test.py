"""``onecycle lr-test``: the LR range test of an unmodified training script."""

from __future__ import annotations

import argparse
import contextlib
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

from engine.cli.commands.arguments import positive
from engine.distributed.environment import INVALID, OK

if TYPE_CHECKING:
    from rich.console import Console

    from engine.range_test.recorder import Run
    from engine.range_test.report import LRRangeReport
    from engine.range_test.sweep import Sweep

__all__ = ["add", "run"]

_LINES_OF_FAILURE = 15
_GRACE = 30.0  # seconds for a script to write what it writes at its end


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = (
        "Run a training script, unchanged, at learning rates that rise from small to too large, "
        "and say between which to cycle. Its `engine.initialize` sees that a test is on: the sweep "
        "takes the scheduler's place, no checkpoint is written, and the script is ended when the "
        "loss diverges or the sweep is through."
    )
    parser.epilog = (
        "exit status: 0 a suggestion, 1 none, 2 wrong usage\n\nexamples:\n"
        "  onecycle lr-test -- train.py --epochs 1\n"
        "  onecycle lr-test --repeat 3 --write ds_config.json -- train.py\n"
        "  onecycle lr-test --refine --updates 20000 -- train.py\n"
        "  onecycle lr-test --nproc 2 --min 1e-5 --max 1 --steps 300 -- train.py"
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="a config in place of the script's; its block is swept by if it is an LRRangeTest",
    )
    parser.add_argument("--min", type=float, default=1e-6, metavar="LR", help="(default: 1e-6)")
    parser.add_argument("--max", type=float, default=10.0, metavar="LR", help="(default: 10)")
    parser.add_argument("--steps", type=positive, default=250, help="updates (default: 250)")
    parser.add_argument(
        "--shape",
        choices=["exponential", "linear", "staircase"],
        default="exponential",
        help="how the learning rate rises (default: by the same factor in every update)",
    )
    parser.add_argument(
        "--momentum",
        nargs=2,
        type=float,
        metavar=("FROM", "TO"),
        help="let momentum fall meanwhile, as in a cycle's first half: 0.95 0.85",
    )
    parser.add_argument(
        "--divergence",
        type=float,
        default=4.0,
        metavar="X",
        help="end when the smoothed loss is X times the lowest (default: 4)",
    )
    parser.add_argument(
        "--repeat", type=positive, default=1, metavar="N", help="runs, each with a seed of its own"
    )
    parser.add_argument(
        "--refine",
        action="store_true",
        help="then train short 1Cycles of --steps updates each, to five maxima a factor of 2 apart "
        "around the suggestion (to more, until the best lies among them), and suggest the one that "
        "ends lowest; takes five to ten times as long",
    )
    parser.add_argument(
        "--updates",
        type=positive,
        metavar="N",
        help="with --refine: length of the training that is to follow; longer ones bear less, by "
        "(steps / N)**0.32 (https://arxiv.org/abs/2409.19913)",
    )
    parser.add_argument(
        "--nproc", type=positive, default=1, metavar="N", help="processes on this machine"
    )
    parser.add_argument(
        "--write",
        type=Path,
        metavar="FILE",
        help="put the OneCycle block into this config; the old file stays as FILE.bak",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("lr_test"),
        metavar="DIR",
        help="for lr_range.png, report.json and the script's logs (default: lr_test)",
    )
    parser.add_argument("script", nargs=argparse.REMAINDER, help="-- SCRIPT ARGS, or -- COMMAND")


def run(args: argparse.Namespace, out: TextIO) -> int:
    """Run the script, and say what the test found."""
    from rich.console import Console

    from engine.range_test.refinement import refuse_updates
    from engine.range_test.report import LRRangeReport
    from engine.range_test.sweep import Sweep

    command = _command(args)
    refuse_updates(args.refine, args.updates)
    sweep = Sweep(
        args.min,
        args.max,
        args.steps,
        args.shape,
        tuple(args.momentum) if args.momentum else None,
        _block_of(args.config, args.nproc),
        args.divergence,
        config=args.config and str(Path(args.config).resolve()),
    )
    target = args.write or args.config
    # What cannot be written to is known before the test.
    known = _read_block(Path(target), args.nproc) if target else None
    console = Console(file=out, soft_wrap=True)
    args.output.mkdir(parents=True, exist_ok=True)

    def sweep_once(repeat: int) -> Run:
        return _train(command, replace(sweep, seed_offset=repeat), "sweep", args, console)

    def cycle_once(block: dict[str, Any], repeat: int) -> Run:
        cycle = replace(sweep, block=block, divergence=math.inf, seed_offset=repeat)
        name = f"cycle to {block['params']['cycle_max_lr']:.2g}"
        run = _train(command, cycle, name, args, console)
        if not run.end:
            raise _NoTestError(
                f"the script ended after {len(run.lrs)} of the {args.steps} updates of a short "
                "cycle; let it train for more epochs, or give fewer --steps."
            )
        return run

    try:
        report = LRRangeReport(tuple(sweep_once(repeat) for repeat in range(args.repeat)))
        if args.refine:
            steps, updates = args.steps, args.updates
            report = report.refined(cycle_once, steps=steps, updates=updates, known=known)
    except _NoTestError as trouble:
        console.print(f"no suggestion: {trouble}", markup=False)
        return INVALID
    return _tell(report, known, args, console)


class _NoTestError(Exception):
    """A run of the script carries no test; the message says why, and what would help."""


def _train(
    command: Sequence[str], sweep: Sweep, name: str, args: argparse.Namespace, console: Console
) -> Run:
    """Run the script by a sweep, and return what it noted.

    Raises:
        _NoTestError: it failed, or noted too little.
    """
    from engine.range_test.recorder import RECORD, Run

    log = args.output / f"{name.replace(' ', '_')}.{sweep.seed_offset}.log"
    with tempfile.TemporaryDirectory(prefix="onecycle-") as folder:
        record = Path(folder, RECORD)
        environment = replace(sweep, folder=folder).environment()
        status = _follow(command, environment, record, log, name, args, console)
        run = Run.read(record) if record.is_file() else Run()
    trouble = _trouble(status, run, log, args)
    if trouble:
        raise _NoTestError(trouble)
    return run


def _command(args: argparse.Namespace) -> list[str]:
    script = args.script[1:] if args.script[:1] == ["--"] else args.script
    if not script:
        raise ValueError("a script must follow: `onecycle lr-test -- train.py ARGS`.")
    if script[0].endswith(".py") and not Path(script[0]).is_file():
        raise FileNotFoundError(2, "there is no such script", script[0])
    python = [sys.executable] if script[0].endswith(".py") else []
    if args.nproc == 1:
        return [*python, *script]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    flags = [] if python else ["--no-python"]
    return [*launcher, "--nproc_per_node", str(args.nproc), *flags, *script]


def _block_of(config: str | None, nproc: int) -> Any:
    """Return the config's own range test, if that is its schedule."""
    block = _read_block(Path(config), nproc) if config else None
    return block if block and block.get("type") == "LRRangeTest" else None


def _read_block(path: Path, nproc: int) -> dict[str, Any] | None:
    from engine.config import load_config

    block = load_config(path, world_size=nproc).own.get("scheduler")
    return None if block is None else dict(block)


def _follow(
    command: Sequence[str],
    environment: dict[str, str],
    record: Path,
    log: Path,
    name: str,
    args: argparse.Namespace,
    console: Console,
) -> int:
    """Run the script to its end, with a bar of the updates that it has noted."""
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
        process = subprocess.Popen(  # noqa: S603  # what the user asks for
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
    # One that catches the stop, and goes on elsewhere, has told all that it had to tell.
    return 0 if ended_at is not None and process.returncode < 0 else process.returncode


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a script and all that it has started: torchrun's workers have sessions of their own."""
    import signal

    from engine.launch.agent import descendants

    below = descendants(process.pid)
    os.killpg(process.pid, signal.SIGKILL)
    for pid in below:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def _trouble(status: int, run: Run, log: Path, args: argparse.Namespace) -> str:
    """Return why a run carries no test, and what would help."""
    from engine.range_test.suggestion import MIN_POINTS

    name = " ".join(args.script).removeprefix("-- ")
    if status != 0 and not run.end:
        last = log.read_text(encoding="utf-8", errors="replace").splitlines()
        lines = "\n".join(last[-_LINES_OF_FAILURE:])
        return f"{name} failed with status {status}; its last lines ({log} has all):\n{lines}"
    if not run.facts:
        return (
            f"{name} ended without a call of engine.initialize; have it train through the engine "
            f"({log} has what it printed)."
        )
    if len(run.curve[0]) < MIN_POINTS and not run.end:
        return (
            f"{name} ended after {len(run.lrs)} updates, and {MIN_POINTS + 1} must be; let it "
            "train for more epochs, or on smaller batches."
        )
    return ""


def _tell(
    report: LRRangeReport,
    known: dict[str, Any] | None,
    args: argparse.Namespace,
    console: Console,
) -> int:
    import json

    from engine.config.edits import put_scheduler
    from engine.display.terminal import supports_color

    picture, data = report.write(args.output)
    terminal = console.file
    width = min(100, shutil.get_terminal_size().columns)
    terminal.write(report.drawn_on_terminal(width, colour=supports_color(terminal)) + "\n")
    console.print(report.table())
    ends = ", ".join(run.end or "the script's own end" for run in report.runs)
    updates = ", ".join(str(len(run.lrs)) for run in report.runs)
    console.print(f"{updates} updates, ended by {ends}; {picture}, {data}", markup=False)
    if report.max_lr is None:
        console.print(f"no suggestion: {report.suggestion.reason}", markup=False)
        return INVALID
    block = report.block(known)
    console.print_json(json.dumps({"scheduler": block}))
    if args.write is not None:
        backup = put_scheduler(args.write, block)
        console.print(f"written into {args.write}; as it was: {backup}", markup=False)
    return OK
