"""A file of a checkpoint with a correct hash and damaged contents is an error, and nothing changes.

`tests.testing.fuzz` does the same with random damage.
"""

import json
import logging
import math
import re
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint.hashes import describe_files
from engine.checkpoint.manifest import MANIFEST, Manifest, format_manifest
from engine.cli.main import main
from engine.errors import CheckpointError
from tests.testing.fuzz_checkpoints import CheckpointMutator, build_targets, read_state
from tests.testing.saved_runs import RUNS


@pytest.fixture(scope="module")
def mutator(tmp_path_factory):
    logger = logging.getLogger("onecycle")
    level = logger.level
    with warnings.catch_warnings():  # the mutator silences the log and the warnings
        yield CheckpointMutator(0, tmp_path_factory.mktemp("checkpoints"))
    logger.setLevel(level)


@pytest.fixture
def check_damage(mutator, tmp_path):
    """Return a function that damages a file of a run's checkpoint, and loads the checkpoint."""

    def check(name, file, change, message, *, named=None, **options):
        run, saved = mutator.runs[name], tmp_path / "saved"
        saved.mkdir()
        for path, data in mutator.saved[name].items():
            (saved / path).write_bytes(data)
        change(saved / file)
        correct_hashes(saved)
        before = read_state(run)
        with pytest.raises(CheckpointError, match=message) as raised:
            run.trainer.load_checkpoint(tmp_path, "saved", **options)
        stem = named or file.partition(".")[0]
        assert re.search(rf"{stem}\S* (is damaged|cannot be loaded|is missing)", str(raised.value))
        assert read_state(run) == before

    return check


def correct_hashes(saved):
    content = json.loads((saved / MANIFEST).read_text())
    paths = [path for path in saved.iterdir() if path.name != MANIFEST]
    content["files"] = describe_files(paths, saved)
    (saved / MANIFEST).write_text(format_manifest(Manifest(**content)))


def edit(*keys, value):
    """Return a function that sets a nested value of a file; with ... as value, it is removed."""

    def change(path):
        values = holder = torch.load(path, weights_only=False)
        for key in keys[:-1]:
            if isinstance(holder[key], tuple):
                holder[key] = list(holder[key])
            holder = holder[key]
        if value is ...:
            del holder[keys[-1]]
        else:
            holder[keys[-1]] = value
        torch.save(values, path)

    return change


def edit_tensors(change, metadata=None):
    def rewrite(path):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata)

    return rewrite


def rename(old, new):
    return edit_tensors(lambda tensors: tensors.update({new: tensors.pop(old)}))


EXP_AVG, STEP = "optimizer.state.0.weight.exp_avg", "optimizer.state.0.weight.step"
PARTS = json.dumps(
    {f"{EXP_AVG}@{row},0": {"of": EXP_AVG, "shape": [4, 3], "offsets": [row, 0]} for row in (0, 1)}
)


def overlap(tensors):
    tensors[f"{EXP_AVG}@1,0"] = tensors[EXP_AVG][1:3].clone()
    tensors[f"{EXP_AVG}@0,0"] = tensors.pop(EXP_AVG)[:2].clone()


