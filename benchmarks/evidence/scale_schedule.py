"""Compare the accuracy of runs with four values of ``scale_schedule_ratio``.

    python benchmarks/evidence/scale_schedule.py

Composer's ``scale_schedule_ratio`` multiplies the length of a run and all durations of its
schedule. The script trains an MLP on Fashion-MNIST, with images downsampled to 14 x 14. It uses two
4-epoch schedules: a cosine schedule, and a step schedule with two milestones. Each is scaled to 1,
2, 4 and 8 epochs. For comparison, other runs use the unscaled schedules but end after 1 or 2
epochs.
"""

from __future__ import annotations

from batch_scaling import build_mlp
from experiment import Config, Experiment, Row, train
from pages import (
    build_figure,
    format_mean,
    format_table,
    get_last,
    plot_lr,
    save_figure,
    write_page,
)

RATIOS = (0.25, 0.5, 1.0, 2.0)
SCHEDULES = ("cosine", "step")


def run_all(experiment: Experiment) -> None:
    task = experiment.load_images(build_mlp, pooling=2)
    for seed in experiment.seeds:
        for name in SCHEDULES:
            for ratio in RATIOS:
                config = experiment.read_config(name)
                steps = 4 * -(-len(task.train) // config["train_batch_size"])
                config["engine"]["scale_schedule_ratio"] = ratio

                def run(config: Config = config, seed: int = seed) -> Row:
                    return train(config, task, seed)

                experiment.results.get(f"{name} {ratio} {seed}", run)
                if ratio < 1:
                    config["engine"]["scale_schedule_ratio"] = 1.0
                    config["engine"]["steps_this_run"] = int(ratio * steps)
                    experiment.results.get(f"{name} {ratio} cut {seed}", run)


def report(experiment: Experiment) -> None:
    results = experiment.results
    figure, (lrs, accuracies) = build_figure(2)
    table = []
    for number, name in enumerate(SCHEDULES):
        means = []
        for ratio in RATIOS:
            rows = results.select(f"{name} {ratio}")
            last = get_last(rows, "test_accuracy")
            means.append(sum(last) / len(last))
            cut = get_last(results.select(f"{name} {ratio} cut"), "test_accuracy")
            steps = rows[0]["history"][-1]["step"]
            table.append([name, f"{ratio:g}", str(steps), format_mean(last), format_mean(cut)])
            label = name if ratio == 1 else None
            plot_lr(lrs, rows[0], color=f"C{number}", label=label)
            accuracies.plot([ratio] * len(last), last, ".", color=f"C{number}")
        accuracies.plot(RATIOS, means, color=f"C{number}", label=name)
    lrs.set(xlabel="step", ylabel="learning rate")
    lrs.legend(fontsize="small")
    accuracies.set(xlabel="scale_schedule_ratio", ylabel="test accuracy", xscale="log")
    accuracies.set_xticks(RATIOS, [f"{ratio:g}" for ratio in RATIOS], minor=False)
    accuracies.set_xticks([], minor=True)
    accuracies.legend(fontsize="small")
    save_figure(figure, experiment.output / f"{experiment.name}.png")
    header = ("schedule", "ratio", "steps", "test accuracy", "4-epoch schedule, same steps")
    write_page(experiment, format_table(header, table))


def main() -> None:
    experiment = Experiment.from_arguments("scale_schedule", __doc__)
    run_all(experiment)
    report(experiment)


if __name__ == "__main__":
    main()
