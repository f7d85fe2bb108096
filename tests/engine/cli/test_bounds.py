"""Every command ends in bounded time and memory, whatever the config and the file are."""

import json
import os
import subprocess
import sys

import pytest

from engine.config import ConfigError, load_config
from tests.testing.command_line import run
from tests.testing.fuzz import TARGETS

SGD = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}


@pytest.fixture
def file(tmp_path):
    def write(type_name, max_duration=None, optimizer=SGD, ratio=1.0, **params):
        config = {"train_batch_size": 8, "optimizer": optimizer}
        config["scheduler"] = {"type": type_name, "params": params}
        config["engine"] = {"scale_schedule_ratio": ratio}
        if max_duration is not None:
            config["engine"]["max_duration"] = max_duration
        path = tmp_path / "c.json"
        path.write_text(json.dumps(config))
        return path

    return write


@pytest.mark.parametrize("ratio", [3, 0.3, 7.7])
@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("CyclicLR", {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 15}),
        ("FactorScheduler", {"factor": 0.9, "step": 10}),
        ("CyclicLR", {"base_lr": 0.01, "max_lr": 0.1, "mode": "exp_range", "gamma": 0.99}),
    ],
)
def test_plot_scaled_periods_end(file, name, params, ratio):
    status, out, _ = run("plot", file(name, 100, ratio=ratio, **params), "--csv", "-")
    assert status == 0
    assert len(out.splitlines()) == 1 + int(100 * ratio)


@pytest.mark.parametrize("name", ["StepLR", "CosineAnnealingWarmRestarts"])
def test_plot_long_run_is_sampled(file, name):
    params = {"step_size": 10} if name == "StepLR" else {"T_0": 10, "T_mult": 3}
    path = file(name, 10**12, **params)
    output = path.with_suffix(".png")
    status, out, _ = run("plot", path, "-t", "-o", output)
    assert status == 0
    assert f"1000000000000 steps of {name}, sampled at 10,000 steps" in out
    status, _, err = run("plot", path, "--csv", "-")
    assert status == 2
    assert "at most 10,000,000 steps" in err
    assert len(run("plot", path, "--csv", "-", "--steps", 3)[1].splitlines()) == 4


def test_plot_many_param_groups_is_an_error(file):
    levels = [0.1 + index for index in range(200)]
    path = file("LRRangeTest", lr_range_test_min_lr=levels)
    assert "at most 100 curves" in run("plot", path, "--csv", "-")[2]


def test_plot_long_loss_driven_run_is_an_error(file):
    status, out, _ = run("plot", file("AutoWU", 10**9), "--steps-per-epoch", 10**6)
    assert status == 1
    assert "100,000 steps" in out


@pytest.mark.parametrize(
    ("name", "duration", "params", "message"),
    [
        ("StepLR", 2**53 + 2, {"step_size": 10}, "at most 9,007,199,254,740,992"),
        ("StepLR", None, {"step_size": 2**53 + 2}, "at most 9,007,199,254,740,992"),
        ("StepLR", "1e400ep", {"step_size": 10}, "at most 9,007,199,254,740,992"),
        ("StepLR", "0ep", {"step_size": 10}, "at least 1 step"),
        ("ExponentialLR", 10_000, {"gamma": 10.0}, "must be finite"),
        ("MultiStepLR", 100, {"gamma": 1e200, "milestones": [2, 4]}, "must be finite"),
        ("CosineAnnealingWarmRestarts", None, {"T_0": 5, "T_mult": 2**60}, "`T_mult`"),
    ],
)
def test_validate_values_beyond_floats_are_errors(file, name, duration, params, message):
    path = file(name, duration, **params)
    assert message in run("validate", path)[1]
    with pytest.raises(ConfigError, match=message.replace("`", ".")):
        load_config(path)


def test_validate_restarts_in_a_long_run_are_valid(file):
    path = file("CosineAnnealingWarmRestarts", 10**12, T_0=10, T_mult=3)
    assert run("validate", path)[0] == 0
    assert load_config(path).schedule is not None


def test_plot_autowu_tiny_learning_rates_succeed(file):
    path = file("AutoWU", min_lr=1e-300, max_lr=1e-290)
    assert run("plot", path, "--csv", "-")[0] == 0


