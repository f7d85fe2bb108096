"""The ``onecycle`` command: output, files and exit statuses."""

import csv
import importlib.metadata
import io
import json
from pathlib import Path

import pytest

from engine.cli.main import main
from engine.cli.parser import COMMANDS
from engine.distributed.environment import INVALID, OK, USAGE
from schedules import SCHEDULES, trace
from tests.testing.command_line import run
from tests.testing.schedule_instances import TUTORIAL


def test_validate_valid_config_prints_the_verdict(tmp_path):
    path = tmp_path / "good.json"
    path.write_text('{"train_batch_size": 8}')
    assert run("validate", path) == (OK, f"{path}: valid\n", "")
    assert run("validate", path, "--world-size", 4) == (OK, f"{path}: valid for 4 ranks\n", "")
    status, out, _ = run("validate", path, "--world-size", 3)
    assert status == INVALID
    assert "Set `train_batch_size` to 6 or 9." in out


def test_validate_prints_line_and_column(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text('{\n  "train_batch_size": 8,\n\t"gradient_cliping": 1\n}\n')
    status, out, err = run("validate", path)
    assert (status, err) == (INVALID, "")
    problem, *rest = out.splitlines()
    assert problem.startswith(f"{path}:3:2: error[unknown-key]: ")
    assert "`gradient_cliping`" in problem
    assert "Did you mean `gradient_clipping`?" in problem
    assert rest == ['   "gradient_cliping": 1', "   ^", f"{path}: 1 error"]


def test_validate_config_with_only_a_note_is_valid(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{"train_batch_size": 8} // note\n')
    status, out, _ = run("validate", path)
    assert status == OK
    assert "note[not-strict-json]" in out


def test_validate_missing_file_exits_with_2(tmp_path):
    status, out, _ = run("validate", tmp_path / "none.json")
    assert status == USAGE
    assert "none.json: error[unreadable]: " in out


def test_plot_csv_equals_the_trace(tutorial):
    status, out, err = run("plot", tutorial, "--csv", "-", "--steps", 2500)
    assert (status, err) == (OK, "")
    header, *rows = csv.reader(io.StringIO(out))
    assert header == ["step", "lr", "momentum"]
    expected = trace(TUTORIAL, 2500)
    assert [int(row[0]) for row in rows] == list(range(2500))
    assert [float(row[1]) for row in rows] == expected["lr"][:, 0].tolist()
    assert [float(row[2]) for row in rows] == expected["momentum"][:, 0].tolist()


def test_plot_different_param_groups_have_separate_columns(tmp_path):
    path, table = tmp_path / "c.json", tmp_path / "c.csv"
    params = {"lr_range_test_min_lr": [0.1, 0.2], "lr_range_test_step_size": 2}
    path.write_text(json.dumps({"scheduler": {"type": "LRRangeTest", "params": params}}))
    assert run("plot", path, "--csv", table, "--steps", 2)[0] == OK
    assert (
        table.read_text()
        == "step,lr.0,lr.1\n0,0.1,0.2\n1,0.15000000000000002,0.30000000000000004\n"
    )


def test_plot_uses_the_learning_rate_of_the_optimizer(tmp_path):
    path = tmp_path / "c.json"
    config = {
        "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 1}},
    }
    path.write_text(json.dumps(config))
    assert run("plot", path, "--csv", "-", "--steps", 2)[1] == "step,lr\n0,0.0\n1,0.5\n"


def test_plot_writes_an_image(tutorial, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = run("plot", tutorial)
    assert (status, out) == (OK, "ds_config.png: 3000 steps of OneCycle\n")
    assert (tmp_path / "ds_config.png").read_bytes().startswith(b"\x89PNG")
    status, _, err = run("plot", tutorial, "-o", "/proc/none/x.png")
    assert status == USAGE
    assert err.startswith("onecycle: ")


def test_plot_summary_counts_the_steps_of_the_schedule(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2, "cycle_first_step_size": 30}
    Path("c.json").write_text(json.dumps({"scheduler": {"type": "OneCycle", "params": params}}))
    assert run("plot", "c.json")[1] == "c.png: 60 steps of OneCycle\n"
    assert run("plot", "c.json", "--compare", "StepLR")[1] == "c.png: 60 steps of OneCycle\n"
    assert run("plot", "c.json", "--steps", 61)[1] == "c.png: 61 steps of OneCycle\n"
    assert len(run("plot", "c.json", "--csv", "-")[1].splitlines()) == 62  # steps 0 to 60


@pytest.mark.parametrize(
    ("config", "pointer"),
    [
        ({"engine": {"max_duration": "2ep"}}, "engine.max_duration"),
        ({"scheduler": {"type": "StepLR", "params": {"step_size": "1ep"}}}, "step_size"),
        (
            {
                "scheduler": {
                    "type": "SequentialLR",
                    "params": {
                        "schedulers": [
                            {"type": "StepLR", "params": {"step_size": 5}},
                            {"type": "StepLR", "params": {"step_size": "1ep"}},
                        ],
                        "milestones": [5],
                    },
                }
            },
            "schedulers",
        ),
    ],
)
def test_plot_epochs_of_unknown_length_name_the_option(tmp_path, config, pointer):
    path = tmp_path / "c.json"
    scheduler = {"type": "StepLR", "params": {"step_size": 5}}
    path.write_text(json.dumps({"scheduler": scheduler} | config, indent=1))
    status, out, _ = run("plot", path, "-t")
    assert status == INVALID
    out = " ".join(out.split())
    assert "`--steps-per-epoch N`" in out
    assert "initialize" not in out
    line = int(out.split(":")[1])
    assert f'"{pointer.rpartition(".")[2]}"' in path.read_text().splitlines()[line - 1]
    assert run("plot", path, "-t", "--steps-per-epoch", 20)[0] == OK


def test_plot_terminal_names_the_phases(tutorial):
    status, out, _ = run("plot", tutorial, "--terminal")
    assert status == OK
    assert "learning rate" in out
    phases = "first part from step 0, second part from step 1,000, after the cycle from step 2,000"
    assert " ".join(out.split()).endswith(phases)
    assert "\x1b" not in out


def test_plot_compare_draws_all_configs(tutorial, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        "engine.display.plots.draw", lambda columns, *_, **__: drawn.update(columns)
    )
    other = tmp_path / "other.json"
    warmup = {"type": "WarmupLR", "params": {"warmup_num_steps": 2, "warmup_type": "linear"}}
    other.write_text(json.dumps({"scheduler": warmup}))
    epochs = {"type": "CosineAnnealingScheduler", "params": {"t_max": "2ep"}}
    in_epochs = tmp_path / "epochs.json"
    in_epochs.write_text(json.dumps({"scheduler": epochs}))
    arguments = ("--steps-per-epoch", 10, "--compare", in_epochs)
    assert run("plot", in_epochs, *arguments)[0] == OK
    drawn.clear()
    status, _, _ = run("plot", tutorial, "--steps", 3, "--compare", other, "LinearScheduler")
    assert status == OK
    assert list(drawn) == [
        "lr.ds_config.json",
        "momentum.ds_config.json",
        f"lr.{other}",
        "lr.LinearScheduler",
    ]
    assert drawn[f"lr.{other}"] == [0.0, 0.0005, 0.001]
    # The example falls linearly to a tenth of its peak in its run, stretched to 3 steps here.
    peak = max(drawn["lr.ds_config.json"])
    assert drawn["lr.LinearScheduler"] == pytest.approx([peak, peak * 0.7, peak * 0.4])
    assert run("plot", tutorial, "--compare", "nonsense.json")[0] == USAGE
    drawn.clear()
    assert run("plot", tutorial, "--steps", 3, "--compare", "linearscheduler")[0] == OK
    assert "lr.LinearScheduler" in drawn
    assert run("plot", tutorial, "--compare", "LinearSchedular") == (
        USAGE,
        "",
        "onecycle: Unknown schedule `LinearSchedular`. Did you mean `LinearScheduler`?\n",
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"train_batch_size": 8}, "`scheduler` section is missing"),
        ({"scheduler": {"type": "OneCicle"}}, "Did you mean `OneCycle`?"),
        (
            {"scheduler": TUTORIAL, "optimizer": {"type": "SGD", "params": {"lr": -1}}},
            "`optimizer.params.lr`",
        ),
        ([], "JSON object"),
    ],
)
def test_plot_config_without_valid_schedule_reports_the_problem(tmp_path, config, message):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(config))
    status, out, _ = run("plot", path)
    assert status == INVALID
    assert message in out


