"""``onecycle lr-test`` on unmodified scripts, and its errors for unusable scripts."""

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from engine import ConfigError
from engine.cli.commands.lr_test import (
    _build_command,
    _kill,
    _read_block,
    _read_cycle,
    add_arguments,
)
from engine.cli.main import main
from engine.config import load_config
from engine.config.edits import write_scheduler
from engine.range_test.recorder import Run
from engine.range_test.report import LRRangeReport
from schedules import Horizon, from_config

EXAMPLE = Path(__file__).parents[3] / "examples" / "fashion_mnist"

SCRIPT = """
import sys
import tempfile
import torch
import engine

torch.manual_seed(0)
weight = torch.nn.Linear(4, 1)
config = {
    "train_batch_size": 8,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
    "scheduler": {"type": "WarmupLR"},
    "csv_monitor": {"enabled": True, "output_path": "monitor"},
    "engine": {"checkpoint": {"dir": "checkpoints", "every": 1}},
}
trainer, *_ = engine.initialize(config=config, model=weight)
micro = trainer.train_micro_batch_size_per_gpu()
for step in range(int(sys.argv[1])):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    x = x[trainer.global_rank * micro :][:micro]
    trainer.backward((trainer(x) - x.sum(1, keepdim=True)).pow(2).mean() SCALE)
    BODY
trainer.save_checkpoint("manual")
open("after", "w").close()
"""

CATCH_STOP = """
    while True:
        try:
            trainer.step()
        except BaseException:
            continue
        break
"""


def write_script(directory, body="trainer.step()", scale=""):
    path = directory / "train.py"
    path.write_text(SCRIPT.replace("BODY", body.strip()).replace("SCALE", scale))
    return str(path)


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lr_test(*arguments):
    out, err = io.StringIO(), io.StringIO()
    status = main(["lr-test", *map(str, arguments)], out, err)
    return status, out.getvalue(), err.getvalue()


def read_report():
    return json.loads(Path("lr_test/report.json").read_text())


@pytest.mark.slow
def test_lr_test_stops_the_script_and_writes_only_its_results(directory):
    status, out, _ = lr_test("--min", 1e-5, "--", write_script(directory), 1000)
    assert status == 0, out
    assert '"type": "OneCycle"' in out
    found = read_report()
    assert 0.001 < found["suggestion"]["max_lr"] < 1
    assert found["runs"][0]["end"] == "divergence"
    names = {path.name for path in directory.iterdir()}
    assert names == {"train.py", "lr_test"}
    written = {path.name for path in (directory / "lr_test").iterdir()}
    assert written == {"lr_range.png", "report.json", "sweep.0.log"}


@pytest.mark.slow
def test_lr_test_script_that_catches_the_stop_is_killed(directory):
    path = write_script(directory, CATCH_STOP)
    status, out, _ = lr_test("--min", 1e-5, "--", path, 1000)
    assert status == 0, out
    assert not Path("after").exists()


@pytest.mark.slow
def test_lr_test_write_changes_only_the_scheduler_block(directory):
    config = directory / "ds_config.json"
    config.write_text('{\n  // user comment\n  "train_batch_size": 8,\n}\n')
    status, out, _ = lr_test("--min", 1e-5, "--write", config, "--", write_script(directory), 1000)
    assert status == 0, out
    text = config.read_text()
    assert "// user comment" in text
    assert (
        Path("ds_config.json.bak").read_text()
        == '{\n  // user comment\n  "train_batch_size": 8,\n}\n'
    )
    assert main(["validate", str(config)], io.StringIO(), io.StringIO()) == 0
    highest = read_report()["suggestion"]["max_lr"]
    assert f'"cycle_max_lr": {highest}' in text
    assert "increases for 2,000 steps" in out


