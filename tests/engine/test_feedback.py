"""Feedback schedules in the engine: their losses and metrics, skipped steps, rollback, resuming."""

import dataclasses
import json
import math

import pytest
import torch

import engine
from engine.cli.main import main
from schedules import Horizon, ScheduleError, from_config
from tests.testing.distributed import run_distributed_test

AUTOWU = {"steps_per_epoch": 10, "total_epochs": 20, "test": "robust", "immediate_cooldown": True}


def start(params=AUTOWU, kind="AutoWU", **sections):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1)]
    config = {
        "train_batch_size": 16,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "scheduler": {"type": kind, "params": params},
        **sections,
    }
    return engine.initialize(config=config, model=torch.nn.Sequential(*layers))[0]


def train(trainer, steps, poison=()):
    rows = []
    while trainer.global_steps < steps:
        generator = torch.Generator().manual_seed(trainer.global_steps - trainer.skipped_steps)
        x = torch.randn(16, 8, generator=generator)
        loss = (trainer(x).float() - x.sin().sum(1, keepdim=True)).pow(2).mean()
        rows.append((trainer.get_lr()[0], loss.item()))
        poisoned = trainer.global_steps in poison
        trainer.backward(loss * math.inf if poisoned else loss)
        trainer.step()
    return rows


@pytest.mark.parametrize("rollback", [False, True])
def test_autowu_resumed_takes_the_same_steps(tmp_path, rollback):
    params = AUTOWU | {"rollback": rollback}
    sections = {"engine": {"checkpoint": {"dir": str(tmp_path), "every": 7}}}
    whole = train(start(params), 200)
    resumed = train(start(params, **sections), 53)
    again = start(params, **sections)
    assert again.global_steps == 49
    resumed = resumed[:49] + train(again, 130)
    last = start(params, **sections)
    assert resumed[:126] + train(last, 200) == whole
    assert last.lr_scheduler.decision.lr > 1e-3


def test_rollback_restores_the_weights_of_the_lowest_loss():
    trainer = start(AUTOWU | {"rollback": True})
    lowest, weights = math.inf, None
    while trainer.lr_scheduler.decision is None:
        train(trainer, trainer.global_steps + 1)
        if trainer.lr_scheduler.state.is_lowest:
            weights = [p.detach().clone() for p in trainer.parameters()]
            lowest = trainer.lr_scheduler.state.lowest
    assert lowest < 10
    assert all(map(torch.equal, trainer.parameters(), weights))
    assert trainer.get_lr()[0] == pytest.approx(trainer.lr_scheduler.decision.lr)


def test_report_directory_receives_the_plot_of_the_decision(tmp_path):
    trainer = start(engine={"report": str(tmp_path / "report")})
    train(trainer, 200)
    assert (tmp_path / "report" / "autowu.png").read_bytes().startswith(b"\x89PNG")
    evidence = trainer.lr_scheduler.evidence
    assert evidence.decision == trainer.lr_scheduler.decision
    assert len(evidence.losses) == evidence.decision.step
    lowest = min(zip(evidence.band.mean, evidence.band.positions, strict=True))[1]
    lr = evidence.lrs[0] * (evidence.lrs[-1] / evidence.lrs[0]) ** lowest
    assert lr == pytest.approx(evidence.decision.lr, rel=1e-6)


def test_plot_with_non_finite_losses_writes_a_picture(tmp_path, capsys):
    losses = [2.0 + 0.01 * (step % 7) for step in range(60)] + [math.inf, math.nan, 1e308] * 5
    path, config = tmp_path / "losses.csv", tmp_path / "ds_config.json"
    path.write_text("step,loss\n" + "".join(f"{step},{loss}\n" for step, loss in enumerate(losses)))
    for test in ("robust", "reference"):
        params = AUTOWU | {"test": test, "total_epochs": 15}
        config.write_text(json.dumps({"scheduler": {"type": "AutoWU", "params": params}}))
        picture = tmp_path / "plot.png"
        assert main(["plot", str(config), "--losses", str(path), "-o", str(picture)]) == 0
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert main(["plot", str(config), "--losses", str(path), "--terminal"]) == 0


def test_report_that_cannot_be_written_does_not_stop_training(tmp_path, caplog):
    (tmp_path / "report").write_text("a file")
    trainer = start(engine={"report": str(tmp_path / "report")})
    train(trainer, 200)
    assert trainer.lr_scheduler.decision is not None
    assert "training continues" in caplog.text


def test_autowu_with_skipped_steps_keeps_its_learning_rates():
    fp16 = {"fp16": {"enabled": True, "initial_scale_power": 4}}
    plain = train(start(**fp16), 60)
    trainer = start(**fp16)
    skipping = train(trainer, 63, poison=(5, 6, 30))
    assert trainer.skipped_steps == 3
    applied = [row for step, row in enumerate(skipping) if step not in (5, 6, 30)]
    assert [lr for lr, _ in applied] == [lr for lr, _ in plain]


def test_autowu_receives_the_mean_loss_over_micro_batches():
    trainer = start(gradient_accumulation_steps=2)
    losses = []
    for _ in range(2):
        loss = trainer(torch.randn(8, 8)).pow(2).mean()
        losses.append(loss.item())
        trainer.backward(loss)
        trainer.step()
    assert list(trainer.lr_scheduler.state.losses) == [pytest.approx(sum(losses) / 2)]


def test_plateau_with_metrics_in_some_steps_counts_only_those():
    trainer = start({"patience": 1, "factor": 0.5}, "ReduceLROnPlateau")
    seen = []
    for step in range(8):
        trainer.backward(trainer(torch.randn(16, 8)).pow(2).mean())
        trainer.step(metric=1.0 if step % 2 else None)
        seen.append(trainer.get_lr()[0])
    assert seen == [0.01] * 5 + [0.005] * 3