def test_plot_config_with_auto_values_succeeds(tmp_path):
    warmup = {"warmup_num_steps": 2, "warmup_type": "linear"}
    config = {
        "train_batch_size": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
        "scheduler": {"type": "WarmupLR", "params": warmup, "// why": "as in the paper"},
    }
    path = tmp_path / "c.json"
    path.write_text(json.dumps(config))
    assert run("plot", path, "--csv", "-", "--steps", 3)[::2] == (OK, "")


HF_WARMUP = {
    "warmup_min_lr": "auto",
    "warmup_max_lr": "auto",
    "warmup_num_steps": "auto",
    "total_num_steps": "auto",
    "warmup_type": "linear",
}


@pytest.mark.parametrize(
    ("arguments", "run_section", "rows"),
    [
        (("--steps", 20), {}, {0: 0.0, 1: 2.5e-5, 2: 5e-5, 11: 2.5e-5, 19: 5e-5 / 18}),
        (
            ("--steps", 10, "--warmup-steps", 5, "--learning-rate", 1e-3),
            {},
            {0: 0.0, 1: 2e-4, 5: 1e-3, 9: 2e-4},
        ),
        ((), {"max_duration": 40}, {2: 2.5e-5, 4: 5e-5, 22: 2.5e-5, 39: 5e-5 / 36}),
    ],
)
def test_plot_config_of_transformers_replaces_auto(tmp_path, arguments, run_section, rows):
    """5e-5 is the default of transformers; the warmup is a tenth of the run."""
    config = {
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}},
        "scheduler": {"type": "WarmupDecayLR", "params": HF_WARMUP},
        "engine": run_section,
    }
    path = tmp_path / "c.json"
    path.write_text(json.dumps(config))
    status, out, _ = run("plot", path, "--csv", "-", *arguments)
    assert status == OK
    table = dict(line.split(",") for line in out.splitlines()[1:])
    assert {k: float(table[str(k)]) for k in rows} == pytest.approx(rows)


