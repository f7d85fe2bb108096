"""The reply of the server to a change of the text: problems, fixes, curves, form and export."""

import csv
import io
import json
import random

import numpy as np
import pytest

from engine.cli.main import main
from engine.config import validate
from engine.config.batch_sizes import DataRanks
from engine.config.parser import parse
from engine.ui.analysis import analyze, compute_for_text
from engine.ui.curves import MAX_EXACT
from engine.ui.export import export
from engine.ui.form import build_form, change_type, remove_param, set_param
from engine.ui.settings import RunSettings, find_batch_sizes
from schedules import SCHEDULES, trace
from schedules.core.fields import read_fields
from tests.testing.corpus import INDEX, path_of

ONE_CYCLE = {"type": "OneCycle", "params": {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1}}
SGD = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}


def write(**sections):
    return json.dumps({"train_batch_size": 8, "optimizer": SGD, **sections}, indent=2)


def run(text, compared=(), window=None, **settings):
    return analyze(text, "c.json", RunSettings(**settings), compared, window)


def test_curves_are_those_of_the_schedule_at_every_step():
    reply = run(write(scheduler=ONE_CYCLE), steps=5000)
    expected = trace(ONE_CYCLE, 5000, base={"lr": 0.1, "momentum": 0.9})
    assert [panel["name"] for panel in reply.header["curves"]["panels"]] == ["lr", "momentum"]
    assert np.array_equal(reply.arrays[0], expected["lr"][:, 0])
    assert np.array_equal(reply.arrays[1], expected["momentum"][:, 0])


def test_window_of_a_long_run_is_exact_and_the_whole_run_is_sampled():
    text = write(scheduler=ONE_CYCLE)
    reply = run(text, steps=MAX_EXACT + 1)
    steps, lrs = reply.arrays[:2]
    assert reply.header["curves"]["isSampled"]
    assert (steps[0], steps[-1]) == (0, MAX_EXACT)
    expected = trace(ONE_CYCLE, MAX_EXACT + 1)["lr"][:, 0]
    assert np.array_equal(lrs, expected[steps.astype(int)])
    reply = run(text, steps=MAX_EXACT + 1, window=(1990, 2010))
    assert not reply.header["curves"]["isSampled"]
    assert np.array_equal(reply.arrays[0], expected[1990:2011])


def test_param_groups_have_their_own_curves():
    groups = [
        {"params": "head", "lr": 0.5, "scheduler": {"type": "StepLR", "params": {"step_size": 10}}},
        {"params": "bias$", "name": "biases", "lr": 0.2},
    ]
    scheduler = {**ONE_CYCLE, "params": {**ONE_CYCLE["params"], "relative": True}}
    text = write(scheduler=scheduler, optimizer={**SGD, "param_groups": groups})
    reply = run(text, steps=100)
    lr, momentum = reply.header["curves"]["panels"]
    assert [column["label"] for column in lr["columns"]] == [
        "this config · head",
        "this config · biases",
        "this config · other parameters",
    ]
    head, biases, others = reply.arrays[:3]
    assert head[[0, 9, 10, 20]] == pytest.approx([0.5, 0.5, 0.05, 0.005])
    assert biases == pytest.approx(2 * others)
    assert len(momentum["columns"]) == 3  # the group with its own schedule keeps its momentum


def test_misspelled_names_have_a_fix_that_makes_the_config_valid():
    broken = write(scheduler={**ONE_CYCLE, "type": "OneCycl"}, gradient_cliping=1.0)
    broken = broken.replace("SGD", "SGDD").replace('"cycle_min_lr"', '"cycle_mn_lr"')
    text = broken.replace('"train_batch_size"', '/* 😀 */ "train_batch_size"')
    for _ in range(4):
        problems = [each for each in run(text).header["problems"] if each["severity"] == "error"]
        fixes = [problem["fix"] for problem in problems if problem["fix"]]
        if not fixes:
            break
        units = text.encode("utf-16-le")
        start, end = 2 * fixes[0]["from"], 2 * fixes[0]["to"]
        units = units[:start] + fixes[0]["insert"].encode("utf-16-le") + units[end:]
        text = units.decode("utf-16-le")
    for wrong, right in (
        ("OneCycl", "OneCycle"),
        ("SGDD", "SGD"),
        ("gradient_cliping", "gradient_clipping"),
        ("cycle_mn_lr", "cycle_min_lr"),
        ('"train_batch_size"', '/* 😀 */ "train_batch_size"'),
    ):
        broken = broken.replace(wrong, right)
    assert text == broken
    assert not [each for each in run(text).header["problems"] if each["severity"] == "error"]