@pytest.mark.slow
def test_lr_test_refine_suggests_the_maximum_of_the_best_cycle(directory):
    arguments = ("--min", 1e-5, "--steps", 60, "--refine", "--training-steps", 600)
    status, out, _ = lr_test(*arguments, "--", write_script(directory), 1000)
    assert status == 0, out
    found = read_report()
    cycles = found["refinement"]["cycles"]
    maxima = [cycle["max_lr"] for cycle in cycles]
    assert maxima == pytest.approx([maxima[0] * 2**k for k in range(len(maxima))])
    lowest = min(cycles, key=lambda cycle: cycle["losses"])["max_lr"]
    assert lowest / 2 < found["refinement"]["lowest"] < lowest * 2
    shrunk = found["refinement"]["lowest"] * 0.1**0.32
    assert found["suggestion"]["max_lr"] == pytest.approx(shrunk, rel=0.05)
    assert found["scheduler"]["params"]["cycle_max_lr"] == found["suggestion"]["max_lr"]
    logs = {path.name for path in Path("lr_test").glob("cycle_to_*.0.log")}
    assert len(logs) == len(cycles)


@pytest.mark.slow
def test_lr_test_refine_script_too_short_reports_the_step(directory):
    arguments = ("--min", 1e-4, "--max", 1, "--steps", 60, "--refine")
    status, out, _ = lr_test(*arguments, "--", write_script(directory), 50)
    assert status == 1
    assert "exited after 50 of the 60 steps" in out


@pytest.mark.slow
def test_lr_test_repeat_with_linear_shape_runs_twice(directory):
    path = write_script(directory)
    arguments = ("--repeat", 2, "--shape", "linear", "--min", 1e-4, "--max", 2, "--steps", 100)
    lr_test(*arguments, "--", path, 1000)
    runs = read_report()["runs"]
    assert len(runs) == 2
    steps = [b - a for a, b in zip(runs[0]["lr"], runs[0]["lr"][1:], strict=False)]
    assert steps == pytest.approx([steps[0]] * len(steps))


@pytest.mark.slow
def test_lr_test_config_with_range_test_defines_the_sweep(directory):
    params = {"lr_range_test_min_lr": 1e-3, "lr_range_test_step_size": 5}
    params |= {"lr_range_test_step_rate": 5.0, "lr_range_test_staircase": True}
    config = {"train_batch_size": 8, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    config["scheduler"] = {"type": "LRRangeTest", "params": params}
    Path("c.json").write_text(json.dumps(config))
    lr_test("--config", "c.json", "--", write_script(directory), 1000)
    lrs = read_report()["runs"][0]["lr"]
    assert lrs[:11] == pytest.approx([0.001] * 5 + [0.006] * 5 + [0.011])


TWO_ENGINES = """
import torch
import engine

config = {
    "train_batch_size": 8,
    "optimizer": {"type": "SGD", "params": {"lr": 0.125}},
    "scheduler": {"type": "ConstantLR", "params": {"factor": 0.5, "total_iters": 1000}},
    "csv_monitor": {"enabled": True, "output_path": "monitor"},
    "engine": {"checkpoint": {"dir": "checkpoints", "every": 1}},
}
teacher, student = (
    engine.initialize(config=config, model=torch.nn.Linear(4, 1))[0] for _ in range(2)
)
for step in range(40):
    for trainer in (teacher, student):
        trainer.backward(trainer(torch.ones(8, 4)).pow(2).mean())
        trainer.step()
    teacher.save_checkpoint("manual")
    print("teacher", teacher.get_lr())
"""


def test_lr_test_script_with_two_engines_must_select_one(directory):
    Path("train.py").write_text(TWO_ENGINES)
    status, out, _ = lr_test("--", "train.py")
    assert status == 1
    assert "`--engine 1` tests the first engine" in out


def test_lr_test_engine_tests_only_the_selected_one(directory):
    Path("train.py").write_text(TWO_ENGINES)
    lr_test("--engine", 2, "--steps", 30, "--divergence", 1e9, "--", "train.py")
    [run] = read_report()["runs"]
    assert len(run["lr"]) == 30
    assert run["lr"][0] < run["lr"][-1]
    lines = Path("lr_test/sweep.0.log").read_text().splitlines()
    assert lines.count("teacher [0.0625]") == 29
    assert {path.name for path in directory.iterdir()} == {"train.py", "lr_test"}


@pytest.mark.slow
def test_lr_test_engine_that_the_script_does_not_create_is_reported(directory):
    Path("train.py").write_text(TWO_ENGINES)
    status, out, _ = lr_test("--engine", 3, "--", "train.py")
    assert status == 1
    assert "train.py created fewer than 3 engines" in out


@pytest.mark.slow
def test_two_range_tests_of_a_script_write_two_reports(directory):
    lines = TWO_ENGINES.splitlines()
    lines = [line for line in lines if "checkpoint" not in line]
    [index] = [index for index, line in enumerate(lines) if "scheduler" in line]
    lines[index] = '"scheduler": {"type": "LRRangeTest", "params": {"lr_range_test_min_lr": 1e-3}},'
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, capture_output=True)
    assert Path("lr_test/report.json").exists()
    assert Path("lr_test_2/report.json").exists()


