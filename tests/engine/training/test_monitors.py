"""Monitors write the values of each step, at its number of samples, in readable formats."""

import csv
import gc
import shutil
import sys
import threading
import types
import warnings

import pytest
import torch

import engine

CYCLE = {
    "type": "OneCycle",
    "params": {"cycle_min_lr": 0.01, "cycle_max_lr": 0.05, "cycle_first_step_size": 4},
}


def train(steps, poison=(), **sections):
    config = {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"weight_decay": 0.25}},
        "scheduler": CYCLE,
        **sections,
    }
    torch.manual_seed(0)
    trainer, *_ = engine.initialize(config=config, model=torch.nn.Linear(3, 1))
    used = []
    for step in range(steps):
        used.append((trainer.get_lr()[0], trainer.get_momentum()[0]))
        losses = []
        for _ in range(2):
            loss = trainer(torch.ones(2, 3)).pow(2).mean()
            losses.append(loss.item())
            trainer.backward(loss * float("inf") if step in poison else loss)
            trainer.step()
        used[-1] += (sum(losses) / 2,)
    return used


def rows(directory, name):
    with (directory / f"Train_Samples_{name}.csv").open() as file:
        header, *found = csv.reader(file)
    assert header == ["step", name]
    return {int(step): float(value) for step, value in found}


def test_csv_monitor_writes_the_values_of_each_step(tmp_path):
    section = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
    used = train(5, poison=[2], csv_monitor=section)
    directory = tmp_path / "job"
    samples = [4 * (step + 1) for step in range(5)]
    assert list(rows(directory, "lr").items()) == list(
        zip(samples, [u[0] for u in used], strict=True)
    )
    assert list(rows(directory, "momentum").values()) == [u[1] for u in used]
    assert set(rows(directory, "weight_decay").values()) == {0.25}
    losses = rows(directory, "train_loss")
    assert [losses[at] for at in (4, 8, 16)] == pytest.approx([used[k][2] for k in (0, 1, 3)])
    assert list(rows(directory, "skipped_steps").values()) == [0, 0, 1, 1, 1]
    assert list(rows(directory, "step").values()) == [1, 2, 3, 4, 5]
    assert rows(directory, "grad_norm")[4] > 0
    assert min(rows(directory, "samples_per_second").values()) > 0


