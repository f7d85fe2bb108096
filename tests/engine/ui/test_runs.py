"""Finding runs in directories, and their checkpoints, settings and reports."""

import json

import numpy as np
import pytest
import torch

import engine
from engine.ui.decision import recompute_decision
from engine.ui.metrics import Series
from engine.ui.run_page import RunPage
from engine.ui.runs import compare_settings, find_runs
from schedules import AutoWU
from schedules.core.trace import complete_base, replay


def write_metric(directory, name="train_loss", values=(3.0, 2.0)):
    directory.mkdir(parents=True, exist_ok=True)
    rows = "".join(f"{8 * (step + 1)},{value}\n" for step, value in enumerate(values))
    (directory / f"Train_Samples_{name}.csv").write_text(f"step,{name}\n{rows}")


@pytest.mark.parametrize(
    ("directories", "names"),
    [
        (["."], ["root"]),
        (["metrics"], ["root"]),
        (["csv_monitor/job"], ["root"]),
        (["metrics", "metrics-2"], ["root/metrics", "root/metrics-2"]),
        (["a/metrics", "b/metrics"], ["root/a", "root/b"]),
        ([], ["root"]),
    ],
)
def test_each_directory_of_metrics_is_a_run(tmp_path, directories, names):
    root = tmp_path / "root"
    root.mkdir()
    for directory in directories:
        write_metric(root / directory)
    assert [run.name for run in find_runs([root])] == names


def test_csv_and_event_files_of_a_job_are_one_run(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    write_metric(tmp_path / "csv_monitor" / "job", values=[1.0])
    with SummaryWriter(str(tmp_path / "runs" / "job")) as writer:
        writer.add_scalar("Train/Samples/train_loss", 5.0, 8)
        writer.add_scalar("Validation/loss", 7.0, 8)
    (run,) = find_runs([tmp_path])
    run.update()
    assert run.series["train_loss"].values.tolist() == [1.0]
    assert run.series["Validation_loss"].values.tolist() == [7.0]


def test_new_metrics_of_a_known_directory_are_added_to_its_run(tmp_path):
    page = RunPage([tmp_path])
    assert page.actions["metrics"]({}).header["panels"] == []
    write_metric(tmp_path / "metrics")
    page.actions["summary"]({})
    reply = page.actions["metrics"]({})
    assert [panel["label"] for panel in reply.header["panels"]] == ["loss"]


def train(directory, lr, steps=6):
    config = {
        "train_batch_size": 4,
        "optimizer": {"type": "SGD", "params": {"lr": lr, "momentum": 0.9}},
        "scheduler": {"type": "StepLR", "params": {"step_size": 2}},
        "csv_monitor": {"enabled": True, "output_path": str(directory), "job_name": "metrics"},
        "engine": {"checkpoint": {"dir": str(directory / "checkpoints"), "every": 3}},
    }
    trainer, *_ = engine.initialize(model=torch.nn.Linear(4, 1), config=config)
    for _ in range(steps):
        trainer.backward(trainer(torch.ones(4, 4)).pow(2).mean())
        trainer.step()
    trainer.destroy()


def test_page_of_two_runs_shows_their_metrics_checkpoints_and_differences(tmp_path):
    for name, lr in (("a", 0.1), ("b", 0.2)):
        train(tmp_path / name, lr)
    page = RunPage([tmp_path / "a", tmp_path / "b"])
    summary = page.actions["summary"]({})
    assert summary["runs"] == ["a", "b"]
    assert [(each["run"], each["step"]) for each in summary["checkpoints"]] == [
        ("a", 3),
        ("a", 6),
        ("b", 3),
        ("b", 6),
    ]
    assert summary["settings"] == [{"key": "optimizer.params.lr", "values": ["0.1", "0.2"]}]
    reply = page.actions["metrics"]({})
    panels = {panel["name"]: panel["columns"] for panel in reply.header["panels"]}
    assert list(panels)[:3] == ["train_loss", "lr", "momentum"]
    assert [column["run"] for column in panels["lr"]] == ["a", "b"]
    arrays = iter(zip(reply.arrays[::2], reply.arrays[1::2], strict=True))
    shown = [
        (panel["name"], column["run"], *next(arrays))
        for panel in reply.header["panels"]
        for column in panel["columns"]
    ]
    steps, lrs = next((x, y) for name, run, x, y in shown if (name, run) == ("lr", "b"))
    assert steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert lrs == pytest.approx([0.2, 0.2, 0.02, 0.02, 0.002, 0.002])
    by_sample = page.actions["metrics"]({"axis": "samples"})
    assert by_sample.arrays[0].tolist() == [4, 8, 12, 16, 20, 24]


def test_checkpoint_that_is_being_written_or_damaged_is_left_out(tmp_path):
    train(tmp_path, 0.1)
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / ".global_step9.partial").mkdir()
    (checkpoints / "global_step6" / "manifest.json").write_text("{")
    summary = RunPage([tmp_path]).actions["summary"]({})
    assert [each["step"] for each in summary["checkpoints"]] == [3]


