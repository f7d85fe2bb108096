"""Output of the commands in a terminal: lines that fit, examples that run, and completion."""

import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from engine.cli.main import main
from engine.cli.parser import COMMANDS, build_command_parser, build_parser
from engine.config.rules.pages import RULEBOOK
from engine.display.terminal import format_rows, wrap
from engine.display.terminal_plots import choose_ticks, draw_on_terminal
from schedules import SCHEDULES
from tests.testing.schedule_instances import TUTORIAL

ROOT = Path(__file__).parents[3]
MISTAKES = """{
  "train_batch_size": 7, "train_micro_batch_size_per_gpu": 2, "gradient_cliping": 1.0, "s": "auto",
  "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_steps": 100, "total_num_steps": 10}}
}
"""


class Terminal(io.StringIO):
    """A text stream with the interface of a terminal."""

    def isatty(self):
        return True


def run(*arguments, stream):
    main([str(argument) for argument in arguments], stream, stream)
    return stream.getvalue()


@pytest.fixture(params=[80, 120])
def columns(request, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(request.param))
    monkeypatch.setenv("LINES", "24")
    monkeypatch.setenv("NO_COLOR", "1")
    return request.param


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("ds_config.json").write_text(json.dumps({"train_batch_size": 8, "scheduler": TUTORIAL}))
    Path("mistakes.json").write_text(MISTAKES)
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        ["validate", "mistakes.json"],
        ["validate", "none.json"],
        ["config", "ds_config.json"],
        ["explain"],
        ["schedules"],
        *(["explain", rule] for rule in RULEBOOK),
        *(["schedules", name] for name in SCHEDULES),
        ["schedules", "OneCicle"],
        ["explain", "unknwon-key"],
    ],
    ids=" ".join,
)
def test_output_fits_the_terminal_and_is_wrapped_only_between_words(files, columns, arguments):
    shown = run(*arguments, stream=Terminal())
    assert max(map(len, shown.splitlines())) <= columns
    if arguments[0] != "validate":  # it also prints a part of a line, as wide as the terminal
        assert shown.split() == run(*arguments, stream=io.StringIO()).split()


@pytest.mark.slow
def test_doctor_fits_the_terminal(columns):
    lines = run("doctor", stream=Terminal()).splitlines()
    assert "Training:" in lines
    # The path of a lock of DeepSpeed's builds is not broken, so that it can be copied.
    assert max(len(line) for line in lines if "/lock" not in line) <= columns


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits_the_terminal(columns, name):
    parser = build_command_parser(name) if name else build_parser()
    assert max(map(len, parser.format_help().splitlines())) <= columns


@pytest.mark.parametrize("height", [24, 40])
@pytest.mark.parametrize("extra", [[], ["--compare", "WarmupLR", "StepLR"], ["--log"]])
def test_terminal_plot_fits_one_screen(files, columns, height, extra, monkeypatch):
    monkeypatch.setenv("LINES", str(height))
    shown = run("plot", "ds_config.json", "--terminal", *extra, stream=Terminal()).splitlines()
    assert height - 4 <= len(shown) < height  # one line is left for the prompt
    assert max(map(len, shown)) == columns


def test_terminal_plot_labels_steps_and_values_that_exist():
    values = [0.001 + 0.003 * min(k, 100 - k) / 50 for k in range(101)]
    *_, axis, labels = draw_on_terminal({"lr": values}, "title", size=(80, 24)).splitlines()
    assert labels.split() == ["0", "20", "40", "60", "80", "100"]
    assert axis.count("┬") == 6
    assert list(choose_ticks(values, 8).values())[:: len(choose_ticks(values, 8)) - 1] == [
        "0.001",
        "0.004",
    ]


def test_ticks_of_a_constant_and_of_a_logarithmic_axis():
    assert choose_ticks([0.3, 0.3], 5) == {0.3: "0.3"}
    assert list(choose_ticks([3e-6, 0.02], 9, is_log=True).values()) == [
        *("3e-06", "1e-05", "0.0001", "0.001", "0.02"),
    ]
    assert choose_ticks([], 5) == {}


@pytest.mark.parametrize(
    ("low", "high"), [(1e-4, 1e-4 + 2e-15), (0.9, 0.9001), (1000, 1000.4), (1e12, 1e12 + 5)]
)
def test_ticks_of_a_narrow_range_have_different_labels(low, high):
    ticks = choose_ticks([low, high], 8)
    shown = [float(label.replace(",", "")) for label in ticks.values()]
    assert len(shown) > 2
    assert shown == sorted(set(shown))


@pytest.mark.parametrize("log", [False, True])
def test_terminal_plot_of_values_near_the_largest_float_has_labels(log):
    values = [sys.float_info.max / 4, sys.float_info.max]
    drawn = draw_on_terminal({"lr": values}, "title", log=log)
    assert "1.8e+308┤" in drawn
    assert "4.49e+307┤" in drawn


