"""The report of a run: its contents, when it is written, and runs that resume."""

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import engine
from engine.training import run_report
from engine.training.events import Event
from engine.training.run_report import RunReport
from tests.engine import test_feedback
from tests.testing.distributed import run_distributed_test

CYCLE = {
    "type": "OneCycle",
    "params": {"cycle_min_lr": 0.01, "cycle_max_lr": 0.05, "cycle_first_step_size": 4},
}


def read_page(path):
    (found,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', Path(path).read_text()
    )
    return json.loads(found)


def read_panels(path):
    return {
        panel["name"]: dict(zip(panel["steps"], panel["lines"][0]["values"], strict=True))
        for panel in read_page(path)["panels"]
    }


def train(steps, report, *, poison=(), backend="torch", checkpoints=None, **sections):
    own = {"backend": backend, "report": str(report)}
    if checkpoints is not None:
        own["checkpoint"] = {"dir": str(checkpoints), "every": 2, "keep": 9}
    config = {
        "train_batch_size": 4,
        "optimizer": {"type": "AdamW", "params": {"weight_decay": 0.25}},
        "scheduler": CYCLE,
        "engine": own,
        **sections,
    }
    torch.manual_seed(0)
    trainer, *_ = engine.initialize(config=config, model=torch.nn.Linear(3, 1))
    used = {}
    while trainer.global_steps < steps:
        step = trainer.global_steps
        lr = trainer.get_lr()[0]
        x = torch.ones(4 // trainer.world_size, 3)
        loss = trainer(x).float().pow(2).mean()
        used[step + 1] = (lr, loss.item())
        trainer.backward(loss * math.inf if step in poison else loss)
        trainer.step()
    trainer.report(val_loss=1.5)
    trainer.destroy()
    return used


def test_report_has_the_values_of_each_step(tmp_path):
    used = train(6, tmp_path / "report.html", poison=[2], checkpoints=tmp_path / "checkpoints")
    panels = read_panels(tmp_path / "report.html")
    assert list(panels) == [
        "train_loss",
        "lr",
        "momentum",
        "weight_decay",
        "grad_norm",
        "samples_per_second",
        "skipped_steps",
        "val_loss",
    ]
    assert panels["lr"] == {step: lr for step, (lr, _) in used.items()}
    losses = {step: None if step == 3 else loss for step, (_, loss) in used.items()}
    assert panels["train_loss"] == pytest.approx(losses)
    assert panels["skipped_steps"] == {1: 0, 2: 0, 3: 1, 4: 1, 5: 1, 6: 1}
    assert panels["val_loss"] == {6: 1.5}
    page = read_page(tmp_path / "report.html")
    assert (page["title"], page["status"]) == ("Report of config", "")
    assert ["steps", "6"] in page["facts"]
    setup, checkpoints = page["tables"]
    assert ["precision", "fp32"] in setup["rows"]
    assert [row[1] for row in checkpoints["rows"]] == ["6", "4", "2"]
    assert [mark["position"] for mark in page["marks"]] == [2, 4, 6]
    assert json.loads(page["config"])["scheduler"] == CYCLE


def test_report_without_the_suffix_html_is_a_directory(tmp_path):
    train(2, tmp_path / "results")
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["report.html"]


def test_report_of_a_resumed_run_continues_the_first_part(tmp_path):
    path, checkpoints = tmp_path / "report.html", tmp_path / "checkpoints"
    train(6, tmp_path / "whole.html")
    train(5, path, checkpoints=checkpoints)
    # The last two steps are trained again, as after a crash.
    for tag in ("global_step5", "global_step4"):
        for each in (checkpoints / tag).iterdir():
            each.unlink()
        (checkpoints / tag).rmdir()
    train(6, path, checkpoints=checkpoints)
    whole, resumed = read_panels(tmp_path / "whole.html"), read_panels(path)
    assert resumed["lr"] == whole["lr"]
    assert resumed["train_loss"] == whole["train_loss"]
    assert resumed["val_loss"] == {6: 1.5}
    assert [mark["position"] for mark in read_page(path)["marks"]] == [2, 4, 6]


def test_report_of_a_new_run_replaces_the_old_one(tmp_path):
    train(4, tmp_path / "report.html")
    train(2, tmp_path / "report.html")
    assert list(read_panels(tmp_path / "report.html")["lr"]) == [1, 2]


@pytest.mark.parametrize("text", ["<p>another page</p>", "", None])
def test_resumed_run_without_a_readable_report_starts_a_new_one(tmp_path, text, caplog):
    path, checkpoints = tmp_path / "report.html", tmp_path / "checkpoints"
    train(2, path, checkpoints=checkpoints)
    path.unlink()
    if text is not None:
        path.write_text(text)
    train(4, path, checkpoints=checkpoints)
    assert list(read_panels(path)["lr"]) == [3, 4]
    assert ("starting a new report" in caplog.text) == (text is not None)


def test_failed_report_does_not_stop_training(tmp_path, caplog):
    (tmp_path / "file").write_text("not a directory")
    used = train(3, tmp_path / "file" / "report.html")
    assert len(used) == 3
    assert "training continues, but" in caplog.text


def test_report_is_written_while_the_run_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(run_report, "_INTERVAL", 0.0)
    report = RunReport(tmp_path / "report.html", {}, "config")
    report.write_events([Event("Train/Samples/step", 1, 4), Event("Train/Samples/lr", 0.5, 4)])
    assert read_page(report.path)["status"] == "training"
    assert read_panels(report.path)["lr"] == {1: 0.5}
    report.close()
    assert read_page(report.path)["status"] == ""


def test_report_of_a_script_that_does_not_call_destroy_is_written_at_exit(tmp_path):
    code = (
        "import torch, engine\n"
        "config = {'train_batch_size': 2, 'optimizer': {'type': 'SGD', 'params': {'lr': 0.1}},\n"
        "          'engine': {'report': 'report.html'}}\n"
        "trainer, *_ = engine.initialize(config=config, model=torch.nn.Linear(2, 1))\n"
        "for _ in range(3):\n"
        "    trainer.backward(trainer(torch.ones(2, 2)).mean()); trainer.step()\n"
    )
    root = str(Path(__file__).parents[3])
    environment = {**os.environ, "PYTHONPATH": root}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert list(read_panels(tmp_path / "report.html")["lr"]) == [1, 2, 3]


def test_number_of_points_is_bounded_and_keeps_the_mean(tmp_path, monkeypatch):
    monkeypatch.setattr(run_report, "_MAX_POINTS", 8)
    report = RunReport(tmp_path / "report.html", {}, "config")
    for step in range(1, 65):
        events = {"step": step, "train_loss": float(step), "skipped_steps": 0}
        report.write_events([Event(f"Train/Samples/{k}", v, step) for k, v in events.items()])
    report.close()
    losses = read_panels(report.path)["train_loss"]
    assert 4 <= len(losses) <= 8
    assert list(losses)[-1] == 64
    assert sum(losses.values()) / len(losses) == pytest.approx(32.5)


def test_param_groups_with_different_values_share_a_panel(tmp_path):
    report = RunReport(tmp_path / "report.html", {}, "config")
    events = {"step": 1, "lr": 0.1, "lr_group_1": 0.2}
    report.write_events([Event(f"Train/Samples/{k}", v, 4) for k, v in events.items()])
    report.close()
    (panel,) = read_page(report.path)["panels"]
    assert {line["label"]: line["values"] for line in panel["lines"]} == {
        "group 0": [0.1],
        "group 1": [0.2],
    }


def test_decision_of_autowu_is_in_the_report_and_survives_a_resume(tmp_path):
    path, checkpoints = tmp_path / "report.html", tmp_path / "checkpoints"
    sections = {"report": str(path), "checkpoint": {"dir": str(checkpoints), "every": 7}}
    for steps in (130, 135):
        trainer = test_feedback.start(engine=sections)
        test_feedback.train(trainer, steps)
        trainer.destroy()
        decision = read_page(path)["decision"]
        step = decision["marks"][0]["position"]
        assert decision["text"].startswith(f"The warmup ended after step {step}, at a learning")
        losses = decision["panels"][0]["lines"][0]
        assert sum(value is not None for value in losses["values"]) == step
        assert len(read_panels(path)["lr"]) == steps
    assert (tmp_path / "autowu.png").is_file()


def train_on_rank(directory, backend):
    train(3, Path(directory) / "report.html", backend=backend)


@pytest.mark.parametrize("backend", ["torch", "deepspeed"])
def test_only_rank_0_writes_the_report(tmp_path, backend):
    run_distributed_test(train_on_rank, 2, str(tmp_path), backend)
    assert list(read_panels(tmp_path / "report.html")["lr"]) == [1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_recording_a_step_takes_less_than_a_tenth_of_a_millisecond(tmp_path):
    report = RunReport(tmp_path / "report.html", {}, "config")
    names = ("lr", "momentum", "train_loss", "grad_norm", "samples_per_second", "skipped_steps")
    best = math.inf
    for start in range(0, 2000, 200):
        begin = time.perf_counter()
        for step in range(start, start + 200):
            events = [Event(f"Train/Samples/{name}", 1.0, step) for name in names]
            report.write_events([*events, Event("Train/Samples/step", step, step)])
        best = min(best, (time.perf_counter() - begin) / 200)
    report.close()
    assert best < 1e-4