def test_plot_prints_the_values_drawn_for_auto(tmp_path):
    config = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}}
    path = tmp_path / "c.json"
    path.write_text(json.dumps(config))
    _, out, _ = run("plot", path, "-o", tmp_path / "c.png")
    assert out.endswith('c.json: plotted with warmup_num_steps 100 in place of "auto"\n')
    assert json.loads(path.read_text()) == config


def test_plot_log_draws_a_straight_line_for_an_exponential(tmp_path):
    """On a linear axis, most of an exponential decay is in the bottom row."""
    decay = {"type": "ExponentialLR", "params": {"gamma": 0.8}}
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"scheduler": decay}))

    def count_rows(*arguments):
        _, out, _ = run("plot", path, "--steps", 60, "--terminal", *arguments)
        curve = [line for line in out.splitlines() if "┤" in line or "│" in line]
        return sum(any("\u2801" <= each <= "\u28ff" for each in line[40:]) for line in curve)

    assert count_rows("--log") > 2 * count_rows()


def test_plot_combined_with_lists_draws_equal_groups_once(tmp_path):
    """The cycle has two groups, which have the same momentum and weight decay."""
    parts = [
        {"type": "OneCycleLR", "params": {"max_lr": [0.1, 0.2], "total_steps": 10}},
        {"type": "Phases", "params": {"weight_decay": [{"from": 0, "to": 0.1, "duration": 10}]}},
    ]
    combined = {"type": "Combined", "params": {"schedulers": parts}}
    chained = {"type": "ChainedScheduler", "params": {"schedulers": parts[:1]}}
    sequence = {"type": "SequentialLR", "params": {"schedulers": parts[:1] * 2, "milestones": [5]}}
    scaled = {"scale_schedule_ratio": 2.0}
    exponential = {"type": "ExponentialLR", "params": {"gamma": 0.5}}
    slow = {"type": "ChainedScheduler", "params": {"schedulers": [*parts[:1], exponential]}}
    for block, engine_section, names in (
        (combined, {}, "lr.0,lr.1,momentum,weight_decay"),
        (chained, {}, "lr.0,lr.1,momentum"),
        (sequence, {}, "lr.0,lr.1,momentum"),
        (slow, scaled, "lr.0,lr.1,momentum"),
    ):
        path = tmp_path / "c.json"
        path.write_text(json.dumps({"scheduler": block, "engine": engine_section}))
        assert run("plot", path, "--csv", "-", "--steps", 2)[1].startswith(f"step,{names}\n")


