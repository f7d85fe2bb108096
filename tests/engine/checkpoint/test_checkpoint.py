"""Save, resume, damage and reject checkpoints in a single process."""

import argparse
import collections
import datetime as dt
import enum
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import engine
from engine.checkpoint import storage
from engine.checkpoint.hashes import describe_files
from engine.checkpoint.saved_run import read_run
from engine.cli.main import main
from engine.errors import CheckpointError
from tests.testing.regression import CONFIG, dataset, model, start, train

SCRIPT = Path(__file__).parents[2] / "testing" / "checkpoint_run.py"


def complete_tags(directory):
    return [place.name for place, _ in storage.list_checkpoints(directory)]


def checkpoint_section(directory, **plan):
    return {"engine": {"checkpoint": {"dir": str(directory), **plan}}}


def test_checkpoint_section_saves_prunes_and_resumes(tmp_path):
    trainer, loader = start(**checkpoint_section(tmp_path, every=2, keep=2, keep_every=4))
    train(trainer, loader, 10)
    assert complete_tags(tmp_path) == ["global_step4", "global_step8", "global_step10"]
    assert (tmp_path / "latest").read_text() == "global_step10"
    again, _ = start(**checkpoint_section(tmp_path, every=2))
    assert (again.global_steps, again.get_lr()) == (10, trainer.get_lr())
    fresh, _ = start(**checkpoint_section(tmp_path, resume="never"))
    assert fresh.global_steps == 0
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        start(**checkpoint_section(tmp_path / "none", resume="must"))