@pytest.mark.slow
def test_range_test_in_config_writes_the_report_without_lr_test(directory):
    body = "trainer.step()\n    print(trainer.get_lr()[0])"
    path = Path(write_script(directory, body))
    block = '{"type": "LRRangeTest", "params": {"lr_range_test_min_lr": 1e-3, '
    block += '"lr_range_test_step_size": 2}}'
    path.write_text(path.read_text().replace('{"type": "WarmupLR"}', block))
    done = subprocess.run([sys.executable, path, "30"], check=True, capture_output=True, text=True)
    assert "LR range test" in done.stderr
    assert Path("after").exists(), "the script must not be stopped"
    assert len(read_report()["runs"][0]["lr"]) == 30
    done = subprocess.run([sys.executable, path, "10"], check=True, capture_output=True, text=True)
    assert "the script ended after 10 steps, but the test needs at least 21;" in done.stderr


@pytest.mark.parametrize(
    "make, arguments, message",
    [
        (write_script, [5], "ended after 5 steps"),
        pytest.param(
            lambda directory: write_script(directory, scale="* 0"),
            [999],
            "loss",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda directory: write_script(directory, scale="* float('nan')"),
            [999],
            "at least 20 losses",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda directory: write_script(directory, "1 / 0"),
            [999],
            "ZeroDivisionError",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_lr_test_without_suggestion_prints_the_reason(directory, make, arguments, message):
    status, out, _ = lr_test("--steps", 60, "--", make(directory), *arguments)
    assert status == 1
    assert "no suggestion" in out
    assert message in out


def test_lr_test_script_without_initialize_prints_the_reason(directory):
    (directory / "train.py").write_text("print('hello')")
    status, out, _ = lr_test("--", "train.py")
    assert status == 1
    assert "train.py exited without calling engine.initialize" in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "No script was given"),
        (["--min", "1", "--max", "0.5", "--", "train.py"], "`min_lr`"),
        (["--steps", "20", "--", "train.py"], "`--steps` must be >= 21, got 20."),
        (["--training-steps", "9", "--", "train.py"], "`training_steps`"),
        (["--", "missing.py"], "missing.py: script not found"),
    ],
)
def test_lr_test_wrong_usage_exits_with_2(directory, arguments, message):
    (directory / "train.py").write_text("")
    status, _, err = lr_test(*arguments)
    assert status == 2
    assert message in err


def test_kill_ends_descendants_in_other_sessions():
    """torchrun starts ranks in separate sessions, which a signal to the group does not reach."""
    rank = "import time; time.sleep(60)"
    launcher = f"""import subprocess, sys, time
rank = subprocess.Popen([sys.executable, "-c", {rank!r}], start_new_session=True)
print(rank.pid, flush=True)
time.sleep(60)"""
    command = [sys.executable, "-c", launcher]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        stat = Path(f"/proc/{int(process.stdout.readline())}/stat")
        assert stat.exists()
        _kill(process)
    for _ in range(100):
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("the rank still runs")