def test_schedules_lists_every_type_with_a_plot():
    status, out, _ = run("schedules")
    groups = [group.splitlines() for group in out.split("\n\n")[:-1]]
    rows = [line.split() for group in groups for line in group[1:]]
    assert status == OK
    assert [group[0] for group in groups][:3] == ["DeepSpeed:", "Composer (MosaicML):", "PyTorch:"]
    assert sorted(row[0] for row in rows) == sorted(SCHEDULES)
    assert [row[0] for row in rows if row[0].startswith("OneCycle")] == ["OneCycle", "OneCycleLR"]
    curves = {row[0]: row[1] for row in rows}
    assert curves["fixed_lr"] == "█" * 24
    assert (curves["WarmupLR"][0], curves["WarmupLR"][-1]) == ("▁", "█")


def test_schedules_type_prints_its_documentation():
    status, out, _ = run("schedules", "StepLR")
    assert status == OK
    assert "lr(k) = lr * gamma ** floor(k / step_size)" in out
    assert "  gamma  (" in out
    assert "default 0.1)" in out
    block = out[out.index("{\n") : out.rindex("}") + 1]
    assert json.loads(block) == {
        "scheduler": {"type": "StepLR", "params": {"step_size": 20, "gamma": 0.5}}
    }
    assert run("schedules", "steplr") == (OK, run("schedules", "StepLR")[1], "")
    status, out, err = run("schedules", "StepLRR")
    assert (status, out) == (USAGE, "")
    assert err == "onecycle: Unknown schedule `StepLRR`. Did you mean `StepLR`?\n"


DURATIONS = {
    "train_batch_size": 4,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "scheduler": {"type": "LinearScheduler", "params": {"t_max": "1dur"}},
    "engine": {"max_duration": "10ep", "scale_schedule_ratio": 0.5},
}


def test_plot_converts_durations_to_steps(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(DURATIONS))
    status, out, _ = run("plot", path, "--csv", "-", "--steps-per-epoch", 2)
    assert status == OK
    rows = [line.split(",") for line in out.splitlines()[1:]]
    assert [float(lr) for _, lr in rows] == pytest.approx([0.1 * (1 - k / 10) for k in range(10)])


def test_plot_duration_in_epochs_without_epoch_length_reports_the_fix(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(DURATIONS))
    status, out, _ = run("plot", path)
    assert status == INVALID
    assert "`engine.max_duration`" in out
    assert '"10ep"' in out
    assert "--steps-per-epoch" in out