@pytest.mark.parametrize("directory", ["", None])
def test_checkpoint_directory_must_not_be_empty(directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer, _ = start()
    with pytest.raises(ValueError, match="must be a non-empty path, got "):
        trainer.save_checkpoint(directory)
    with pytest.raises(ValueError, match="must be a non-empty path, got "):
        trainer.load_checkpoint(directory)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("behind", [False, True])
def test_load_checkpoint_without_frozen_parameters_keeps_current_ones(tmp_path, behind):
    def adapted(seed):
        torch.manual_seed(seed)
        first, tied, last = (torch.nn.Linear(4, size) for size in (4, 4, 1))
        tied.weight = first.weight  # a tied parameter: one tensor, two names
        first.requires_grad_(requires_grad=False)
        net = torch.nn.Sequential(first, torch.nn.BatchNorm1d(4), last, tied)
        net.forward = lambda x: net[2](net[3](net[1](net[0](x))))
        config = {"train_batch_size": 8, "optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}
        config["engine"] = {"checkpoint": {"async": behind}}
        return engine.initialize(model=net, config=config)[0], net

    trainer, net = adapted(0)
    trainer.backward(trainer(torch.ones(8, 4)).mean())
    trainer.step()
    trainer.save_checkpoint(tmp_path / "part", exclude_frozen_parameters=True)
    trainer.save_checkpoint(tmp_path / "all")
    trainer.wait_for_checkpoint()
    again, other = adapted(1)
    before = other[0].weight.clone()
    again.load_checkpoint(tmp_path / "part")
    assert torch.equal(other[0].weight, before)
    assert torch.equal(other[2].weight, net[2].weight)
    assert torch.equal(other[1].running_mean, net[1].running_mean)
    assert again.global_steps == 1
    assert not storage.find(tmp_path / "part")[1].frozen
    again.load_checkpoint(tmp_path / "all")
    assert torch.equal(other[0].weight, net[0].weight)
    other[0].requires_grad_()
    with pytest.raises(CheckpointError, match=r"`0\.weight` is missing"):
        again.load_checkpoint(tmp_path / "part", load_optimizer_states=False)


def test_resume_mid_epoch_continues_data_order_and_random_numbers(tmp_path):
    def seen(trainer, loader, updates):
        found = []
        while len(found) < updates:
            for x, y in loader:
                draws = (random.random(), np.random.rand(), torch.rand(1).item())  # noqa: NPY002
                found.append((x.sum().item(), draws))
                trainer.backward((trainer(x) - y).pow(2).mean())
                trainer.step()
                if len(found) == updates:
                    break
        return found

    trainer, loader = start(**checkpoint_section(tmp_path, every=5))
    unbroken = seen(trainer, loader, 9)
    again, loader = start(**checkpoint_section(tmp_path, resume="must"))
    assert again.global_steps == 5
    assert seen(again, loader, 4) == unbroken[5:]


@pytest.mark.parametrize(("before", "after"), [(8, 4), (4, 8), (4, 2)])
def test_resume_with_different_micro_batch_size_matches(tmp_path, before, after):
    plan = checkpoint_section(tmp_path, every=3, keep=None)
    trainer, loader = start(**plan, train_micro_batch_size_per_gpu=before)
    rest = train(trainer, loader, 15)[3:]
    again, loader = start(train_micro_batch_size_per_gpu=after)
    again.load_checkpoint(tmp_path, tag="global_step3")
    assert again.micro_steps == 3 * (8 // after)
    seen = train(again, loader, 12)
    assert [row[1:] for row in seen] == [row[1:] for row in rest]
    assert [row[0] for row in seen] == pytest.approx([row[0] for row in rest], rel=1e-5)


def test_save_checkpoint_unsupported_client_state_is_rejected(tmp_path):
    trainer, _ = start()
    with pytest.raises(ValueError, match=r"`client_state\['hooks'\]\[0\]` must .* got `builtins"):
        trainer.save_checkpoint(tmp_path, client_state={"epoch": 1, "hooks": [print]})
    assert list(tmp_path.iterdir()) == []


class Metric(enum.Enum):
    """A class of the script."""

    LOSS = "loss"


def test_client_state_of_a_custom_class_needs_trust_pickle(tmp_path):
    client_state = {"metric": Metric.LOSS}
    with pytest.raises(ValueError, match=r"Metric`.*`engine.checkpoint.trust_pickle` to true"):
        start()[0].save_checkpoint(tmp_path, client_state=client_state)
    trusting = {"engine": {"checkpoint": {"trust_pickle": True}}}
    start(**trusting)[0].save_checkpoint(tmp_path, client_state=client_state)
    with pytest.raises(CheckpointError, match=r"`.*Metric`.*`engine.checkpoint.trust_pickle`"):
        start()[0].load_checkpoint(tmp_path)
    assert start(**trusting)[0].load_checkpoint(tmp_path)[1] == client_state


def test_client_state_of_common_types_is_returned_as_it_was_saved(tmp_path):
    saved = {
        "accuracy": np.float64(0.5),
        "counts": np.arange(3),
        "args": argparse.Namespace(lr=0.1, files=[Path("/a/b")]),
        "start": dt.datetime(2026, 1, 2, tzinfo=dt.UTC),
        "words": collections.Counter("abb"),
        ("a", 1): {1, 2},
    }
    trainer, _ = start()
    trainer.save_checkpoint(tmp_path, client_state=saved)
    _, loaded = trainer.load_checkpoint(tmp_path)
    assert np.array_equal(loaded.pop("counts"), saved.pop("counts"))
    assert loaded == saved
    assert type(loaded["accuracy"]) is np.float64


def test_checkpoint_saved_within_a_step_loses_no_gradient(tmp_path):
    def build():
        torch.manual_seed(0)
        sizes = {"train_batch_size": 8, "gradient_accumulation_steps": 4}
        config = CONFIG | sizes
        return engine.initialize(model=torch.nn.Linear(4, 1), config=config, training_data=data)

    def train_micro_batches(trainer, batches, count):
        for x, y in itertools.islice(batches, count):
            trainer.backward((trainer(x) - y).pow(2).mean())
            trainer.step()

    x = torch.randn(48, 4, generator=torch.Generator().manual_seed(1))
    data = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
    whole, _, loader, _ = build()
    train_micro_batches(whole, iter(loader), 24)
    stopped, _, loader, _ = build()
    train_micro_batches(stopped, iter(loader), 11)
    stopped.save_checkpoint(tmp_path)
    resumed, _, loader, _ = build()
    resumed.load_checkpoint(tmp_path)
    assert (resumed.global_steps, resumed.micro_steps) == (2, 8)
    train_micro_batches(resumed, iter(loader), 16)
    assert resumed.global_steps == 6
    assert torch.equal(resumed.module.weight, whole.module.weight)


def test_checkpoint_with_an_integer_buffer_in_place_of_a_float_one_is_an_error(tmp_path):
    def build(dtype):
        net = torch.nn.Linear(2, 1)
        net.register_buffer("count", torch.ones(1, dtype=dtype))
        return engine.initialize(model=net, config=CONFIG)[0]

    build(torch.float32).save_checkpoint(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"`count` has dtype torch\.float32 in the checkpoint"
    ):
        build(torch.int64).load_checkpoint(tmp_path)


class Calibrated(torch.nn.Linear):
    """A layer whose extra state gets its tensor only in the first step."""

    scale = None

    def forward(self, x):
        self.scale = torch.ones(2) if self.scale is None else self.scale + 1
        return super().forward(x)

    def get_extra_state(self):
        return {"scale": self.scale, "version": 1}

    def set_extra_state(self, state):
        self.scale = state["scale"]


def test_checkpoint_with_another_learning_rate_of_a_param_group_is_an_error(tmp_path):
    def build(lr):
        net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
        groups = [{"params": net[0].parameters()}, {"params": net[1].parameters(), "lr": lr}]
        config = {"train_batch_size": 8, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
        return engine.initialize(config=config, model=net, model_parameters=groups)[0]

    build(0.2).save_checkpoint(tmp_path)
    build(0.2).load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"`param_groups\.1\.lr` is 0\.2 .* 0\.3 now"):
        build(0.3).load_checkpoint(tmp_path)


def test_checkpoint_with_another_static_loss_scale_is_an_error(tmp_path):
    def build(scale):
        config = CONFIG | {"fp16": {"enabled": True, "loss_scale": scale}}
        return engine.initialize(config=config, model=model())[0]

    build(64).save_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"`loss_scale` is 64 in the checkpoint but 128 now"):
        build(128).load_checkpoint(tmp_path)


def test_export_replaces_no_existing_file(saved):
    path = saved / "weights.safetensors"
    path.symlink_to(saved / "elsewhere")
    status, _ = run("checkpoint", "export", saved, "-o", path)
    assert status == 2
    assert path.is_symlink()
    assert not (saved / "elsewhere").exists()


def test_extra_state_with_tensors_is_restored(tmp_path):
    trained, fresh = (engine.initialize(config=CONFIG, model=Calibrated(2, 1))[0] for _ in range(2))
    for _ in range(3):
        trained.backward(trained(torch.ones(8, 2)).mean())
        trained.step()
    trained.save_checkpoint(tmp_path)
    fresh.load_checkpoint(tmp_path)
    assert fresh.module.scale.tolist() == [3.0, 3.0]


def test_numpy_learning_rate_of_a_custom_optimizer_is_restored(tmp_path):
    def build():
        net = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        optimizer.param_groups[0]["factor"] = np.float32(0.5)
        config = {"train_batch_size": 8}
        return engine.initialize(config=config, model=net, optimizer=optimizer)[0]

    build().save_checkpoint(tmp_path)
    loaded = build()
    loaded.load_checkpoint(tmp_path)
    assert loaded.optimizer.param_groups[0]["factor"] == np.float32(0.5)


def test_destroy_restores_signal_handlers(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    trainer, _ = start(**checkpoint_section(tmp_path))
    assert signal.getsignal(signal.SIGTERM) != before
    trainer.destroy()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.fixture
def saved(tmp_path):
    trainer, loader = start()
    for _ in range(3):
        train(trainer, loader, 2)
        trainer.save_checkpoint(tmp_path)
    return tmp_path


def damage(directory, how):
    newest = directory / "global_step6"
    files = sorted(newest.glob("*.safetensors"))
    match how:
        case "a truncated shard":
            files[0].write_bytes(files[0].read_bytes()[:-7])
        case "a flipped byte":
            content = bytearray(files[0].read_bytes())
            content[len(content) // 2] ^= 1
            files[0].write_bytes(content)
        case "a missing file":
            (newest / "random.0.pt").unlink()
        case "no manifest":
            (newest / "manifest.json").unlink()
        case "a broken manifest":
            (newest / "manifest.json").write_text('{"format": 1, "tag"')
        case "an empty latest":
            (directory / "latest").write_text("")
        case "a dangling latest":
            (directory / "latest").write_text("global_step99")
        case "no latest":
            (directory / "latest").unlink()
        case "a writer that died":
            (newest / "manifest.json").unlink()
            newest.rename(directory / ".global_step6.partial")


@pytest.mark.parametrize(
    ("how", "step"),
    [
        ("a truncated shard", 4),
        ("a flipped byte", 4),
        ("a missing file", 4),
        ("no manifest", 4),
        ("a broken manifest", 4),
        ("a writer that died", 4),
        ("an empty latest", 6),
        ("a dangling latest", 6),
        ("no latest", 6),
    ],
)
def test_load_checkpoint_after_damage_uses_newest_complete_one(saved, how, step):
    damage(saved, how)
    fresh, _ = start()
    fresh.load_checkpoint(saved)
    assert fresh.global_steps == step


def test_resume_auto_with_only_damaged_checkpoints_is_an_error(saved):
    for place in saved.glob("global_step*"):
        shard = next(place.glob("*.safetensors"))
        shard.write_bytes(shard.read_bytes()[:-7])
    before = sorted(path.name for path in saved.iterdir())
    message = r"no complete checkpoint.* global_step2 is damaged: .* bytes instead of .*never"
    with pytest.raises(FileNotFoundError, match=message):
        start(**checkpoint_section(saved, resume="auto"))
    assert sorted(path.name for path in saved.iterdir()) == before


def test_resume_auto_with_checkpoints_of_another_tool_is_an_error(tmp_path):
    (tmp_path / "global_step9").mkdir()
    (tmp_path / "latest").write_text("global_step9")
    with pytest.raises(FileNotFoundError, match="another tool wrote the directory"):
        start(**checkpoint_section(tmp_path))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("a truncated shard", r"\.safetensors has [\d,]+ bytes instead of [\d,]+"),
        ("a flipped byte", r"\.safetensors does not match its hash.*: .*global_step4"),
        ("a missing file", "random.0.pt is missing"),
        ("no manifest", "manifest.json is missing"),
        ("a broken manifest", "manifest.json cannot be read"),
    ],
)
def test_load_checkpoint_damaged_tag_changes_nothing(saved, how, message):
    damage(saved, how)
    fresh, _ = start()
    before = [p.detach().clone() for p in fresh.module.parameters()]
    with pytest.raises(CheckpointError, match=message):
        fresh.load_checkpoint(saved, tag="global_step6")
    after = list(fresh.module.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert fresh.global_steps == 0


def test_load_checkpoint_different_model_names_first_key(saved):
    config = {"train_batch_size": 8, "optimizer": {"type": "SGD", "params": {"lr": 0.01}}}
    for net, message in (
        (torch.nn.Sequential(torch.nn.Linear(4, 9)), r"`0\.weight` has shape \(8, 4\)"),
        (torch.nn.Linear(4, 8), "`weight` is missing"),
    ):
        other, *_ = engine.initialize(config=config, model=net)
        with pytest.raises(CheckpointError, match=message):
            other.load_checkpoint(saved, load_module_only=True)


def test_load_checkpoint_different_run_requires_override(saved):
    other, _ = start(train_batch_size=16, optimizer={"type": "SGD", "params": {"lr": 0.01}})
    with pytest.raises(
        CheckpointError,
        match="`optimizer.params.momentum` is 0.9 in the checkpoint but 0.0 now; `tra",
    ):
        other.load_checkpoint(saved)
    steps = {"cycle_min_lr": 0.01, "cycle_max_lr": 0.02, "cycle_first_step_size": 8}
    longer = {"type": "OneCycle", "params": steps}
    taken, _ = start(scheduler=longer, **checkpoint_section(saved, override=True))
    assert (taken.global_steps, taken.get_lr()) == (6, [0.0175])


DECAY = {"type": "WarmupDecayLR", "params": {"total_num_steps": "1dur", "warmup_num_steps": "1ep"}}


@pytest.mark.parametrize(
    ("section", "samples", "message"),
    [
        ({"max_duration": 200}, 64, "total_num_steps` is 40 in the checkpoint but 200 now"),
        (
            {"max_duration": "5ep"},
            128,
            "warmup_num_steps` is 8 in .* 16 now; .*total_num_steps` is 40 in .* 80 now",
        ),
        (
            {"max_duration": 40, "scale_schedule_ratio": 0.5},
            64,
            "total_num_steps` is 40 in the checkpoint but 20 now",
        ),
    ],
)
def test_load_checkpoint_different_run_length_is_rejected(tmp_path, section, samples, message):
    """The config's durations are unchanged, but they resolve to different numbers of steps."""
    config = CONFIG | {"scheduler": DECAY}
    trainer, loader = start(config, engine={"max_duration": "5ep"})
    train(trainer, loader, 3)
    trainer.save_checkpoint(tmp_path)
    same, _ = start(config, engine={"max_duration": 40})
    same.load_checkpoint(tmp_path)
    assert same.get_lr() == trainer.get_lr()
    other, *_ = engine.initialize(
        config=config | {"engine": section}, model=model(), training_data=dataset(samples)
    )
    with pytest.raises(CheckpointError, match=message):
        other.load_checkpoint(tmp_path)
    assert other.global_steps == 0


def test_load_checkpoint_different_user_optimizer_or_scheduler_is_rejected(tmp_path):
    def build(lr=0.1, weight_decay=0.1, make=torch.optim.AdamW, length=10):
        net = model()
        optimizer = make(net.parameters(), lr=lr, weight_decay=weight_decay)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, length)
        return engine.initialize(
            config={"train_batch_size": 8}, model=net, optimizer=optimizer, lr_scheduler=scheduler
        )[0]

    trainer = build()
    trainer.backward(trainer(torch.ones(8, 4)).mean())
    trainer.step()
    trainer.save_checkpoint(tmp_path)
    again = build()
    again.load_checkpoint(tmp_path)
    assert again.get_lr() == trainer.get_lr()
    for other, message in (
        (build(length=1000), "`scheduler.params.T_max` is 10 in the checkpoint but 1000 now"),
        (
            build(weight_decay=0.5),
            r"`optimizer\.groups\.0\.weight_decay` is 0\.1 in .* 0\.5 now",
        ),
        (build(make=torch.optim.SGD), "`optimizer.type` is AdamW in the checkpoint but SGD now"),
    ):
        with pytest.raises(CheckpointError, match=message):
            other.load_checkpoint(tmp_path)


def start_with_tensors(kind, lr=0.1, gain=(1.0, 2.0)):
    """Start an engine with a custom optimizer and scheduler that hold tensors and functions."""
    net = model()
    optimizer = getattr(torch.optim, kind)(net.parameters(), lr=torch.tensor(lr))

    class Scheduler(torch.optim.lr_scheduler.LambdaLR):
        def __init__(self):
            self.gain = torch.as_tensor(gain)
            super().__init__(optimizer, lambda step: 0.9**step)

    return engine.initialize(
        config={"train_batch_size": 8}, model=net, optimizer=optimizer, lr_scheduler=Scheduler()
    )[0]


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_load_checkpoint_different_tensor_value_is_rejected(tmp_path, kind):
    trainer = start_with_tensors(kind)
    trainer.save_checkpoint(tmp_path)
    start_with_tensors(kind).load_checkpoint(tmp_path)
    for other, message in (
        (
            start_with_tensors(kind, lr=0.2),
            r"`optimizer\.groups\.0\.lr` is 0\.1\d* in .* 0\.2\d* now",
        ),
        (
            start_with_tensors(kind, gain=(1.0, 3.0)),
            r"`scheduler\.params\.gain\.1` is 2\.0 .* 3\.0 now",
        ),
        (
            start_with_tensors(kind, gain=torch.ones(999)),
            r"`scheduler\.params\.gain` is \[.* [0-9a-f]+ now",
        ),
    ):
        with pytest.raises(CheckpointError, match=message):
            other.load_checkpoint(tmp_path)


def rewrite_identity(place, change):
    manifest = json.loads((place / "manifest.json").read_text())
    change(manifest["identity"])
    manifest.pop("checksum", None)  # earlier versions wrote none
    (place / "manifest.json").write_text(json.dumps(manifest))


def test_load_checkpoint_identity_without_tensors_compares_other_values(tmp_path):
    """Earlier versions did not save values that JSON cannot represent."""
    trainer = start_with_tensors("SGD")
    trainer.save_checkpoint(tmp_path)

    def drop(identity):
        del identity["optimizer"]["converted"], identity["scheduler"]["converted"]
        for name in ("lr", "initial_lr"):
            del identity["optimizer"]["groups"][0][name]
        for name in ("gain", "lr_lambdas", "base_lrs"):
            del identity["scheduler"]["params"][name]

    place = tmp_path / "global_step0"
    rewrite_identity(place, drop)
    start_with_tensors("SGD", lr=0.2).load_checkpoint(tmp_path)

    def change(identity):
        identity["optimizer"]["groups"][0]["weight_decay"] = 0.5

    rewrite_identity(place, change)
    with pytest.raises(CheckpointError, match=r"`optimizer\.groups\.0\.weight_decay` is 0\.5"):
        start_with_tensors("SGD").load_checkpoint(tmp_path)

    def remove(identity):
        del identity["optimizer"]["groups"][0]["weight_decay"]

    rewrite_identity(place, remove)
    with pytest.raises(
        CheckpointError, match=r"weight_decay` is absent in the checkpoint but 0 now"
    ):
        start_with_tensors("SGD").load_checkpoint(tmp_path)


def test_save_checkpoint_existing_tag_is_replaced_when_complete(saved, monkeypatch):
    trainer, loader = start()
    train(trainer, loader, 1)

    def full(paths, directory):
        raise OSError(28, "No space left on device", str(directory))

    monkeypatch.setattr(storage, "describe_files", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.save_checkpoint(saved, tag="global_step6")
    monkeypatch.undo()
    assert complete_tags(saved) == ["global_step2", "global_step4", "global_step6"]
    trainer.save_checkpoint(saved, tag="global_step6")
    assert storage.find(saved, "global_step6")[1].step == 1
    assert [path.name for path in saved.glob(".*")] == [".lock"]


def test_load_checkpoint_writer_killed_between_renames_loses_nothing(saved):
    (saved / "global_step6").rename(saved / ".global_step6.old")
    fresh, _ = start()
    fresh.load_checkpoint(saved)
    assert fresh.global_steps == 6


def test_async_save_contains_state_at_the_call(tmp_path):
    trainer, loader = start(**checkpoint_section(tmp_path, every=2, **{"async": True}))
    at_save = []
    for _ in range(3):
        train(trainer, loader, 2)
        at_save.append([p.detach().clone() for p in trainer.module.parameters()])
    train(trainer, loader, 1)
    trainer.wait_for_checkpoint()
    assert complete_tags(tmp_path) == ["global_step4", "global_step6"]
    again, _ = start(**checkpoint_section(tmp_path))
    assert again.global_steps == 6
    saved = again.module.parameters()
    assert all(torch.equal(a, b) for a, b in zip(at_save[-1], saved, strict=True))


def test_async_save_failure_is_raised_by_wait(tmp_path, monkeypatch):
    def full(paths, directory):
        raise OSError(28, "No space left on device", str(directory))

    trainer, loader = start(**checkpoint_section(tmp_path, **{"async": True}))
    train(trainer, loader, 1)
    monkeypatch.setattr(storage, "describe_files", full)
    trainer.save_checkpoint(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        trainer.wait_for_checkpoint()
    monkeypatch.undo()
    trainer.save_checkpoint(tmp_path)
    trainer.wait_for_checkpoint()
    assert complete_tags(tmp_path) == ["global_step1"]


def test_async_save_failure_at_exit_sets_exit_status(tmp_path):
    """No caller can catch the error, and exit status 0 would mean that everything is saved."""
    script = f"""
import torch, engine
from engine.checkpoint import storage

from engine.checkpoint.saved_run import read_run
storage.describe_files = lambda *_: 1 / 0
config = {{"train_batch_size": 1, "optimizer": {{"type": "SGD"}}}}
config["engine"] = {{"checkpoint": {{"dir": {str(tmp_path)!r}, "async": True}}}}
trainer, *_ = engine.initialize(model=torch.nn.Linear(2, 1), config=config)
trainer.save_checkpoint({str(tmp_path)!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "the final checkpoint was not written" in done.stderr
    assert "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize("tag", ["", " ", "..", "a/b", "a\nb", "a\0b", ".hidden", "latest"])
def test_save_checkpoint_invalid_tag_is_rejected(tmp_path, tag):
    if not tag:
        with pytest.raises(CheckpointError, match="`tag` must be a valid directory name"):
            storage.check_tag(tag)
        return
    trainer, _ = start()
    with pytest.raises(CheckpointError, match="`tag` must be a valid directory name"):
        trainer.save_checkpoint(tmp_path, tag=tag)


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch bomb_went_off",))


def test_load_checkpoint_pickle_bomb_is_rejected(saved, monkeypatch):
    monkeypatch.chdir(saved)
    place = saved / "global_step6"
    torch.save(Bomb(), place / "engine.pt")
    manifest = json.loads((place / "manifest.json").read_text())
    manifest["files"] |= describe_files([place / "engine.pt"], place)
    del manifest["checksum"]
    (place / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"`posix\.system`"):
        start()[0].load_checkpoint(saved)
    assert not Path("bomb_went_off").exists()


def run(*arguments):
    out = io.StringIO()
    return main([str(argument) for argument in arguments], out, out), out.getvalue()


def test_checkpoint_command_accepts_the_directory_of_one_checkpoint(saved):
    one = saved / "global_step4"
    assert run("checkpoint", "verify", one) == (0, "global_step4: valid\n")
    assert json.loads(run("checkpoint", "show", one)[1])["step"] == 4
    path = saved / "weights.safetensors"
    assert run("checkpoint", "export", one, "-o", path)[0] == 0
    assert path.is_file()


def test_checkpoint_command_shows_the_best_value_of_the_metric(tmp_path):
    config = {
        "train_batch_size": 4,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "engine": {
            "checkpoint": {
                "dir": str(tmp_path),
                "best": {"metric": "accuracy", "mode": "max"},
            }
        },
    }
    trainer, *_ = engine.initialize(model=torch.nn.Linear(2, 1), config=config)
    for step, accuracy in enumerate([0.5, 0.912, 0.7]):
        trainer.backward(trainer(torch.ones(4, 2)).mean())
        trainer.step()
        if step > 0:
            trainer.report({"accuracy": accuracy})
        trainer.save_checkpoint(tmp_path)
    trainer.destroy()
    best = [
        json.loads(run("checkpoint", "show", tmp_path / f"global_step{step}")[1])["best"]
        for step in (1, 2, 3)
    ]
    assert best == [None, *2 * [{"metric": "accuracy", "value": 0.912, "step": 2}]]
    lines = run("checkpoint", "ls", tmp_path)[1].splitlines()
    marked = [line.split()[0] for line in lines if "best accuracy so far: 0.912" in line]
    assert marked == ["best", "global_step2"]


def test_checkpoint_command_lists_verifies_shows_and_exports(saved):
    status, out = run("checkpoint", "ls", saved)
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == complete_tags(saved)
    assert "step 6  torch  1 rank" in out
    assert run("checkpoint", "verify", saved) == (
        0,
        "global_step2: valid\nglobal_step4: valid\nglobal_step6: valid\n",
    )
    status, out = run("checkpoint", "show", saved)
    assert json.loads(out)["identity"]["scheduler"]["type"] == "OneCycle"
    path = saved / "weights.safetensors"
    assert run("checkpoint", "export", saved, "-o", path)[0] == 0
    from safetensors.torch import load_file

    assert load_file(path).keys() == model().state_dict().keys()
    out, err = io.StringIO(), io.StringIO()
    nowhere = str(saved / "no directory" / "x.safetensors")
    assert main(["checkpoint", "export", str(saved), "-o", nowhere], out, err) == 2
    assert err.getvalue() == (
        f"onecycle: {nowhere}: the directory of the output file does not exist; create it\n"
    )
    assert main(["checkpoint", "show", str(saved), "--tag", "nope"], out, err) == 2
    assert (
        "does not contain the checkpoint 'nope'. Complete checkpoints: global_step2"
        in err.getvalue()
    )
    damage(saved, "a flipped byte")
    status, out = run("checkpoint", "verify", saved)
    assert (status, "does not match its hash" in out) == (1, True)
    assert run("checkpoint", "ls", saved / "none")[0] == 2


def test_checkpoint_verify_ignores_other_directories_but_reports_a_missing_manifest(saved):
    (saved / "logs").mkdir()
    (saved / "logs" / "events.txt").write_text("")
    (saved / "global_step2" / "manifest.json").unlink()
    status, out = run("checkpoint", "verify", saved)
    assert status == 1
    assert [line.split(":")[0] for line in out.splitlines()] == [
        "global_step2",
        "global_step4",
        "global_step6",
    ]


@pytest.mark.parametrize("directory", ["empty", "absent"])
def test_checkpoint_verify_without_checkpoints_reports_it(tmp_path, directory):
    (tmp_path / "empty").mkdir()
    path = tmp_path / directory
    out, err = io.StringIO(), io.StringIO()
    assert main(["checkpoint", "verify", str(path)], out, err) == 2
    assert out.getvalue() == ""
    assert err.getvalue() == (
        f"onecycle: {path}: the directory contains no checkpoint; pass the checkpoint directory of "
        "a run\n"
    )


def test_checkpoint_verify_does_not_import_torch(saved):
    code = (
        "import sys; from engine.cli.main import main\n"
        f"assert main(['checkpoint', 'verify', {str(saved)!r}]) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def child(directory, *arguments):
    return subprocess.Popen(
        [sys.executable, SCRIPT, directory, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGUSR1", marks=pytest.mark.slow)])
def test_signal_saves_and_exits_with_status_75(tmp_path, name):
    process = child(tmp_path, 100_000)
    process.stdout.readline()  # the first step is done
    process.send_signal(getattr(signal, name))
    rest, _ = process.communicate()  # with a timeout, it would lose lines that readline has read
    assert process.returncode == 75
    newest = storage.list_checkpoints(tmp_path)[-1][1]
    printed = 1 + len(rest.splitlines())
    assert newest.step in {printed, printed + 1}  # the last step exits before it prints


@pytest.mark.slow
def test_killed_runs_match_the_uninterrupted_run(tmp_path):
    updates, kills = 60, 6
    process = child(tmp_path / "uninterrupted", updates)
    uninterrupted, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    randomness = random.Random(0)
    rows = {}
    for attempt in range(kills + 1):
        process = child(tmp_path / "killed", updates)
        last = attempt == kills
        stop = None if last else randomness.randrange(3, 16)
        for count, line in enumerate(process.stdout):
            step, _, row = line.partition(" ")
            assert rows.setdefault(step, row) == row, "the data order or the learning rate differs"
            if count == stop:
                process.kill()
                break
        process.communicate(timeout=60)
    assert process.returncode == 0
    # If a process is killed between saving and printing, only its last line is missing.
    expected = dict(line.split(" ", 1) for line in uninterrupted.splitlines(keepends=True))
    assert rows.items() <= expected.items()
    assert rows[str(updates)] == expected[str(updates)]


def test_save_after_a_batch_that_is_not_from_the_loader_records_the_start_of_the_data(tmp_path):
    trainer, _ = start(train_micro_batch_size_per_gpu=4)  # two micro-batches per step
    trainer.backward(trainer(torch.ones(4, 4)).mean())
    trainer.step()
    trainer.save_checkpoint(tmp_path, tag="open")
    again, loader = start(train_micro_batch_size_per_gpu=4)
    again.load_checkpoint(tmp_path, tag="open")
    assert again.micro_steps == 0
    assert len(list(loader)) == 16


def test_negative_position_of_an_earlier_version_is_read_as_the_start_of_the_data(tmp_path):
    trainer, _ = start()
    trainer.save_checkpoint(tmp_path, tag="saved")
    path = tmp_path / "saved" / "engine.pt"
    state = torch.load(path)
    state["loader"]["given"] = -1
    torch.save(state, path)
    position = trainer._checkpointer.data.read(read_run(path), trainer._run.config.batch, path, 1)
    assert position["given"] == 0


def test_lock_is_released_if_incomplete_checkpoints_cannot_be_deleted(tmp_path):
    trainer, _ = start()
    (tmp_path / ".old.partial").mkdir()
    with pytest.MonkeyPatch.context() as patch:

        def fail(partial):
            raise PermissionError(f"cannot delete {partial}")

        patch.setattr(storage, "discard", fail)
        for _ in range(2):  # the second save tries again
            with pytest.raises(PermissionError, match="cannot delete"):
                trainer.save_checkpoint(tmp_path)
            assert not (tmp_path / ".lock").exists()
    trainer.save_checkpoint(tmp_path)
    assert complete_tags(tmp_path) == ["global_step0"]