def test_widths_count_terminal_columns():
    assert list(format_rows([("日本", "a"), ("e\u0301", "b")], None)) == [
        "日本  a",
        "e\u0301     b",
    ]
    assert wrap("日本 日本 日本", 9, indent=0) == ["日本 日本", "日本"]


def test_table_puts_a_cell_that_does_not_fit_below_the_others():
    rows = [("name" * 15, "word " * 12), ("short", "text")]
    lines = list(format_rows(rows, 70))
    assert lines[0] == "name" * 15
    assert lines[1].startswith("    word word")
    assert lines[-1] == f"{'short':60}  text"


def list_examples(*names):
    found = []
    for name in names:
        examples = build_command_parser(name).epilog.partition("examples:\n")[2]
        found += [line.strip() for line in examples.splitlines()]
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples(name):
    assert list_examples(name)


TRAIN = """
import sys
import torch
import engine

def build_model():
    return torch.nn.Linear(4, 1)

if __name__ == "__main__":
    torch.manual_seed(0)
    inputs = torch.randn(512, 4)
    data = torch.utils.data.TensorDataset(inputs, inputs.sum(dim=1, keepdim=True))
    config = sys.argv[1] if len(sys.argv) > 1 else "ds_config.json"
    trainer, *_ = engine.initialize(config=config, model=build_model(), training_data=data)
    for x, y in trainer.batches():
        trainer.backward(torch.nn.functional.mse_loss(trainer(x), y))
        trainer.step()
    trainer.save_checkpoint("checkpoints")
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Return a directory with the files that the examples use, and a command `onecycle`."""
    directory = tmp_path_factory.mktemp("project")
    cycle = {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1, "cycle_first_step_size": 300}
    config = {
        "train_batch_size": 16,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
    }
    blocks = {
        "ds_config": {"type": "OneCycle", "params": cycle},
        "other": {"type": "OneCycle", "params": cycle | {"cycle_max_lr": 0.2}},
        "autowu": {"type": "AutoWU", "params": {"steps_per_epoch": 10, "total_epochs": 10}},
    }
    for name, block in blocks.items():
        (directory / f"{name}.json").write_text(json.dumps(config | {"scheduler": block}))
    (directory / "train.py").write_text(TRAIN)
    (directory / "hostfile").write_text("node0 slots=2\nnode1 slots=2\n")
    rows = [f"{k},{(1 - k / 40) ** 2 + 0.1}" for k in range(100)]
    (directory / "losses.csv").write_text("\n".join(["step,loss", *rows]))
    command = directory / "bin" / "onecycle"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m onecycle "$@"\n')
    command.chmod(0o755)
    return directory


def run_in_shell(line, directory):
    environment = os.environ | {
        "PATH": f"{directory / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        cwd=directory, env=environment, capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip


HEAVY = {"launch", "lr-test", "doctor", "checkpoint"}
LIGHT = [name for name in COMMANDS if name not in {*HEAVY, "ui"}]  # `ui` runs until Ctrl+C


@pytest.mark.slow
@pytest.mark.parametrize("example", list_examples(*LIGHT))
def test_example_in_the_help_runs(project, example):
    done = run_in_shell(example, project)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("example", list_examples("ui"))
def test_example_of_ui_has_valid_arguments(example):
    """tests/engine/ui runs the command."""
    _, name, *arguments = shlex.split(example)
    assert build_command_parser(name).parse_args(arguments).paths


@pytest.mark.slow
@pytest.mark.parametrize("example", list_examples("launch", "lr-test", "doctor"))
def test_example_that_trains_runs(project, example):
    """Launches on hosts are dry runs, because they need hosts; LR range tests are shorter."""
    if "hostfile" in example:
        example = example.replace("launch", "launch --dry-run")
    done = run_in_shell(example.replace("lr-test", "lr-test --steps 80"), project)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_examples_of_checkpoint_run(project):
    train = run_in_shell(f"{shlex.quote(sys.executable)} train.py", project)
    assert train.returncode == 0, train.stderr
    for example in list_examples("checkpoint"):
        done = run_in_shell(example, project)
        assert done.returncode == 0, done.stderr
        assert done.stdout


COMPLETE = """
source <(onecycle completion bash)
complete_line() {
    COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _shtab_onecycle
    echo "${COMPREPLY[@]}"
}
"""


@pytest.mark.parametrize(
    ("line", "completions"),
    [
        ("onecycle sch", "schedules schema"),
        ("onecycle schedules OneC", "OneCycle OneCycleLR"),
        ("onecycle explain unknown-k", "unknown-key"),
        ("onecycle validate --wor", "--world-size"),
        ("onecycle validate oth", "other.json"),
        ("onecycle launch --hostfile hos", "hostfile"),
        ("onecycle checkpoint v", "verify"),
    ],
)
def test_bash_completion_completes_names_and_files(project, line, completions):
    done = run_in_shell(f"{COMPLETE}\ncomplete_line {line}", project)
    assert (done.stdout.split(), done.stderr) == (completions.split(), "")
