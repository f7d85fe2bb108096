"""Pruning deletes only old checkpoints that the run itself has saved automatically."""

import datetime as dt
from unittest import mock

import pytest
import torch

import engine
from engine.checkpoint import manager, storage


def start(directory, **plan):
    torch.manual_seed(0)
    plan = {"dir": str(directory), "every": 2, "keep": 1} | plan
    config = {
        "train_batch_size": 4,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "engine": {"checkpoint": plan},
    }
    return engine.initialize(config=config, model=torch.nn.Linear(2, 1))[0]


def train(trainer, steps):
    for _ in range(steps):
        trainer.backward(trainer(torch.ones(4, 2)).pow(2).mean())
        trainer.step()
    return trainer


def list_tags(directory):
    return [checkpoint_dir.name for checkpoint_dir, _ in storage.list_checkpoints(directory)]


def test_checkpoints_are_ordered_by_their_number_when_the_clock_is_set_back(tmp_path):
    trainer = train(start(tmp_path), 4)
    clock = mock.Mock()
    clock.now.return_value = dt.datetime.now(dt.UTC) - dt.timedelta(hours=1)
    with mock.patch.object(manager.dt, "datetime", clock):
        train(trainer, 6)
    assert list_tags(tmp_path) == ["global_step10"]
    assert start(tmp_path).global_steps == 10


@pytest.mark.parametrize("save_latest", [True, False])
def test_tags_of_the_script_are_neither_counted_nor_pruned(tmp_path, save_latest):
    trainer = train(start(tmp_path, keep=2), 4)
    trainer.save_checkpoint(tmp_path, tag="mine", save_latest=save_latest)
    assert list_tags(tmp_path) == ["global_step2", "global_step4", "mine"]
    train(trainer, 4)
    assert list_tags(tmp_path) == ["mine", "global_step6", "global_step8"]


def test_checkpoints_of_an_earlier_run_are_not_pruned_but_those_before_a_resume_are(tmp_path):
    train(start(tmp_path), 8)
    train(start(tmp_path, resume="never"), 4)
    assert list_tags(tmp_path) == ["global_step8", "global_step4"]
    resumed = start(tmp_path)
    assert resumed.global_steps == 4
    train(resumed, 2)
    assert list_tags(tmp_path) == ["global_step8", "global_step6"]


def test_checkpoints_behind_symbolic_links_stay_whole(tmp_path):
    elsewhere, directory = tmp_path / "elsewhere", tmp_path / "run"
    train(start(elsewhere), 2)
    directory.mkdir()
    for name in ("init", "global_step2", ".global_step4.partial"):
        (directory / name).symlink_to(elsewhere / "global_step2")
    trainer = train(start(directory, resume="never"), 6)
    assert "global_step6" in list_tags(directory)
    trainer.load_checkpoint(elsewhere)
    assert trainer.global_steps == 2


def test_tag_is_found_when_its_replacement_was_interrupted(tmp_path):
    trainer = train(start(tmp_path), 1)
    trainer.save_checkpoint(tmp_path, tag="best")
    (tmp_path / "best").rename(tmp_path / ".best.old")
    trainer.load_checkpoint(tmp_path, tag="best")
    assert trainer.global_steps == 1


def test_interrupted_removal_leaves_nothing_that_looks_like_a_checkpoint(tmp_path, monkeypatch):
    trainer = train(start(tmp_path), 2)

    def remove_some(path, **_):
        if (path / storage.MANIFEST).exists():
            (path / storage.MANIFEST).unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(storage.shutil, "rmtree", remove_some)
    with pytest.raises(KeyboardInterrupt):
        train(trainer, 2)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.glob("global_step*")) == ["global_step4"]
    trainer.destroy()
    train(start(tmp_path), 2)
    assert list(tmp_path.glob(".global_step2*")) == []
