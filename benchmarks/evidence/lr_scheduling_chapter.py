"""Compare 1Cycle with the schedules in a chapter of "Dive into Deep Learning".

    python benchmarks/evidence/lr_scheduling_chapter.py

The script reproduces the experiments of the chapter "Learning Rate Scheduling": LeNet on
Fashion-MNIST for 30 epochs, with five schedules. The script then trains for 10 epochs with a cosine
schedule, and for 10 epochs with 1Cycle. An LR range test suggests the minimum and maximum learning
rates of 1Cycle.
"""

from __future__ import annotations

from experiment import Experiment, Row, train
from pages import (
    build_figure,
    format_table,
    format_values,
    get_last,
    plot_history,
    plot_lr,
    save_figure,
    write_page,
)
from train import lenet

CHAPTER = {
    "constant": "0.877",
    "square_root": "0.886",
    "multi_factor": "0.869",
    "cosine": "0.904",
    "cosine_with_warmup": "0.901",
}
"""Test accuracy of each schedule, as reported in "Dive into Deep Learning" (PyTorch edition)."""
SHORT = ("cosine_in_10_epochs", "one_cycle")


def run_all(experiment: Experiment) -> None:
    results = experiment.results
    task = experiment.load_images(lenet)
    configs = {name: experiment.read_config(name) for name in (*CHAPTER, *SHORT)}
    bounds = results.get("bounds", lambda: experiment.suggest_bounds(configs["one_cycle"], task))
    configs["one_cycle"]["scheduler"] = bounds["scheduler"]
    for seed in experiment.seeds:
        for name, config in configs.items():

            def run(config: Row = config, seed: int = seed) -> Row:
                return train(config, task, seed)

            results.get(f"{name} {seed}", run)


def report(experiment: Experiment) -> None:
    results = experiment.results
    figure, (lrs, accuracies) = build_figure(2)
    table = []
    for number, name in enumerate((*CHAPTER, *SHORT)):
        rows = results.select(name)
        if not rows:
            continue
        epochs = len(rows[0]["history"])
        measured = [
            format_values(get_last(rows, column))
            for column in ("train_loss", "train_accuracy", "test_accuracy")
        ]
        label = name.replace("_", " ").replace("one cycle", "1Cycle").removesuffix(" in 10 epochs")
        table.append([label, str(epochs), str(len(rows)), *measured, CHAPTER.get(name, "")])
        style = {"color": f"C{number}", "label": f"{label}, {epochs} epochs"}
        scale = epochs / rows[0]["history"][-1]["step"]
        plot_history(accuracies, rows, scale=scale, **style)
        plot_lr(lrs, rows[0], scale=scale, **style)
    lrs.set(xlabel="epoch", ylabel="learning rate")
    accuracies.set(xlabel="epoch", ylabel="test accuracy")
    if not experiment.is_smoke:
        accuracies.set_ylim(0.8, None)
    lrs.legend(fontsize="small")
    save_figure(figure, experiment.output / f"{experiment.name}.png")
    header = ("schedule", "epochs", "seeds", "train loss", "train accuracy", "test accuracy")
    write_page(experiment, format_table((*header, "the chapter's test accuracy"), table))


def main() -> None:
    experiment = Experiment.from_arguments("lr_scheduling_chapter", __doc__)
    run_all(experiment)
    report(experiment)


if __name__ == "__main__":
    main()