def test_problem_of_a_section_marks_the_key_of_the_section():
    text = write(scheduler={"type": "OneCycle", "params": {"cycle_min_lr": 0.1}})
    (problem,) = [each for each in run(text).header["problems"] if each["severity"] == "error"]
    assert text[problem["from"] : problem["to"]] == '"params"'
    assert problem["line"] == text[: problem["from"]].count("\n") + 1


def test_problems_are_those_of_validate():
    for entry in random.Random(0).sample(INDEX, 40):
        path = path_of(entry)
        shown = run(path.read_text(encoding="utf-8")).header["problems"]
        expected = [(problem.rule, problem.line) for problem in validate(path)]
        assert [(each["rule"], each["line"]) for each in shown] == expected


def test_every_prefix_of_a_config_can_be_analyzed():
    text = write(scheduler=ONE_CYCLE, fp16={"enabled": True}).replace("{", "{ // x\n", 1)
    for end in range(len(text)):
        reply = run(text[:end])
        assert reply.header["problems"]
        json.dumps(reply.header, allow_nan=False)


@pytest.mark.parametrize(
    "text", ["", "null", "[]", '"x"', "{", "{" * 5000, "[" * 200, '{"scheduler": 3}', "\0", "ä: 1"]
)
def test_text_that_is_no_config_has_problems_and_no_curves(text):
    reply = run(text)
    assert reply.header["problems"]
    assert reply.header["curves"] is None
    assert reply.header["curvesError"]


def test_comparison_adds_the_curves_of_files_and_types():
    other = write(scheduler={**ONE_CYCLE, "params": {**ONE_CYCLE["params"], "cycle_max_lr": 0.4}})
    compared = [{"label": "other.json", "text": other}, {"label": "WarmupLR", "type": "WarmupLR"}]
    reply = run(write(scheduler=ONE_CYCLE), compared, steps=4000)
    lr = reply.header["curves"]["panels"][0]
    assert [column["label"] for column in lr["columns"]] == [
        "this config",
        "other.json",
        "WarmupLR",
    ]
    assert [array.max() for array in reply.arrays[:3]] == pytest.approx([0.1, 0.4, 0.1])


def test_invalid_comparison_names_the_file():
    reply = run(write(scheduler=ONE_CYCLE), [{"label": "other.json", "text": "{"}])
    assert reply.header["curvesError"].startswith("other.json: ")


@pytest.mark.parametrize(
    ("sections", "settings", "steps"),
    [
        ({}, {"world_size": 2, "dataset_size": 80}, 10),
        ({}, {"world_size": 2, "dataset_size": 81}, 11),
        ({"dataloader_drop_last": True}, {"world_size": 2, "dataset_size": 81}, 10),
        ({"gradient_accumulation_steps": 4}, {"world_size": 2, "dataset_size": 81}, 11),
        ({}, {"dataset_size": 80}, None),
        ({}, {"world_size": 2, "dataset_size": 80, "steps_per_epoch": 7}, 7),
    ],
)
def test_steps_per_epoch_follow_from_the_data_set(sections, settings, steps):
    text = write(scheduler={"type": "StepLR", "params": {"step_size": "1ep"}}, **sections)
    reply = run(text, **settings)
    assert reply.header["stepsPerEpoch"] == steps
    assert (reply.header["curves"] is None) == (steps is None)
    if steps:
        assert int(np.flatnonzero(np.diff(reply.arrays[0]))[0]) + 1 == steps


def test_steps_per_epoch_equal_those_of_a_training_run():
    import torch

    import engine

    data = torch.utils.data.TensorDataset(torch.ones(81, 2))
    for config in (
        {"train_batch_size": 8},
        {"train_batch_size": 8, "gradient_accumulation_steps": 4},
        {"train_batch_size": 8, "dataloader_drop_last": True},
    ):
        config |= {"optimizer": SGD, "engine": {"max_duration": "1ep"}}
        trainer, _, loader, _ = engine.initialize(
            model=torch.nn.Linear(2, 1), training_data=data, config=config
        )
        batch = find_batch_sizes(config, DataRanks(1))
        counted = RunSettings(dataset_size=81).count_steps_per_epoch(config, batch)
        assert len(loader) // trainer.gradient_accumulation_steps() == counted
        trainer.destroy()