def test_validate_deeply_nested_schedules_take_linear_time(file):
    block = {"type": "StepLR", "params": {"step_size": 3}}
    for _ in range(23):
        block = {"type": "ChainedScheduler", "params": {"schedulers": [block]}}
    assert run("validate", file(block["type"], **block["params"]))[0] == 0
    many = {"schedulers": [{"type": "StepLR", "params": {"step_size": 3}}] * 101}
    assert "at most 100 schedules" in run("validate", file("ChainedScheduler", **many))[1]


@pytest.mark.parametrize("form", ["text", "github"])
def test_validate_many_unknown_keys_are_summarized(tmp_path, form):
    path = tmp_path / "c.json"
    keys = {f"k{index}": 1 for index in range(60_000)}
    path.write_text(json.dumps({"train_batch_size": 8, **keys}))
    status, out, _ = run("validate", path, "--format", form)
    assert status == 1
    assert "… and 59,900 more" in out
    assert len(out) < 50_000


def test_validate_errors_are_listed_before_notes(tmp_path):
    path = tmp_path / "c.json"
    deprecated = ",".join(f'"x{index}": 1' for index in range(200))
    path.write_text('{"train_batch_size": 8 /* note */, ' + deprecated + ', "fp16": 3}')
    out = run("validate", path)[1]
    assert "note[" not in out


def test_validate_pipe_or_device_is_an_error(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, "/dev/zero", "/dev/null", tmp_path):
        status, out, _ = run("validate", path)
        assert status == 2
        assert "error[unreadable]" in out
    losses = ("plot", tmp_path / "none.json", "--losses", pipe)
    assert run(*losses)[0] == 2


def test_validate_pipe_of_the_shell_is_read():
    script = "import sys; from engine.cli.main import main; sys.exit(main(sys.argv[1:]))"
    for name in ("/dev/stdin", "/dev/fd/0", "-"):
        done = subprocess.run(
            [sys.executable, "-c", script, "validate", name],
            input='{"train_batch_size": 8}',
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.stdout == f"{name}: valid\n", done.stderr


HOSTILE = '{"train_batch_size": 8, "a\\u001b[2J\\n::error::x, %0A": 1,\n "b": 2}'


def test_validate_control_characters_are_escaped(tmp_path):
    path = tmp_path / "a,b:c.json"
    path.write_text(HOSTILE)
    status, out, _ = run("validate", path)
    assert status == 1
    assert "\x1b" not in out
    assert not any(line.startswith("::") for line in out.splitlines())
    assert "Unknown key `a\\x1b[2J\\n::error::x, %0A`." in out
    out = run("validate", path, "--format", "github")[1]
    first = out.splitlines()[0]
    assert first.startswith("::error file=" + str(path).replace(",", "%2C").replace(":", "%3A"))
    assert "`a\\x1b[2J%0A::error::x, %250A`" in first
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert "\x1b" not in str(error.value)


def test_validate_source_line_cannot_be_a_workflow_command(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{"train_batch_size": 8,\n  ::error::forged\n}')
    out = run("validate", path)[1]
    assert "::error::forged" in out
    assert not any(line.lstrip().startswith("::") for line in out.splitlines())


@pytest.mark.parametrize(
    ("seed", "mutations"),
    [(0, 30), *(pytest.param(seed, 10_000, marks=pytest.mark.long) for seed in range(1, 11))],
)
def test_fuzzed_config_gives_problems_or_a_result(seed, mutations):
    """Neither a traceback, nor an import, nor more than 2 s or 500 MB: see `tests.testing.fuzz`."""
    arguments = ["--seed", str(seed), "--mutations", str(mutations)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.testing.fuzz", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert set(TARGETS) >= {"parse", "validate", "load", "config", "plot"}


@pytest.mark.parametrize("output", [["-t"], ["--csv", "-"], ["-o", "c.png"]])
def test_plot_values_that_overflow_are_an_error(tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "c.json"
    path.write_text('{"scheduler": {"type": "ExponentialLR", "params": {"gamma": 1.5}}}')
    status, out, err = run("plot", path, "--steps", 2000, *output)
    assert (status, out) == (2, "")
    assert f"The schedule of {path} sets `lr` to inf at step 1999." in err
    assert run("plot", path, "--steps", 1000, *output)[0] == 0