LR = "optimizer.param_groups.0.lr"
ALPHA = "optimizer.param_groups.0.alpha"
ETAS = "optimizer.param_groups.0.etas"
AMSGRAD = "optimizer.param_groups.0.amsgrad"
DAMAGE = [
    ("OneCycle", "engine.pt", edit("counters", value=...), "must have the key `counters`"),
    ("OneCycle", "engine.pt", edit("counters", "micro_steps", value=-1), "must be >= 0, got -1"),
    (
        "OneCycle",
        "engine.pt",
        edit("counters", "skipped_steps", value=9),
        "<= `global_steps`",
    ),
    ("OneCycle", "engine.pt", edit("counters", "global_steps", value="4"), "whole number, got '4'"),
    ("OneCycle", "engine.pt", edit("counters", "x", value=1), "unknown key 'x'"),
    ("OneCycle", "engine.pt", edit("batch", "accumulation", value=0), "must be >= 1, got 0"),
    ("OneCycle", "engine.pt", edit("loader", "given", value=math.nan), "got nan"),
    ("OneCycle", "engine.pt", edit("loader", "epoch", value=2**70), "does not fit in 64 bits"),
    ("OneCycle", "engine.pt", edit("best", "mode", value="x"), "must be one of 'min', 'max'"),
    ("OneCycle", "engine.pt", edit("lr_scheduler", "step", value=2**60), "must be <= "),
    ("OneCycle", "engine.pt", edit("lr_scheduler", "base", "lr", value=[]), "has 0 param groups"),
    (
        "OneCycle",
        "engine.pt",
        edit("lr_scheduler", "base", "lr", value=[math.nan]),
        "must be a finite",
    ),
    ("AutoWU", "engine.pt", edit("lr_scheduler", "state", "phase", value="up"), "'warmup'"),
    ("AutoWU", "engine.pt", edit("lr_scheduler", "state", "losses", 0, value="x"), "got 'x'"),
    ("AutoWU", "engine.pt", edit("lr_scheduler", "state", "draws", value="AAAA"), "damaged: "),
    ("plateau", "engine.pt", edit("lr_scheduler", "state", "lrs", value=[]), "must have 1 items"),
    ("torch", "engine.pt", edit("lr_scheduler", "last_epoch", value=None), "must be a number"),
    ("torch", "engine.pt", edit("lr_scheduler", "_last_lr", value=[0.1]), "must have length 3"),
    ("torch", "engine.pt", edit("lr_scheduler", "_milestones", value=[1, 2]), "must have length 1"),
    ("AutoWU", "loss_scaler.pt", edit("scale", value=0.0), "`loss_scaler.scale` must be > 0"),
    ("plateau", "loader.0.pt", edit("given", value="x"), "TypeError"),
    ("OneCycle", "random.0.pt", edit("numpy", 2, value=10**6), "must be <= 624, got 1000000"),
    ("OneCycle", "random.0.pt", edit("python", 1, value=(1, 2)), "state"),
    ("OneCycle", "random.0.pt", edit("torch", value=torch.zeros(3)), "state"),
    ("override", "rollback.0.pt", edit(0, "0.weight", value=torch.zeros(2)), "must have the shape"),
    ("override", "rollback.0.pt", edit(0, "0.weight", value=...), "must have the key '0.weight'"),
    ("override", "rollback.0.pt", edit(1, "state", 0, "step", value=...), "must have the key"),
    ("OneCycle", "values.pt", edit(LR, value=...), "must have the key `lr`"),
    ("OneCycle", "values.pt", edit(LR, value=math.inf), "a finite float32 number, got inf"),
    ("plateau", "values.pt", edit(ALPHA, value=1e39), "a finite float32 number, got 1e\\+39"),
    ("torch", "values.pt", edit(ETAS, value=(0.5, 1e300)), "a finite float32 number"),
    ("OneCycle", "values.pt", edit("optimizer.param_groups.0.betas", value=(0.9, 1)), "< 1, got 1"),
    ("torch", "values.pt", edit("optimizer.param_groups.0.etas", value=[1]), "must have length 2"),
    ("OneCycle", "values.pt", edit("optimizer.param_groups.0.lr.x", value=1), "TypeError"),
    ("OneCycle", "values.pt", edit("model.2._extra_state", value={}), "KeyError: 'calls'"),
    ("OneCycle", "values.pt", lambda path: path.write_bytes(b"PK"), "is damaged"),
    ("OneCycle", "values.pt", lambda path: path.unlink(), "is missing"),
    ("OneCycle", "shard.0.safetensors", rename(STEP, f"{STEP}.0"), r"step` must be a number"),
    ("OneCycle", "shard.0.safetensors", rename(STEP, "x"), "must have the key 'step'"),
    (
        "OneCycle",
        "shard.0.safetensors",
        edit_tensors(lambda tensors: tensors.update({STEP: torch.tensor(-1.0)})),
        "must be >= 0 and finite",
    ),
    (
        "OneCycle",
        "shard.0.safetensors",
        edit_tensors(lambda tensors: tensors.update({EXP_AVG: torch.zeros(3)})),
        r"must have the shape \(4, 3\), got \(3,\)",
    ),
    (
        "OneCycle",
        "shard.0.safetensors",
        edit_tensors(overlap, {"parts": PARTS}),
        r"saved shards of `.*` do not cover the full tensor",
    ),
    (
        "OneCycle",
        "shard.0.safetensors",
        edit_tensors(lambda tensors: None, {"parts": '{"x": 1}'}),
        r"parts\['x'\]` must be a mapping",
    ),
]


@pytest.mark.parametrize(("name", "file", "change", "message"), DAMAGE)
def test_damaged_file_is_an_error_that_names_it_and_changes_nothing(
    check_damage, name, file, change, message
):
    check_damage(name, file, change, message)


def test_saved_states_that_do_not_fit_the_saved_settings_are_an_error(check_damage):
    change = edit(AMSGRAD, value=True)
    message = "must have the key 'max_exp_avg_sq'"
    check_damage("OneCycle", "values.pt", change, message, named="shard")


def test_checkpoints_with_random_damage_raise_errors_or_load(mutator):
    targets = build_targets(mutator)
    for _ in range(60):
        with mutator.damage() as (name, path):
            for target in targets.values():
                target(name, path)
    assert not mutator.bomb.exists()


def test_export_of_a_damaged_shard_names_the_file(tmp_path, capsys):
    run = RUNS["OneCycle"]()
    run.trainer.save_checkpoint(tmp_path, "saved")
    rename("model.0.weight", "model.0.weight@0,0")(tmp_path / "saved" / "shard.0.safetensors")
    edit_tensors(lambda tensors: None, {"parts": "[]"})(tmp_path / "saved" / "shard.0.safetensors")
    correct_hashes(tmp_path / "saved")
    assert main(["checkpoint", "export", str(tmp_path), "-o", str(tmp_path / "x")]) != 0
    assert re.search(r"shard\.0\.safetensors is damaged", capsys.readouterr().err)
