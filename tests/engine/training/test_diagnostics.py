"""Test wall_clock_breakdown, dump_state and flops_profiler on the PyTorch backend."""

import pickle
import re
import time

import pytest
import torch

import engine
from engine.training import pass_timer

X = torch.ones(2, 4)


class SlowLinear(torch.nn.Linear):
    def forward(self, x):
        time.sleep(0.01)
        return super().forward(x)


def build(**config):
    config = {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "SGD", "params": {"lr": 0.125}},
        "engine": {"backend": "torch"},
        **config,
    }
    return engine.initialize(config=config, model=SlowLinear(4, 1))[0]


def train(trainer, steps):
    for _ in range(steps * trainer.gradient_accumulation_steps()):
        trainer.backward(trainer(X).mean())
        trainer.step()


@pytest.fixture
def lines(caplog):
    caplog.set_level("INFO", "onecycle")
    return lambda: [record.getMessage() for record in caplog.records]


def test_wall_clock_breakdown_logs_mean_times_with_each_progress_line(lines):
    trainer = build(wall_clock_breakdown=True, steps_per_print=2)
    train(trainer, 4)
    with torch.no_grad():
        trainer(X)
    number = r"(\d+\.\d\d) ms"
    pattern = rf"step (\d): mean times: forward {number}, backward {number}, step {number}"
    found = [match.groups() for line in lines() if (match := re.fullmatch(pattern, line))]
    assert [step for step, *_ in found] == ["2", "4"]
    assert all(10 <= float(forward) < 20 for _, forward, _, _ in found)  # the mean, not the sum


def test_timer_waits_for_the_device_around_each_call(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(pass_timer, "read_clock", lambda device: next(clock))
    timer = pass_timer.PassTimer(torch.device("cpu"))
    measured = timer.measure("forward", lambda: None)
    measured()
    measured()
    with torch.no_grad():
        measured()
    assert timer.pop_means() == {"forward": 1000}
    assert next(clock) == 4


def test_timer_does_not_grow_with_the_number_of_calls():
    timer = pass_timer.PassTimer(torch.device("cpu"))
    measured = timer.measure("forward", lambda: None)
    sizes = []
    for calls in (1, 1000):
        for _ in range(calls):
            measured()
        sizes.append(len(pickle.dumps(vars(timer))))
    assert sizes[1] < sizes[0] + 10


def test_disabled_diagnostics_change_no_method_and_synchronize_nothing(monkeypatch):
    monkeypatch.setattr(torch.cpu, "synchronize", lambda: pytest.fail("synchronized"))
    trainer = build(wall_clock_breakdown=False, dump_state=False, flops_profiler={"enabled": False})
    train(trainer, 2)
    assert not {"forward", "backward", "step"} & vars(trainer._backend).keys()


def test_dump_state_logs_the_config_with_defaults_and_the_state(lines):
    train(build(dump_state=True), 1)
    for line in (
        "  gradient_accumulation_steps = 2",
        "  fp16.enabled = false",
        '  optimizer.type = "SGD"',
        "  global_steps = 0",
        "  world_size = 1",
    ):
        assert line in lines()
    assert any(line.startswith("  param group 0: 2 parameters, {'lr': 0.125") for line in lines())


@pytest.mark.parametrize("timed", [False, True])
def test_flops_profiler_writes_one_report_at_its_step(tmp_path, timed, lines):
    path = tmp_path / "new" / "profile.txt"
    profiler = {"enabled": True, "profile_step": 2, "output_file": str(path)}
    trainer = build(flops_profiler=profiler, wall_clock_breakdown=timed, steps_per_print=1)
    train(trainer, 2)
    assert not path.exists()
    train(trainer, 1)
    report = path.read_text()
    assert "profile of one micro-batch after 2 steps" in report
    assert "SlowLinear: 5 (100.0%), 16 FLOPs (100.0%)" in report
    path.unlink()
    train(trainer, 1)
    assert not path.exists()
    times = [line for line in lines() if "mean times: forward" in line]
    assert len(times) == 4 * timed


def test_flops_profiler_prints_without_an_output_file(capsys):
    train(build(flops_profiler={"enabled": True, "detailed": False}), 2)
    printed = capsys.readouterr().out
    assert "profile of one micro-batch after 1 steps" in printed
    assert "%" not in printed


def test_profiled_step_trains_like_any_other():
    torch.manual_seed(0)
    plain = build()
    torch.manual_seed(0)
    profiled = build(flops_profiler={"enabled": True}, wall_clock_breakdown=True)
    train(plain, 3)
    train(profiled, 3)
    torch.testing.assert_close(plain.module.weight, profiled.module.weight, rtol=0, atol=0)
