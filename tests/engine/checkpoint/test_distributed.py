"""Checkpoints with several ranks: resume, different world sizes, failing and absent ranks."""

import errno
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import engine
from engine.checkpoint import collectives, saved_run, storage
from engine.errors import CheckpointError
from tests.testing.distributed import run_distributed_test
from tests.testing.small_model import (
    all_equal,
    build_config,
    build_model,
    copy_parameters,
    start,
    train_step,
)

ONE_CYCLE = {
    "type": "OneCycle",
    "params": {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1, "cycle_first_step_size": 4},
}


def checkpoint_section(directory, backend="torch", **plan):
    return {"engine": {"backend": backend, "checkpoint": {"dir": str(directory), **plan}}}


def train(trainer, steps):
    while trainer.global_steps < steps:
        train_step(trainer)


def resume(directory):
    trainer = start()
    train(trainer, 2)
    trainer.save_checkpoint(directory)
    train(trainer, 5)
    resumed = start()
    resumed.load_checkpoint(directory)
    assert resumed.global_steps == 2
    train(resumed, 5)
    assert all_equal(copy_parameters(trainer), copy_parameters(resumed))


def test_fsdp_resumed_run_matches_uninterrupted_run(tmp_path):
    run_distributed_test(resume, 2, tmp_path)
    assert (tmp_path / "latest").exists()


def save_in_background(directory):
    """Two ranks save through a separate process group while they train."""
    plan = checkpoint_section(directory, every=2, **{"async": True})
    trainer = start(**plan)
    train(trainer, 6)
    expected = copy_parameters(trainer)
    train(trainer, 7)
    trainer.wait_for_checkpoint()
    dist.barrier()
    resumed = start(**plan)
    assert resumed.global_steps == 6
    assert all_equal(expected, copy_parameters(resumed))


def test_fsdp_async_checkpoint_resumes(tmp_path):
    run_distributed_test(save_in_background, 2, tmp_path)


def save_or_reload(directory, is_first):
    """Train and save, or load and save; return the full tensors of model and optimizer."""
    section = {"backend": "torch", "checkpoint": {"override": True}}
    config = build_config(engine=section, train_batch_size=6)
    trainer, optimizer, *_ = engine.initialize(model=build_model(), config=config)
    if is_first:
        train_step(trainer)
    else:
        trainer.load_checkpoint(directory)
    trainer.save_checkpoint(directory)
    tensors = list(trainer.module.state_dict().values())
    for values in optimizer.state_dict()["state"].values():
        tensors += [values[name] for name in sorted(values)]
    return [t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors]


@pytest.mark.slow
def test_fsdp_state_is_the_same_at_every_world_size(tmp_path):
    expected = None
    for world_size in (2, 3, 1, 2):
        for found in run_distributed_test(save_or_reload, world_size, tmp_path, expected is None):
            expected = expected or found
            assert all_equal(expected, found)


def resume_on_deepspeed(directory):
    zero = {"zero_optimization": {"stage": 2}, "scheduler": ONE_CYCLE}
    trainer = start(**zero, **checkpoint_section(directory, "deepspeed", every=2, keep=None))
    train(trainer, 5)
    resumed = start(**zero, **checkpoint_section(directory, "deepspeed", resume="never"))
    resumed.load_checkpoint(directory, tag="global_step2")
    assert resumed.global_steps == 2
    train(resumed, 5)
    assert all_equal(copy_parameters(trainer), copy_parameters(resumed))
    assert trainer.get_lr() == resumed.get_lr()


def test_deepspeed_resumed_run_matches_uninterrupted_run(tmp_path):
    run_distributed_test(resume_on_deepspeed, 2, tmp_path)
    _, manifest = storage.find(tmp_path, "global_step4")
    assert (manifest.backend, manifest.world_size) == ("deepspeed", 2)


def loss_fn(trainer, x):
    return trainer(x).float().pow(2).mean()


def resume_with_autocast(directory):
    """Without ZeRO, DeepSpeed's autocast scales the loss with torch's GradScaler."""
    settings = {
        "zero_optimization": {"stage": 0},
        "torch_autocast": {"enabled": True, "dtype": "float16"},
        "engine": {"backend": "deepspeed"},
    }
    trainer = start(**settings)
    x = torch.ones(2, 6)
    for factor in (float("inf"), 1.0):
        trainer.backward(loss_fn(trainer, x) * factor)
        trainer.step()
    scale = trainer.cur_scale
    trainer.save_checkpoint(directory)
    resumed = start(**settings)
    assert resumed.cur_scale == 2 * scale
    resumed.load_checkpoint(directory)
    assert resumed.cur_scale == scale
    first, second = (
        engine.lr_range_test(resumed, [x], loss_fn=loss_fn, steps=30) for _ in range(2)
    )
    assert first.runs == second.runs
    assert resumed.cur_scale == scale


def test_deepspeed_autocast_resumes_its_loss_scale(tmp_path):
    run_distributed_test(resume_with_autocast, 2, tmp_path)


def resume_without_frozen_parameters(directory):
    def adapted(seed):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 1))
        model[0].requires_grad_(requires_grad=False)
        section = {"zero_optimization": {"stage": 1}, "engine": {"backend": "deepspeed"}}
        return engine.initialize(model=model, config=build_config(**section))[0]

    trainer = adapted(0)
    train_step(trainer)
    trainer.save_checkpoint(directory, exclude_frozen_parameters=True)
    other = adapted(1)
    frozen = other.module[0].weight.clone()
    other.load_checkpoint(directory)
    assert torch.equal(other.module[1].weight, trainer.module[1].weight)
    assert torch.equal(other.module[0].weight, frozen)