def test_plateau_with_a_warmup_warms_up_in_steps_without_a_metric():
    trainer = start({"patience": 0, "factor": 0.5, "warmup_steps": 4}, "ReduceLROnPlateau")
    seen = []
    for step in range(9):
        seen.append(trainer.get_lr()[0])
        trainer.backward(trainer(torch.randn(16, 8)).pow(2).mean())
        trainer.step(metric=1.0 if step % 2 else None)
    assert seen == pytest.approx([0, 0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01, 0.01, 0.005])


def test_plateau_metric_inside_a_batch_is_used_at_its_end():
    params = {"patience": 0, "factor": 0.5}
    trainer = start(params, "ReduceLROnPlateau", gradient_accumulation_steps=2)
    for micro_batch in range(8):
        trainer.backward(trainer(torch.randn(8, 8)).pow(2).mean())
        trainer.step(metric=1.0 if micro_batch in (2, 5) else None)
    assert trainer.get_lr() == [0.005]


def test_autowu_with_a_fractional_number_of_epochs_keeps_the_total_steps():
    horizon = Horizon(total_steps=1000, steps_per_epoch=300)
    robust = from_config({"type": "AutoWU", "params": {"test": "robust"}})
    assert robust.resolve(horizon).total_steps == 1000
    assert robust.resolve(dataclasses.replace(horizon, scale_ratio=0.5)).total_steps == 500
    with pytest.raises(ScheduleError, match="1000"):
        from_config({"type": "AutoWU", "params": {}}).resolve(horizon)


def test_autowu_takes_its_epochs_from_the_run_and_the_data():
    data = torch.utils.data.TensorDataset(torch.randn(160, 8))
    config = {
        "train_batch_size": 16,
        "optimizer": {"type": "AdamW"},
        "scheduler": {"type": "AutoWU", "params": {"test": "robust"}},
        "engine": {"max_duration": "30ep"},
    }
    trainer, *_ = engine.initialize(config=config, model=torch.nn.Linear(8, 1), training_data=data)
    params = trainer.lr_scheduler.identity["params"]
    assert (params["steps_per_epoch"], params["total_epochs"]) == (10, 30)


def test_autowu_with_a_direct_loss_backward_raises():
    trainer = start()
    trainer(torch.randn(16, 8)).pow(2).mean().backward()
    with pytest.raises(RuntimeError, match=r"Call `trainer.backward\(loss\)`"):
        trainer.step()


def test_torch_plateau_receives_the_metric():
    config = {"train_batch_size": 4, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    trainer, *_ = engine.initialize(
        config=config,
        model=torch.nn.Linear(2, 1),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=0.5, patience=1
        ),
    )
    lrs = []
    for metric in (1.0, None, 1.0, None, 1.0, 1.0, 0.5):
        trainer.backward(trainer(torch.ones(4, 2)).mean())
        trainer.step(metric=metric)
        lrs.append(trainer.get_lr()[0])
    assert lrs == [0.1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.05]


def test_rollback_on_deepspeed_raises():
    with pytest.raises(engine.ConfigError, match="rollback"):
        start(AUTOWU | {"rollback": True}, engine={"backend": "deepspeed"})


def train_with_autowu(backend):
    """Train past AutoWU's decision and return the learning rate of each step."""
    params = {"steps_per_epoch": 10, "total_epochs": 15, "test": "robust", "max_lr": 10.0}
    trainer = start(params, optimizer={"type": "AdamW"}, engine={"backend": backend})
    micro = trainer.train_micro_batch_size_per_gpu()
    part = slice(trainer.global_rank * micro, (trainer.global_rank + 1) * micro)
    lrs = []
    for step in range(150):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))[part]
        lrs.append(trainer.get_lr()[0])
        trainer.backward((trainer(x) - x.sin().sum(1, keepdim=True)).pow(2).mean())
        trainer.step()
    assert trainer.lr_scheduler.decision is not None
    return lrs


@pytest.mark.slow
def test_autowu_takes_the_same_steps_on_every_backend_and_world_size():
    expected, *others = (
        lrs
        for backend in ("torch", "deepspeed")
        for world_size in (1, 2)
        for lrs in run_distributed_test(train_with_autowu, world_size, backend)
    )
    assert len(expected) == 150
    for lrs in others:
        assert lrs == pytest.approx(expected, rel=1e-5)


def test_checkpoint_override_keeps_the_state_of_an_unchanged_schedule(tmp_path):
    params = {"patience": 0, "factor": 0.5}
    trainer = start(params, "ReduceLROnPlateau")
    for _ in range(4):
        trainer.backward(trainer(torch.randn(16, 8)).pow(2).mean())
        trainer.step(metric=1.0)
    trainer.save_checkpoint(tmp_path)
    again = start(
        params, "ReduceLROnPlateau", engine={"checkpoint": {"dir": str(tmp_path), "override": True}}
    )
    assert again.get_lr() == trainer.get_lr() == [pytest.approx(0.01 / 8)]


def test_plateau_metric_of_a_skipped_step_is_used_in_the_next():
    fp16 = {"fp16": {"enabled": True, "initial_scale_power": 4}}
    trainer = start({"patience": 0, "factor": 0.5}, "ReduceLROnPlateau", **fp16)
    for step in range(4):
        loss = trainer(torch.randn(16, 8)).float().pow(2).mean()
        trainer.backward(loss * math.inf if step == 1 else loss)
        trainer.step(metric=1.0 if step < 2 else None)
    assert trainer.get_lr() == [pytest.approx(0.005)]