def test_tensorboard_monitor_writes_readable_events(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        section = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
        used = train(3, tensorboard=section)
        events = EventAccumulator(str(tmp_path / "job"))
        events.Reload()
    scalars = events.Scalars("Train/Samples/lr")
    assert [scalar.step for scalar in scalars] == [4, 8, 12]
    assert [scalar.value for scalar in scalars] == pytest.approx([u[0] for u in used])


class WandbRun:
    """A fake wandb run with the method that the monitor uses."""

    def __init__(self, **settings):
        self.settings = settings
        self.logged = []

    def log(self, values, step):
        self.logged.append((step, values))


@pytest.mark.parametrize("mode", [None, "online"])
def test_wandb_monitor_logs_each_step_at_its_samples(monkeypatch, mode):
    runs = []

    def init(**settings):
        runs.append(WandbRun(**settings))
        return runs[0]

    wandb = types.ModuleType("wandb")
    wandb.init = init
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if mode is not None:
        monkeypatch.setenv("WANDB_MODE", mode)
    used = train(3, wandb={"enabled": True, "project": "digits", "team": "us"})
    (run,) = runs
    assert run.settings == {
        "project": "digits",
        "group": None,
        "entity": "us",
        "mode": mode or "offline",
    }
    lrs = [(step, *values.values()) for step, values in run.logged if "Train/Samples/lr" in values]
    assert lrs == [(4 * (k + 1), lr) for k, (lr, *_) in enumerate(used)]


def test_wandb_monitor_without_wandb_raises():
    with pytest.raises(ValueError, match="wandb is not installed"):
        train(1, wandb={"enabled": True})


@pytest.mark.parametrize("sections", [{}, {"steps_per_print": 10**9}])
def test_number_of_losses_that_an_engine_keeps_does_not_grow(sections):
    """DeepSpeed users set `steps_per_print` to a huge number to disable log lines."""
    config = {"train_batch_size": 2, "optimizer": {"type": "SGD"}, **sections}
    trainer, *_ = engine.initialize(config=config, model=torch.nn.Linear(3, 1))

    def tensors_after(steps):
        for _ in range(steps):
            trainer.backward(trainer(torch.ones(2, 3)).mean())
            trainer.step()
        gc.collect()
        return sum(type(each) is torch.Tensor for each in gc.get_objects())

    # The losses of a log line are summed 100 at a time.
    assert tensors_after(100) == tensors_after(200)


def start_monitored(tmp_path, *, groups=None, **sections):
    """Start a run that saves checkpoints every two steps and writes CSV files to ``logs``."""
    checkpoint = {"dir": str(tmp_path / "checkpoints"), "every": 2} | sections.pop("checkpoint", {})
    config = {
        "train_batch_size": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
        "csv_monitor": {"enabled": True, "output_path": str(tmp_path / "logs"), "job_name": "job"},
        "engine": {"checkpoint": checkpoint},
        **sections,
    }
    model = torch.nn.Linear(1, 1)
    parameters = groups and groups(model)
    return engine.initialize(config=config, model=model, model_parameters=parameters)[0]


def step(trainer, times=1):
    for _ in range(times):
        trainer.backward(trainer(torch.ones(1, 1)).mean())
        trainer.step()


def read_steps(tmp_path, job="job"):
    return list(rows(tmp_path / "logs" / job, "step").items())


def test_new_run_gets_its_own_directory_and_resumed_run_continues_its_own(tmp_path):
    step(start_monitored(tmp_path), 2)
    step(start_monitored(tmp_path, checkpoint={"resume": "never"}), 5)  # saved after step 4
    with (tmp_path / "logs/job-2/Train_Samples_step.csv").open("a") as file:
        file.write("6,6")  # cut off by a crash
    resumed = start_monitored(tmp_path)
    assert resumed.global_steps == 4
    step(resumed, 3)
    assert read_steps(tmp_path) == [(1, 1.0), (2, 2.0)]
    assert read_steps(tmp_path, "job-2") == [(k, float(k)) for k in range(1, 8)]
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["job", "job-2"]


def test_run_that_only_loads_a_checkpoint_keeps_the_rows_after_it(tmp_path):
    step(start_monitored(tmp_path), 3)
    assert start_monitored(tmp_path).global_steps == 2
    assert len(read_steps(tmp_path)) == 3


def test_engines_of_one_process_never_share_a_directory(tmp_path):
    first = start_monitored(tmp_path)
    second = start_monitored(tmp_path, checkpoint={"dir": str(tmp_path / "others")})
    step(first, 2)
    step(second, 1)
    resumed = start_monitored(tmp_path)
    step(resumed, 1)
    step(first, 1)  # `resumed` has taken its directory over
    assert read_steps(tmp_path) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert read_steps(tmp_path, "job-2") == [(1, 1.0)]
    assert read_steps(tmp_path, "job-3") == [(3, 3.0)]


def test_monitors_write_to_directories_named_after_this_library(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(1, csv_monitor={"enabled": True}, tensorboard={"enabled": True})
    assert (tmp_path / "csv_monitor/onecycle/Train_Samples_lr.csv").is_file()
    assert list((tmp_path / "runs/onecycle").glob("events*"))


def test_monitors_with_the_same_directory_share_it(tmp_path):
    section = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(1, csv_monitor=section, tensorboard=section)
    assert [path.name for path in tmp_path.iterdir()] == ["job"]


def test_resumed_run_continues_its_tensorboard_curves_and_destroy_ends_the_threads(tmp_path):
    threads = threading.active_count()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        section = {"enabled": True, "output_path": str(tmp_path), "job_name": "board"}
        for steps in (3, 2):  # the second run resumes after step 2
            trainer = start_monitored(tmp_path, tensorboard=section)
            step(trainer, steps)
            assert threading.active_count() > threads
            trainer.destroy()
            assert threading.active_count() == threads
            # As if the run had been killed before it saved its last step.
            shutil.rmtree(tmp_path / "checkpoints" / "global_step3", ignore_errors=True)
        events = EventAccumulator(str(tmp_path / "board"))
        events.Reload()
    scalars = events.Scalars("Train/Samples/step")
    assert [(scalar.step, scalar.value) for scalar in scalars] == [(k, k) for k in (1, 2, 3, 4)]


def test_tensorboard_thread_of_a_deleted_engine_ends(tmp_path):
    threads = threading.active_count()
    section = {"enabled": True, "output_path": str(tmp_path), "job_name": "board"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = {"train_batch_size": 1, "optimizer": {"type": "SGD"}, "tensorboard": section}
        trainer, *_ = engine.initialize(config=config, model=torch.nn.Linear(1, 1))
        step(trainer)
    assert threading.active_count() > threads
    del trainer
    gc.collect()
    assert threading.active_count() == threads


def test_monitors_receive_the_values_of_every_param_group_if_they_differ(tmp_path):
    def groups(model):
        return [
            {"params": [model.weight], "weight_decay": 0.25},
            {"params": [model.bias], "lr": 0.125, "weight_decay": 0.0},
        ]

    step(start_monitored(tmp_path, groups=groups))
    directory = tmp_path / "logs/job"
    names = ("lr", "lr_group_1", "weight_decay", "weight_decay_group_1")
    assert [rows(directory, name)[1] for name in names] == [0.5, 0.125, 0.25, 0.0]
    assert not list(directory.glob("*momentum_group*"))


def test_csv_monitor_and_log_accept_groups_with_different_keys(tmp_path, caplog):
    class Mixed(torch.optim.Optimizer):
        def step(self, closure=None):
            pass

    model = torch.nn.Linear(3, 1)
    keys = ({"momentum": 0.95}, {"betas": (0.9, 0.99)}, {})
    parameters = [model.weight, model.bias, torch.nn.Parameter(torch.ones(1))]
    groups = [
        {"params": [parameter], "lr": 0.5, **each}
        for parameter, each in zip(parameters, keys, strict=True)
    ]
    section = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
    config = {"train_batch_size": 2, "csv_monitor": section, "steps_per_print": 1}
    trainer, *_ = engine.initialize(config=config, model=model, optimizer=Mixed(groups, {}))
    with caplog.at_level("INFO", "onecycle"):
        trainer.backward(trainer(torch.ones(2, 3)).mean())
        trainer.step()
    assert trainer.get_mom() == [0.95, (0.9, 0.99), 0.0]
    assert trainer.get_momentum() == [0.95, 0.9, 0.0]
    assert "lr 0.5, momentum 0.95 0.9 0" in caplog.text
    assert rows(tmp_path / "job", "momentum") == {2: 0.95}
    assert rows(tmp_path / "job", "momentum_group_1") == {2: 0.9}
    assert rows(tmp_path / "job", "momentum_group_2") == {2: 0.0}