def test_kill_of_torchrun_removes_its_temporary_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    command = _build_command(parser.parse_args(["--nproc", "2", "--", "sh", "-c", "sleep 60"]))
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("torchelastic_*/*")):
        assert process.poll() is None
        time.sleep(0.05)
    _kill(process)
    assert list(tmp_path.iterdir()) == []


def test_suggested_cycle_keeps_its_length_and_ignores_a_length_that_is_not_in_the_file(tmp_path):
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps({"train_batch_size": 8}))
    assert _read_cycle(path, 1, ["engine.max_duration=10ep"])["params"] == {}
    params = {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2, "cycle_first_step_size": 300}
    cycle = {"type": "OneCycle", "params": params}
    config = {"train_batch_size": 8, "engine": {"max_duration": 1000}, "scheduler": cycle}
    path.write_text(json.dumps(config))
    assert _read_cycle(path, 1) == cycle


def test_read_block_validates_the_config_for_the_number_of_ranks(tmp_path):
    path = tmp_path / "ds_config.json"
    sizes = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}
    path.write_text(json.dumps({"train_batch_size": 8, **sizes}))
    assert _read_block(path, 2) is None
    with pytest.raises(ConfigError, match="`train_batch_size`"):
        _read_block(path, 1)


@pytest.mark.parametrize(
    "scheduler",
    [
        {},
        {"scheduler": {"type": "WarmupLR"}},
        {"scheduler": {"type": "LRRangeTest"}},
        {"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2}}},
    ],
)
def test_suggested_cycle_takes_the_whole_run_if_its_length_is_known(tmp_path, scheduler):
    path = tmp_path / "ds_config.json"
    config = {"train_batch_size": 8, "engine": {"max_duration": "10ep"}}
    path.write_text(json.dumps(config | scheduler))
    lrs = [10 ** (-5 + k / 25) for k in range(150)]
    losses = [2.3 - 1.5 / (1 + (1e-3 / lr) ** 2) + (lr / 0.1) ** 2 for lr in lrs]
    report = LRRangeReport((Run(lrs, losses, [None] * 150),))
    write_scheduler(path, report.block(_read_cycle(path, 1)))
    schedule = from_config(load_config(path).raw["scheduler"])
    lrs = [schedule(step, horizon=Horizon(total_steps=100)) for step in range(101)]
    assert lrs.index(report.max_lr) == 30
    assert lrs[0] == lrs[100] == report.min_lr


@pytest.mark.slow
def test_lr_test_suggestion_is_the_same_on_backends_and_ranks(directory, monkeypatch):
    (directory / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(directory / "tmp"))
    path = Path(write_script(directory))
    other = directory / "on_deepspeed.py"
    other.write_text(path.read_text().replace('"engine": {', '"engine": {"backend": "deepspeed", '))
    found = []
    for script_path, processes in ((path, 1), (path, 2), (other, 1), (other, 2)):
        status, out, _ = lr_test("--min", 1e-5, "--nproc", processes, "--", script_path, 1000)
        assert status == 0, out
        facts = read_report()["runs"][0]["facts"]
        assert facts["world_size"] == processes
        assert facts["backend"] == ("torch" if script_path is path else "deepspeed")
        found.append(read_report()["suggestion"]["max_lr"])
    assert found == pytest.approx([found[0]] * 4)
    assert list((directory / "tmp").glob("torchelastic_*")) == []


@pytest.mark.slow
def test_lr_test_set_overrides_the_config_of_the_script(directory):
    script = write_script(directory)
    arguments = ("--set", "train_batch_size=4", "--set", "bf16.enabled=true", "--steps", 60)
    lr_test(*arguments, "--", script, 1000)
    facts = read_report()["runs"][0]["facts"]
    assert (facts["train_batch_size"], facts["precision"]) == (4, "bf16")


@pytest.mark.slow
def test_lr_test_example_gets_a_suggestion(directory):
    status, out, _ = lr_test("--", EXAMPLE / "train.py")
    assert status == 0, out
    assert 0.001 < read_report()["suggestion"]["max_lr"] < 0.1
    assert {path.name for path in directory.iterdir()} == {"lr_test"}
