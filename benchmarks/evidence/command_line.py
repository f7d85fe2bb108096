"""Train a small GPT with SambaFlow's four schedules, selected by command-line arguments.

    python benchmarks/evidence/command_line.py

All runs use the config ``configs/command_line/gpt.json``. Command-line arguments from
``engine.add_schedule_arguments`` override its settings. With ``--steps_this_run``, one run is
repeated in two halves, which are compared with the uninterrupted run.
"""

from __future__ import annotations

import shutil
import tempfile

import train_gpt
from experiment import Experiment, Row
from pages import build_figure, format_mean, format_table, save_figure, write_page

ARGUMENTS = {
    "fixed": "--lr_schedule fixed_lr",
    "step": "--lr_schedule step_schedule",
    "polynomial": "--lr_schedule polynomial_decay_schedule_with_warmup --warmup_steps 20",
    "cosine": "--lr_schedule cosine_schedule_with_warmup --warmup_steps 20 --end_lr_ratio 0.2",
}
SHARED = "--learning_rate 0.003"
AVERAGED = 10
"""Number of losses that are averaged for each point of the plot."""


def build_arguments(experiment: Experiment, name: str) -> str:
    steps = 30 if experiment.is_smoke else 200
    return f"{ARGUMENTS[name]} {SHARED} --max_steps {steps}"


def run_gpt(arguments: str, seed: int, windows: int = 640) -> Row:
    row = train_gpt.main([*arguments.split(), "--seed", str(seed), "--windows", str(windows)])
    return row | {"data": "documentation of Python", "arguments": arguments}


def compare_halves(experiment: Experiment, whole: Row) -> Row:
    """Repeat the run ``whole`` in two halves, and compare the learning rates and losses."""
    half = len(whole["lr"]) // 2
    directory = tempfile.mkdtemp()
    arguments = f"{whole['arguments']} --steps_this_run {half} --checkpoints {directory}"
    try:
        first, second = (run_gpt(arguments, experiment.seeds[0]) for _ in range(2))
    finally:
        shutil.rmtree(directory)
    return {
        "steps": [len(first["lr"]), len(second["lr"])],
        "last_lr_of_first": first["lr"][-1],
        "equal_lr": first["lr"] + second["lr"] == whole["lr"],
        "equal_loss": first["loss"] + second["loss"] == whole["loss"],
    }


def run_all(experiment: Experiment) -> None:
    for seed in experiment.seeds:
        for name in ARGUMENTS:
            arguments = build_arguments(experiment, name)

            def run(arguments: str = arguments, seed: int = seed) -> Row:
                return run_gpt(arguments, seed)

            experiment.results.get(f"{name} {seed}", run)
    whole = experiment.results.rows[f"cosine {experiment.seeds[0]}"]
    experiment.results.get("halves", lambda: compare_halves(experiment, whole))


def report(experiment: Experiment) -> None:
    results = experiment.results
    figure, (lrs, losses) = build_figure(2)
    table = []
    for number, name in enumerate(ARGUMENTS):
        rows = results.select(name)
        used = rows[0]["lr"]
        style = {"color": f"C{number}", "label": name}
        lrs.plot(used, **style)
        means = [sum(each) / len(rows) for each in zip(*(row["loss"] for row in rows), strict=True)]
        starts = range(0, len(means), AVERAGED)
        averages = [sum(means[start : start + AVERAGED]) / AVERAGED for start in starts]
        losses.plot([start + AVERAGED / 2 for start in starts], averages, **style)
        table.append([
            f"`{rows[0]['arguments']}`",
            f"{max(used):.3g}",
            f"{used[-1] / max(used):.3f}",
            format_mean(row["held_out_loss"] for row in rows),
        ])  # fmt: skip
    lrs.set(xlabel="step", ylabel="learning rate")
    losses.set(xlabel="step", ylabel="training loss")
    lrs.legend(fontsize="small")
    if not experiment.is_smoke:
        losses.set_ylim(None, 3)
    save_figure(figure, experiment.output / f"{experiment.name}.png")
    halves = results.rows["halves"]
    header = ("arguments", "peak", "last learning rate / peak", "loss on held-out text")
    equal = format_table(
        ("cosine in two halves", "steps", "equal learning rates", "equal losses"),
        [
            (
                f"`--steps_this_run {halves['steps'][0]}`, twice",
                " + ".join(map(str, halves["steps"])),
                "yes, bit for bit" if halves["equal_lr"] else "no",
                "yes, bit for bit" if halves["equal_loss"] else "no",
            )
        ],
    )
    write_page(experiment, format_table(header, table), equal)


def main() -> None:
    experiment = Experiment.from_arguments("command_line", __doc__)
    run_all(experiment)
    report(experiment)


if __name__ == "__main__":
    main()
