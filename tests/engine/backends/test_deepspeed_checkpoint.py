"""DeepSpeed's checkpoint files are loaded without running code from them."""

import json
import os

import pytest
import torch

import engine
from engine.backends.deepspeed_checkpoint import keep_implementation
from engine.backends.deepspeed_layout import Layout
from engine.errors import CheckpointError
from tests.testing.distributed import run_distributed_test
from tests.testing.fuzz_checkpoints import CheckpointMutator, build_targets
from tests.testing.saved_runs import DEEPSPEED_RUNS


class Bomb:
    def __reduce__(self):
        return os.makedirs, ("exploded", 0o700, True)


def start(stage, **checkpoint):
    config = {
        "train_batch_size": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
        "bf16": {"enabled": stage > 0},
        "zero_optimization": {"stage": stage},
        "engine": {"backend": "deepspeed", "checkpoint": checkpoint},
    }
    return engine.initialize(config=config, model=torch.nn.Linear(2, 1))[0]


def train(trainer):
    x = torch.ones(
        trainer.train_micro_batch_size_per_gpu(), 2, dtype=next(trainer.module.parameters()).dtype
    )
    trainer.backward(trainer(x).float().pow(2).mean())
    trainer.step()


def load_checkpoints_and_a_bomb(stage, directory):
    os.chdir(directory)
    trainer = start(stage)
    train(trainer)
    trainer.save_checkpoint(directory)
    resumed = start(stage)
    resumed.load_checkpoint(directory)
    assert resumed.global_steps == 1
    (file,) = directory.rglob("*model_states.pt")
    state = torch.load(file, weights_only=False)
    torch.save({**state, "extra": Bomb()}, file)
    manifest = file.with_name("manifest.json")
    manifest.write_text(remove_hashes(manifest.read_text()))
    with pytest.raises(CheckpointError, match=r"`os\.makedirs`.*`engine.checkpoint.trust_pickle`"):
        start(stage).load_checkpoint(directory)
    assert not (directory / "exploded").exists()
    start(stage, trust_pickle=True).load_checkpoint(directory)
    assert (directory / "exploded").exists()


def load_checkpoints_with_random_damage(directory):
    mutator = CheckpointMutator(0, directory, DEEPSPEED_RUNS)
    load = build_targets(mutator)["checkpoint load"]
    for _ in range(60):
        with mutator.damage() as (name, path):
            load(name, path)
    assert not mutator.bomb.exists()


@pytest.mark.slow
def test_deepspeed_checkpoint_with_random_damage_raises_an_error_or_loads(tmp_path):
    """No part is loaded if another part is damaged; see `tests.testing.fuzz`."""
    run_distributed_test(load_checkpoints_with_random_damage, 1, tmp_path)


def load_checkpoint_with_damaged_optimizer(stage, directory):
    trainer = start(stage)
    train(trainer)
    trainer.save_checkpoint(directory)
    (file,) = directory.rglob("*optim_states.pt" if stage else "*model_states.pt")
    content = torch.load(file, weights_only=False)
    state = content["optimizer_state_dict" if stage else "optimizer"]
    state = state.get("base_optimizer_state") or state.get("optimizer_state_dict") or state
    state["state"][0]["exp_avg"] = torch.zeros(7)
    torch.save(content, file)
    manifest = file.with_name("manifest.json")
    manifest.write_text(remove_hashes(manifest.read_text()))
    train(trainer)
    weights = [parameter.detach().clone() for parameter in trainer.module.parameters()]
    with pytest.raises(CheckpointError, match=r"_states\.pt is damaged: `optimizer.*exp_avg` must"):
        trainer.load_checkpoint(directory)
    assert trainer.global_steps == 2
    assert all(map(torch.equal, trainer.module.parameters(), weights))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_deepspeed_checkpoint_with_a_damaged_optimizer_changes_nothing(stage, tmp_path):
    run_distributed_test(load_checkpoint_with_damaged_optimizer, 1, stage, tmp_path)


def remove_hashes(text):
    content = json.loads(text)
    del content["checksum"]
    return json.dumps({**content, "files": {}})


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_deepspeed_checkpoint_with_code_in_it_is_refused_unless_it_is_trusted(stage, tmp_path):
    run_distributed_test(load_checkpoints_and_a_bomb, 1, stage, tmp_path)


def load_with_damage_on_rank_1(stage, directory):
    trainer = start(stage)
    train(trainer)
    trainer.save_checkpoint(directory)
    train(trainer)
    weights = [parameter.detach().clone() for parameter in trainer.module.parameters()]
    message = "does not fit" if trainer.global_rank == 1 else "rank 1 failed: .* does not fit"
    for options in ({}, {"load_optimizer_states": False}):
        with pytest.MonkeyPatch.context() as patch:
            if trainer.global_rank == 1:
                patch.setattr(Layout, "check", refuse)
            with pytest.raises((CheckpointError, RuntimeError), match=message):
                trainer.load_checkpoint(directory, **options)
    assert all(map(torch.equal, trainer.module.parameters(), weights))
    train(trainer)


def refuse(layout, files, **options):
    raise CheckpointError("the layout does not fit")


@pytest.mark.parametrize("stage", [0, 3])
def test_deepspeed_checkpoint_that_one_rank_refuses_is_an_error_on_all_ranks(stage, tmp_path):
    run_distributed_test(load_with_damage_on_rank_1, 2, stage, tmp_path, timeout=40)


def test_failed_load_keeps_the_implementation_of_the_optimizer():
    optimizer = torch.optim.AdamW([torch.zeros(2, requires_grad=True)], foreach=True)
    with pytest.raises(ValueError, match="^damaged$"), keep_implementation(optimizer):
        optimizer.param_groups[0] |= {"foreach": None, "bias_correction": True}
        raise ValueError("damaged")
    assert optimizer.param_groups[0]["foreach"] is True
    assert "bias_correction" not in optimizer.param_groups[0]
