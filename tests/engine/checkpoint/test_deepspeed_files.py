"""Damaged files of DeepSpeed are reported, without the advice to trust them."""

import re

import pytest
import torch

import engine
from engine.checkpoint.deepspeed_files import DeepSpeedFiles
from engine.errors import CheckpointError

NAME = "mp_rank_00_model_states.pt"


class Own:
    """A class of the user's script."""


def build_model_file(**changes):
    """Return the contents of a model file that DeepSpeed writes without ZeRO."""
    counts = {"global_steps": 3, "skipped_steps": 0, "global_samples": 12, "dp_world_size": 1}
    weights = {"weight": torch.zeros(2)}
    return {"module": weights, "optimizer": None, "lr_scheduler": None, **counts, **changes}


@pytest.mark.parametrize("trusts", [False, True])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02}q\x00.", b"\x80\x02\x95\xff."])
def test_file_with_damaged_bytes_is_an_error_that_names_it(content, trusts, tmp_path):
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{NAME} is damaged: ") as raised:
        DeepSpeedFiles(tmp_path, trusts=trusts)
    assert "trust" not in str(raised.value)


def test_object_of_an_unknown_class_may_be_trusted(tmp_path):
    torch.save(build_model_file(mine=Own()), tmp_path / NAME)
    with pytest.raises(CheckpointError, match=r"contains `.*Own`.*`engine.checkpoint.trust"):
        DeepSpeedFiles(tmp_path)
    assert DeepSpeedFiles(tmp_path, trusts=True).steps == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_steps": "3"}, "`global_steps` must be a 64-bit whole number, got '3'"),
        ({"dp_world_size": 0}, "`dp_world_size` must be >= 1, got 0"),
        ({"skipped_steps": None}, "`skipped_steps` must be a 64-bit whole number, got None"),
        ({"global_samples": -1}, "`global_samples` must be >= 0, got -1"),
        ({"module": [1]}, "`module` must be a mapping"),
        ({"optimizer": 7}, "`optimizer` must be a mapping"),
    ],
)
def test_model_file_with_a_wrong_value_is_damaged(changes, message, tmp_path):
    torch.save(build_model_file(**changes), tmp_path / NAME)
    with pytest.raises(CheckpointError, match=f"{NAME} is damaged: {re.escape(message)}"):
        DeepSpeedFiles(tmp_path)


@pytest.mark.parametrize("key", ["module", "global_steps", "skipped_steps", "dp_world_size"])
def test_model_file_without_a_key_is_damaged(key, tmp_path):
    content = build_model_file()
    del content[key]
    torch.save(content, tmp_path / NAME)
    with pytest.raises(CheckpointError, match=f"`checkpoint` must have the key '{key}'"):
        DeepSpeedFiles(tmp_path)


def start(**sections):
    config = {
        "train_batch_size": 4,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
        "engine": {"backend": "torch"},
        **sections,
    }
    return engine.initialize(model=torch.nn.Linear(2, 1, bias=False), config=config)[0]


SCALER = {"cur_scale": 4.0, "cur_iter": 3, "last_overflow_iter": -1}
GROUP = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0, "params": [0]}
FP16 = {"enabled": True, "initial_scale_power": 4}


@pytest.mark.parametrize(
    ("scaler", "changes", "message"),
    [
        ({}, {"skipped_steps": 4}, "skipped_steps` must be <= `global_steps`"),
        ({}, {"lr_scheduler": "x"}, "`checkpoint.lr_scheduler` must be a mapping"),
        ({}, {"global_samples": 2}, "`checkpoint.batch.train` must be >= 1, got 0"),
        ({"cur_scale": 0.0}, {}, "`loss_scaler.scale` must be > 0, got 0.0"),
        ({"cur_scale": "x"}, {}, "`loss_scaler.scale` must be a number, got 'x'"),
        ({"last_overflow_iter": 9}, {}, "`loss_scaler.clean_updates` must be >= 0"),
    ],
)
def test_damaged_state_of_a_deepspeed_run_changes_nothing_on_pytorch(
    scaler, changes, message, tmp_path
):
    momentum = {0: {"momentum_buffer": torch.zeros(1, 2)}}
    saved = {"state": momentum, "param_groups": [GROUP], **SCALER, **scaler}
    module = {"weight": torch.ones(1, 2)}
    content = build_model_file(module=module, optimizer=saved)
    (tmp_path / "x").mkdir()
    path = tmp_path / "x" / NAME
    torch.save(content | changes, path)
    trainer = start(fp16=FP16)
    before = trainer.module.weight.detach().clone()
    with pytest.raises(CheckpointError, match=f"x is damaged: .*{re.escape(message)}"):
        trainer.load_checkpoint(tmp_path, tag="x")
    assert torch.equal(trainer.module.weight, before)
    assert (trainer.global_steps, trainer.cur_scale) == (0, 16)
    torch.save(build_model_file(module=module, optimizer=saved | SCALER), path)
    trainer.load_checkpoint(tmp_path, tag="x")
    assert torch.equal(trainer.module.weight, module["weight"])
    assert (trainer.global_steps, trainer.cur_scale) == (3, 4)
