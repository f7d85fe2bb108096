"""``onecycle lr-test``: unmodified scripts under it, and what it says when one will not do."""

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine import ConfigError
from engine.cli.commands.lr_test import _kill, _read_block
from engine.cli.main import main

EXAMPLE = Path(__file__).parents[3] / "examples" / "fashion_mnist"

SCRIPT = """
import sys
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
trainer.save_checkpoint("mine")
open("after", "w").close()
"""

CATCHES = """
    while True:
        try:
            trainer.step()
        except BaseException:
            continue
        break
"""


def script(folder, body="trainer.step()", scale=""):
    path = folder / "train.py"
    path.write_text(SCRIPT.replace("BODY", body.strip()).replace("SCALE", scale))
    return str(path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lr_test(*arguments):
    out, err = io.StringIO(), io.StringIO()
    status = main(["lr-test", *map(str, arguments)], out, err)
    return status, out.getvalue(), err.getvalue()


def report():
    return json.loads(Path("lr_test/report.json").read_text())


def test_a_script_is_swept_stopped_and_leaves_nothing_behind(folder):
    status, out, _ = lr_test("--min", 1e-5, "--", script(folder), 1000)
    assert status == 0, out
    assert '"type": "OneCycle"' in out
    found = report()
    assert 0.001 < found["suggestion"]["max_lr"] < 1
    assert found["runs"][0]["end"] == "divergence"
    names = {path.name for path in folder.iterdir()}
    assert names == {"train.py", "lr_test"}
    written = {path.name for path in (folder / "lr_test").iterdir()}
    assert written == {"lr_range.png", "report.json", "sweep.0.log"}


@pytest.mark.slow
def test_a_script_that_catches_the_stop_is_cut_off(folder):
    path = script(folder, CATCHES)
    status, out, _ = lr_test("--min", 1e-5, "--", path, 1000)
    assert status == 0, out
    assert not Path("after").exists()


@pytest.mark.slow
def test_the_block_is_written_and_all_else_stays(folder):
    config = folder / "ds_config.json"
    config.write_text('{\n  // of mine\n  "train_batch_size": 8,\n}\n')
    status, out, _ = lr_test("--min", 1e-5, "--write", config, "--", script(folder), 1000)
    assert status == 0, out
    text = config.read_text()
    assert "// of mine" in text
    assert (
        Path("ds_config.json.bak").read_text() == '{\n  // of mine\n  "train_batch_size": 8,\n}\n'
    )
    assert main(["validate", str(config)], io.StringIO(), io.StringIO()) == 0
    highest = report()["suggestion"]["max_lr"]
    assert f'"cycle_max_lr": {highest}' in text


@pytest.mark.slow
def test_short_cycles_refine_the_suggestion(folder):
    arguments = ("--min", 1e-5, "--steps", 60, "--refine", "--updates", 600)
    status, out, _ = lr_test(*arguments, "--", script(folder), 1000)
    assert status == 0, out
    found = report()
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
def test_a_script_too_short_for_a_cycle_is_told_so(folder):
    arguments = ("--min", 1e-4, "--max", 1, "--steps", 60, "--refine")
    status, out, _ = lr_test(*arguments, "--", script(folder), 50)
    assert status == 1
    assert "ended after 50 of the 60 updates of a short cycle" in out


@pytest.mark.slow
def test_several_seeds_and_another_shape(folder):
    path = script(folder)
    arguments = ("--repeat", 2, "--shape", "linear", "--min", 1e-4, "--max", 2, "--steps", 100)
    lr_test(*arguments, "--", path, 1000)
    runs = report()["runs"]
    assert len(runs) == 2
    steps = [b - a for a, b in zip(runs[0]["lr"], runs[0]["lr"][1:], strict=False)]
    assert steps == pytest.approx([steps[0]] * len(steps))


@pytest.mark.slow
def test_the_configs_own_range_test_is_swept_by(folder):
    params = {"lr_range_test_min_lr": 1e-3, "lr_range_test_step_size": 5}
    params |= {"lr_range_test_step_rate": 5.0, "lr_range_test_staircase": True}
    config = {"train_batch_size": 8, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    config["scheduler"] = {"type": "LRRangeTest", "params": params}
    Path("c.json").write_text(json.dumps(config))
    lr_test("--config", "c.json", "--", script(folder), 1000)
    lrs = report()["runs"][0]["lr"]
    assert lrs[:11] == pytest.approx([0.001] * 5 + [0.006] * 5 + [0.011])


@pytest.mark.slow
def test_the_configs_own_range_test_reports_in_an_ordinary_run(folder):
    body = "trainer.step()\n    print(trainer.get_lr()[0])"
    path = Path(script(folder, body))
    block = '{"type": "LRRangeTest", "params": {"lr_range_test_min_lr": 1e-3, '
    block += '"lr_range_test_step_size": 2}}'
    path.write_text(path.read_text().replace('{"type": "WarmupLR"}', block))
    done = subprocess.run([sys.executable, path, "30"], check=True, capture_output=True, text=True)
    assert "LR range test: " in done.stderr
    assert Path("after").exists(), "an ordinary run goes on to its end"
    assert len(report()["runs"][0]["lr"]) == 30


@pytest.mark.parametrize(
    "make, arguments, message",
    [
        (script, [5], "ended after 5 updates, and 21 must be"),
        pytest.param(
            lambda folder: script(folder, scale="* 0"),
            [999],
            "the loss does not fall",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda folder: script(folder, scale="* float('nan')"),
            [999],
            "at least 20 losses are required, got 0",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda folder: script(folder, "1 / 0"),
            [999],
            "ZeroDivisionError",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_no_suggestion_says_why(folder, make, arguments, message):
    status, out, _ = lr_test("--steps", 60, "--", make(folder), *arguments)
    assert status == 1
    assert "no suggestion" in out
    assert message in out


def test_a_script_that_never_calls_the_engine(folder):
    (folder / "train.py").write_text("print('hello')")
    status, out, _ = lr_test("--", "train.py")
    assert status == 1
    assert "train.py ended without a call of engine.initialize" in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "a script must follow"),
        (["--min", "1", "--max", "0.5", "--", "train.py"], "`min_lr` must be > 0"),
        (["--updates", "9", "--", "train.py"], "`updates` has no effect without `refine`"),
        (["--", "missing.py"], "missing.py: there is no such script"),
    ],
)
def test_wrong_usage(folder, arguments, message):
    (folder / "train.py").write_text("")
    status, _, err = lr_test(*arguments)
    assert status == 2
    assert message in err


def test_all_that_a_script_has_started_is_killed_with_it():
    """torchrun starts each rank in a session of its own, out of reach of a group's signal."""
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
    raise AssertionError("the rank lives on")


def test_a_config_is_proved_for_the_ranks_of_the_test(tmp_path):
    path = tmp_path / "ds_config.json"
    sizes = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}
    path.write_text(json.dumps({"train_batch_size": 8, **sizes}))
    assert _read_block(path, 2) is None
    with pytest.raises(ConfigError, match="but is 8"):
        _read_block(path, 1)


@pytest.mark.slow
def test_one_and_two_processes_and_both_backends_suggest_the_same(folder):
    path = Path(script(folder))
    other = folder / "on_deepspeed.py"
    other.write_text(path.read_text().replace('"engine": {', '"engine": {"backend": "deepspeed", '))
    found = []
    for script_of, processes in ((path, 1), (path, 2), (other, 1), (other, 2)):
        status, out, _ = lr_test("--min", 1e-5, "--nproc", processes, "--", script_of, 1000)
        assert status == 0, out
        facts = report()["runs"][0]["facts"]
        assert facts["world_size"] == processes
        assert facts["backend"] == ("torch" if script_of is path else "deepspeed")
        found.append(report()["suggestion"]["max_lr"])
    assert found == pytest.approx([found[0]] * 4)


@pytest.mark.slow
def test_the_example_runs_under_it(folder):
    status, out, _ = lr_test("--", EXAMPLE / "train.py")
    assert status == 0, out
    assert 0.001 < report()["suggestion"]["max_lr"] < 0.1
    assert {path.name for path in folder.iterdir()} == {"lr_test"}