def test_deepspeed_loads_a_checkpoint_without_frozen_parameters(tmp_path):
    run_distributed_test(resume_without_frozen_parameters, 2, tmp_path)


def save_on_one_rank_only(directory, saving):
    trainer = start()
    done = directory / "the rank that saves is done"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "_TIMEOUT", 1.0)
        message = f"must be called on every rank, but rank {1 - saving} did not reach it within 1 s"
        if trainer.global_rank == saving:
            begin = time.monotonic()
            with pytest.raises(RuntimeError, match=message):
                trainer.save_checkpoint(directory)
            assert 1 <= time.monotonic() - begin < 3
            done.touch()
        while not done.exists():
            time.sleep(0.01)
        if trainer.global_rank != saving:  # too late
            patch.setattr(collectives, "_TIMEOUT", 1000.0)
            with pytest.raises(RuntimeError, match=f"but rank {1 - saving} did not reach it"):
                trainer.save_checkpoint(directory)
    trainer.save_checkpoint(directory)


@pytest.mark.parametrize("saving", [0, 1])
def test_save_checkpoint_on_one_rank_only_raises_in_time_and_names_the_other(tmp_path, saving):
    run_distributed_test(save_on_one_rank_only, 2, tmp_path, saving, timeout=30)
    assert storage.find(tmp_path)[1].tag == "global_step0"


def destroy_on(destroying, directory):
    trainer = start(**checkpoint_section(directory / "run", every=5))
    train(trainer, 2)
    done = directory / "destroyed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "_PATIENCE", 1.0)
        if trainer.global_rank in destroying:
            trainer.destroy()
            done.touch()
    while not done.exists():
        time.sleep(0.01)


@pytest.mark.parametrize(("destroying", "saved"), [((0, 1), [2]), ((1,), [])])
def test_destroy_saves_the_last_steps_if_every_rank_calls_it(tmp_path, destroying, saved):
    run_distributed_test(destroy_on, 2, destroying, tmp_path, timeout=30)
    found = storage.list_checkpoints(tmp_path / "run")
    assert [manifest.step for _, manifest in found] == saved


def save_with_different_tags(directory):
    trainer = start()
    message = r"`tag` must be the same on all ranks, got \['tag0', 'tag1'\]"
    with pytest.raises(ValueError, match=message):
        trainer.save_checkpoint(directory, tag=f"tag{trainer.global_rank}")


def test_save_checkpoint_with_different_tags_is_an_error(tmp_path):
    run_distributed_test(save_with_different_tags, 2, tmp_path)


class FullDisk(pytest.MonkeyPatch):
    """Raises ENOSPC when a file with a given name is written or renamed."""

    def fail(self, method, name):
        original = getattr(Path, method)

        def failing(path, *args):
            if path.name == name:
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(path, *args)

        self.setattr(Path, method, failing)


def save_without_space_on_one_rank(directory):
    trainer = start()
    train_step(trainer)
    for name in ("random.1.pt", "values.pt"):
        with FullDisk.context() as disk:
            disk.fail("write_bytes", name)
            with pytest.raises((OSError, RuntimeError), match="No space left on device"):
                trainer.save_checkpoint(directory)
    train_step(trainer)
    trainer.save_checkpoint(directory)


def test_save_checkpoint_failing_on_one_rank_raises_on_all_ranks(tmp_path):
    run_distributed_test(save_without_space_on_one_rank, 2, tmp_path)
    assert storage.find(tmp_path)[1].tag == "global_step2"


def save_in_background_without_space(directory):
    trainer = start(**checkpoint_section(directory, **{"async": True}))
    with FullDisk.context() as disk:
        disk.fail("rename", ".global_step0.partial")
        trainer.save_checkpoint(directory)
        with pytest.raises((OSError, RuntimeError), match="No space left on device"):
            trainer.save_checkpoint(directory)
    trainer.save_checkpoint(directory)
    trainer.wait_for_checkpoint()


def test_async_save_failing_on_rank_0_raises_on_all_ranks_at_next_save(tmp_path):
    run_distributed_test(save_in_background_without_space, 2, tmp_path)
    assert storage.find(tmp_path)[1].tag == "global_step0"


class Batches:
    """A data loader that saves its position, and that once refuses to load it on rank 1."""

    refuses = True

    def __len__(self):
        return 3

    def __iter__(self):
        return iter(torch.ones(3, 2, 6))

    def state_dict(self):
        return {"position": 0}

    def load_state_dict(self, state):
        if self.refuses and dist.get_rank() == 1:
            self.refuses = False
            raise ValueError("the position is unknown")


def load_with_damage_on_rank_1(directory):
    config = build_config()
    trainer, _, loader, _ = engine.initialize(
        model=build_model(), config=config, training_data=Batches()
    )
    assert len(list(loader)) == 3
    train_step(trainer)
    trainer.save_checkpoint(directory)
    train_step(trainer)
    weights = copy_parameters(trainer)
    with pytest.raises((CheckpointError, RuntimeError), match="the position is unknown"):
        trainer.load_checkpoint(directory)
    with pytest.MonkeyPatch.context() as patch:
        if trainer.global_rank == 1:
            patch.setattr(saved_run, "read_values", fail_to_read)
        with pytest.raises((CheckpointError, RuntimeError), match="engine.pt is damaged"):
            trainer.load_checkpoint(directory)
    assert all_equal(weights, copy_parameters(trainer))
    assert trainer.global_steps == 2


def fail_to_read(path, **_):
    raise CheckpointError(f"{path} is damaged")


def test_load_checkpoint_failing_on_one_rank_raises_on_all_ranks(tmp_path):
    run_distributed_test(load_with_damage_on_rank_1, 2, tmp_path, timeout=30)