def test_memory_is_that_of_the_command(tmp_path):
    adam = {"type": "AdamW", "params": {"lr": 0.1}}
    text = write(optimizer=adam, zero_optimization={"stage": 2}, bf16={"enabled": True})
    path = tmp_path / "c.json"
    path.write_text(text)
    out = io.StringIO()
    assert main(["memory", str(path), "--params", "7e9", "--world-size", "8"], out) == 0
    memory = run(text, parameters=7 * 10**9, world_size=8).header["memory"]
    assert [len(table["rows"]) for table in memory["tables"]] == [6, 8]
    lines = [line.split() for line in out.getvalue().splitlines()]
    for table in memory["tables"]:
        for row in table["rows"]:
            assert " ".join(row).split() in lines


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        (write(), {}),
        (write(train_batch_size="x"), {"parameters": 1000}),
        ("", {"parameters": 1000}),
    ],
    ids=["no number", "invalid", "empty"],
)
def test_memory_is_unknown_without_a_number_or_a_valid_config(text, settings):
    assert run(text, **settings).header["memory"] is None


def test_memory_that_cannot_be_estimated_has_a_reason():
    text = write(tensor_parallel={"autotp_size": 2})
    memory = run(text, parameters=1000, world_size=2).header["memory"]
    assert "tensor_parallel.autotp_size" in memory["summary"]
    assert memory["tables"] == []


def test_export_as_csv_has_the_value_of_each_step():
    curves = compute_for_text(write(scheduler=ONE_CYCLE), "c.json", RunSettings(steps=50), ())
    file = export(curves, "c.json", "csv", log=False)
    rows = list(csv.reader(io.StringIO(file.data.decode())))
    assert rows[0] == ["step", "lr", "momentum"]
    assert [float(row[1]) for row in rows[1:]] == trace(ONE_CYCLE, 50)["lr"][:, 0].tolist()
    assert file.name == "c.csv"


@pytest.mark.parametrize(("kind", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_export_as_an_image(kind, start):
    curves = compute_for_text(write(scheduler=ONE_CYCLE), "c.json", RunSettings(steps=50), ())
    assert export(curves, "c.json", kind, log=True).data.startswith(start)


def test_form_has_the_fields_of_the_type_with_valid_slider_ranges():
    for name, cls in SCHEDULES.items():
        text = change_type(write(), name)
        form = build_form(parse(text, "c.json"))
        assert {field["name"] for field in form["fields"]} == set(read_fields(cls))
        for field in form["fields"]:
            value = field["slider"]
            if value is None:
                continue
            for end in ("min", "max"):
                number = int(value[end]) if value["isInteger"] else value[end]
                changed = set_param(text, field["name"], number)
                problems = run(changed).header["problems"]
                about = [
                    each for each in problems if each["rule"] in {"wrong-type", "out-of-range"}
                ]
                assert about == [], (name, field["name"], end)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("sections", [{"scheduler": ONE_CYCLE}, {}], ids=["replace", "add"])
def test_change_of_the_type_gives_a_valid_config_with_a_curve(name, sections):
    reply = run(change_type(write(**sections), name, 300))
    assert not [each for each in reply.header["problems"] if each["severity"] == "error"]
    assert reply.header["curvesError"] == ""


def test_edits_of_the_form_keep_comments_and_order():
    text = '{\n  "scheduler": { // s\n    "type": "WarmupLR" // t\n  }, /* e */ "fp16": {}\n}'
    added = set_param(text, "warmup_num_steps", 5)
    assert added == text.replace(
        '"WarmupLR" // t\n',
        '"WarmupLR", // t\n    "params": {\n      "warmup_num_steps": 5\n    }\n',
    )
    changed = set_param(added, "warmup_num_steps", "2ep")
    assert changed == added.replace(": 5", ': "2ep"')
    assert remove_param(changed, "warmup_num_steps").count("warmup") == 0
    assert remove_param(text, "absent") == text