def test_schema_prints_the_schema_of_configs_and_schedules(tmp_path):
    assert json.loads(run("schema")[1])["title"] == "ds_config.json"
    assert json.loads(run("schema", "OneCycle")[1])["required"] == ["cycle_min_lr", "cycle_max_lr"]
    status, out, err = run("schema", "OneCicle")
    assert (status, out) == (USAGE, "")
    assert "Did you mean `OneCycle`?" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plot", "f", "--steps", "0"], "usage: onecycle plot"),
        (["--nonsense"], "usage: onecycle"),
        (["validate", "f", "--word-size", "2"], "Did you mean `--world-size`?"),
    ],
)
def test_main_wrong_usage_exits_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == USAGE
    assert message in capsys.readouterr().err


def test_main_without_arguments_prints_the_help():
    status, out, err = run()
    assert (status, err) == (OK, "")
    assert out.startswith("usage: onecycle")
    assert all(f"\n    {name} " in out for name in COMMANDS)


def test_main_command_accepts_upper_case_and_suggests_a_spelling():
    assert run("Schedules", "OneCycle") == run("schedules", "OneCycle")
    message = "onecycle: Unknown command `schedles`. Did you mean `schedules`?\n"
    assert run("schedles") == (USAGE, "", message)
    assert run("frobnicate")[2].endswith("Run `onecycle` to list the commands.\n")


def test_plot_terminal_and_output_writes_both(tutorial, tmp_path):
    path = tmp_path / "x.png"
    status, out, _ = run("plot", tutorial, "-t", "-o", path)
    assert status == OK
    assert "learning rate" in out
    assert path.read_bytes().startswith(b"\x89PNG")


def test_plot_compare_writes_all_columns_to_the_csv(tutorial):
    status, out, _ = run("plot", tutorial, "--csv", "-", "--compare", "LinearScheduler")
    assert status == OK
    header = "step,lr.ds_config.json,momentum.ds_config.json,lr.LinearScheduler"
    assert out.splitlines()[0] == header


def test_version_prints_installed_versions(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert f"torch {importlib.metadata.version('torch')}" in capsys.readouterr().out


def test_plot_losses_drive_a_loss_driven_schedule(tmp_path):
    block = {"type": "ReduceLROnPlateau", "params": {"patience": 0, "factor": 0.5}}
    optimizer = {"type": "SGD", "params": {"lr": 0.4}}
    config = tmp_path / "c.json"
    config.write_text(json.dumps({"scheduler": block, "optimizer": optimizer}))
    recorded = tmp_path / "losses.csv"
    recorded.write_text("step,train_loss\n8,2.0\n16,2.0\n24,1.0\n32,1.0\n")
    out = io.StringIO()
    arguments = ["plot", str(config), "--losses", str(recorded), "--csv", "-"]
    assert main(arguments, out, io.StringIO()) == 0
    assert out.getvalue().splitlines() == [
        "step,lr,loss",
        "0,0.4,2.0",
        "1,0.4,2.0",
        "2,0.2,1.0",
        "3,0.2,1.0",
        "4,0.1,",
    ]
    both = ["plot", str(config), "--losses", str(recorded), "--compare", "OneCycle"]
    assert main(both, io.StringIO(), io.StringIO()) == 2
    broken = tmp_path / "broken.csv"
    broken.write_text("step,train_loss\n8,much\n")
    err = io.StringIO()
    assert main(["plot", str(config), "--losses", str(broken), "--csv", "-"], out, err) == 2
    assert "must contain only numbers below the header row" in err.getvalue()


def test_plot_losses_with_other_schedule_exits_with_2(tutorial, tmp_path):
    recorded = tmp_path / "losses.csv"
    recorded.write_text("step,train_loss\n8,2.0\n")
    status, out, err = run("plot", tutorial, "--losses", recorded, "--csv", "-")
    assert (status, out) == (USAGE, "")
    assert "OneCycle" in err
    assert "--losses" in err


@pytest.mark.parametrize("action", ["show", "export"])
def test_checkpoint_of_a_directory_without_one_does_not_mention_resuming(tmp_path, action):
    status, _, err = run("checkpoint", action, tmp_path)
    assert status == USAGE
    assert "contains no complete checkpoint. Pass the checkpoint directory of a run." in err
    assert "resume" not in err
