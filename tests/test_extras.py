"""Features without the package of their extra: an error that names the extra, and nothing else."""

import io
import json
import sys

import pytest
import torch

import engine
import schedules
from engine.cli.main import main
from engine.range_test.recorder import Run
from engine.range_test.report import LRRangeReport
from schedules.core.extras import EXTRAS, MissingExtraError
from tests.testing.schedule_instances import TUTORIAL


@pytest.fixture
def hide(monkeypatch):
    """Return a function that makes a package look as if it were not installed."""

    def hide_package(name):
        for module in [each for each in sys.modules if each.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, name, None)

    return hide_package


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps({"train_batch_size": 4, "scheduler": TUTORIAL}))
    return str(path)


def run(*arguments):
    out, err = io.StringIO(), io.StringIO()
    return main(arguments, out, err), out.getvalue(), err.getvalue()


def describe(feature, package):
    return (
        f"{feature} requires {package}, which is not installed. Run `pip install {package}`, or "
        f"install onecycle with the extra `{EXTRAS[package]}`."
    )


def test_plot_without_its_packages_names_the_extra(hide, config, tmp_path):
    hide("matplotlib")
    picture = str(tmp_path / "x.png")
    message = describe("A plot", "matplotlib")
    assert run("plot", config, "-o", picture) == (2, "", f"onecycle: {message}\n")
    assert run("plot", config, "-t")[0] == 0
    hide("plotext")
    message = describe("A plot in the terminal", "plotext")
    assert run("plot", config, "-t") == (2, "", f"onecycle: {message}\n")
    assert run("plot", config, "--csv", "-")[0] == 0
    with pytest.raises(MissingExtraError, match="the extra `plot`"):
        schedules.plot(TUTORIAL)


def test_lr_test_without_matplotlib_ends_before_the_script_starts(hide, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("raise AssertionError")
    hide("matplotlib")
    message = describe("`onecycle lr-test`", "matplotlib")
    assert run("lr-test", "--", "train.py") == (2, "", f"onecycle: {message}\n")
    assert not (tmp_path / "lr_test").exists()


def test_report_of_the_lr_range_test_has_numbers_without_matplotlib(hide, tmp_path):
    hide("matplotlib")
    lrs = [10 ** (-5 + k / 25) for k in range(150)]
    losses = [2.3 - 1.5 / (1 + (1e-3 / lr) ** 2) + (lr / 0.1) ** 2 for lr in lrs]
    with pytest.raises(MissingExtraError):
        LRRangeReport((Run(lrs, losses, [None] * 150),)).write(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["suggestion"]["max_lr"] > 0


@pytest.mark.parametrize(
    ("package", "sections"),
    [
        ("tensorboard", {"tensorboard": {"enabled": True}}),
        (
            "matplotlib",
            {
                "scheduler": {
                    "type": "AutoWU",
                    "params": {"steps_per_epoch": 10, "total_epochs": 50},
                },
                "engine": {"report": "plots"},
            },
        ),
    ],
)
def test_initialize_without_the_package_of_a_key_names_the_extra(hide, package, sections, tmp_path):
    config = {"train_batch_size": 4, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    hide(package)
    with pytest.raises(MissingExtraError, match=f"requires {package}.*extra `{EXTRAS[package]}`"):
        engine.initialize(config=config | sections, model=torch.nn.Linear(2, 1))
    trainer, *_ = engine.initialize(config=config, model=torch.nn.Linear(2, 1))
    trainer.backward(trainer(torch.ones(4, 2)).mean())
    assert trainer.step()