def test_config_in_the_directory_is_the_settings_of_the_run(tmp_path):
    (tmp_path / "package.json").write_text('{"name": "x"}')
    (tmp_path / "ds_config.json").write_text('{"train_batch_size": 8 /* all */, "fp16": {}}')
    (run,) = find_runs([tmp_path])
    settings = run.read_settings([])
    assert compare_settings({"x": settings}) == [
        {"key": "train_batch_size", "values": ["8"]},
        {"key": "fp16", "values": ["{}"]},
    ]


def test_report_of_a_range_test_is_reduced_for_the_page(tmp_path):
    lrs = np.geomspace(1e-4, 1, 60).tolist()
    losses = [1.0 if lr < 1e-3 else 0.3 if lr < 0.1 else lr * 10 for lr in lrs]
    report = {
        "suggestion": {"max_lr": 0.05, "min_lr": 0.005, "reason": "", "rules": {"steepest": 1e-3}},
        "runs": [{"lr": lrs, "loss": [*losses[:-1], None], "momentum": [], "facts": {}}],
    }
    (tmp_path / "lr_test").mkdir()
    (tmp_path / "lr_test" / "report.json").write_text(json.dumps(report))
    (test,) = RunPage([tmp_path]).actions["summary"]({})["rangeTests"]
    assert (test["minLr"], test["maxLr"]) == (0.005, 0.05)
    assert test["sweeps"] == [{"lr": lrs, "loss": [*losses[:-1], None]}]


def test_decision_of_autowu_is_that_of_the_schedule():
    rng = np.random.default_rng(0)
    losses = np.concatenate([np.linspace(4, 1, 150), np.linspace(1, 6, 150)])
    losses = losses + rng.normal(0, 0.02, 300)
    params = {"steps_per_epoch": 20, "total_epochs": 20}
    evidence = replay(AutoWU(**params), losses.tolist(), base=complete_base({"lr": 0.1})).evidence
    settings = {
        "scheduler": {"type": "AutoWU", "params": params},
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    }
    series = {"train_loss": Series(np.arange(300.0), losses)}
    decision = recompute_decision(settings, series)
    assert evidence is not None
    assert decision["step"] == evidence.decision.step
    assert decision["losses"] == pytest.approx(list(evidence.losses))
    json.dumps(decision, allow_nan=False)


@pytest.mark.parametrize(
    "scheduler", [None, 3, {}, {"type": "OneCycle"}, {"type": "AutoWU", "params": {"x": 1}}]
)
def test_other_schedules_have_no_decision(scheduler):
    series = {"train_loss": Series(np.arange(3.0), np.ones(3))}
    assert recompute_decision({"scheduler": scheduler}, series) is None
