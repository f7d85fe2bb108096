"""Save, collect and load the weights from the script, with and without sharding."""

import pytest
import torch
from torch.distributed.tensor import DTensor

import engine
from tests.testing.distributed import run_distributed_test
from tests.testing.small_model import all_equal, build_model, copy_parameters, start, train_step

BACKENDS = [("torch", 0), ("torch", 3), ("deepspeed", 0), ("deepspeed", 2), ("deepspeed", 3)]


class Tied(torch.nn.Module):
    """Two layers with one weight, a frozen layer and a buffer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.frozen = torch.nn.Linear(6, 1).requires_grad_(False)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x):
        return self.frozen(self.second(self.first(x))) * self.scale


def save_and_load(directory, backend, stage):
    """Save trained weights, load them into an engine with other ones, and train on."""
    gathers = {"stage3_gather_16bit_weights_on_model_save": True} if backend == "deepspeed" else {}
    config = {"zero_optimization": {"stage": stage, **gathers}, "engine": {"backend": backend}}
    trainer = start(**config)
    train_step(trainer)
    assert trainer.save_16bit_model(directory, f"{backend}{stage}.bin") is True
    torch.distributed.barrier()
    saved = torch.load(directory / f"{backend}{stage}.bin")
    plain = build_model()
    plain.load_state_dict(saved)
    if (backend, stage) != ("deepspeed", 3):
        assert all_equal(list(trainer.module_state_dict().values()), list(saved.values()))
    other = start(**config)
    for weights in ({"module": saved}, saved):
        train_step(other)
        other.load_module_state_dict(weights)
        x = torch.ones(2, 6) * (trainer.global_rank + 1)
        torch.testing.assert_close(other(x), plain(x), rtol=1e-5, atol=1e-6)
        other.zero_grad()
    # The first step must start from the loaded weights, not from copies of the old ones.
    before = other(x).detach()
    train_step(other)
    assert (other(x) - before).abs().max() < 0.1
    if stage == 3:
        whole = trainer._zero3_consolidated_16bit_state_dict()
        assert (whole is None) == (trainer.global_rank != 0)
        assert whole is None or all_equal(list(whole.values()), list(saved.values()))


@pytest.mark.parametrize(("backend", "stage"), BACKENDS)
def test_saved_weights_are_whole_and_can_be_loaded(tmp_path, backend, stage):
    run_distributed_test(save_and_load, 2, tmp_path, backend, stage)


def load_into_sharded_modules():
    trainer = start()
    whole = {name: torch.full(p.shape, 2.0) for name, p in build_model().named_parameters()}
    train_step(trainer)  # FSDP keeps the root's parameters gathered
    trainer.module.load_state_dict(whole)
    assert all((p == 2.0).all() for p in copy_parameters(trainer))
    trainer.module[1].load_state_dict({"weight": torch.zeros(6, 6), "bias": torch.zeros(6)})
    zeros = [bool((p == 0.0).all()) for p in copy_parameters(trainer)]
    assert zeros == [False] * 2 + [True] * 2 + [False] * 4
    assert all(isinstance(p, DTensor) for p in trainer.module.state_dict().values())
    with pytest.raises(RuntimeError, match="size mismatch"):
        trainer.module[1].load_state_dict({"weight": torch.zeros(2, 6), "bias": torch.zeros(2)})


def test_load_state_dict_of_a_sharded_module_accepts_whole_tensors():
    run_distributed_test(load_into_sharded_modules, 2)


def save_on_rank_0_only(directory):
    from engine.checkpoint import collectives

    collectives._TIMEOUT = 1.0
    trainer = start()
    if trainer.global_rank == 0:
        with pytest.raises(RuntimeError, match="must be called on every rank"):
            trainer.save_16bit_model(directory)


def test_save_of_sharded_weights_on_one_rank_raises(tmp_path):
    run_distributed_test(save_on_rank_0_only, 2, tmp_path)


def save_tied(directory, stage):
    trainer, *_ = engine.initialize(
        model=Tied(),
        config={
            "train_batch_size": 4,
            "zero_optimization": {"stage": stage},
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW"},
            "engine": {"backend": "torch"},
        },
    )
    trainer.save_fp16_model(directory)
    torch.distributed.barrier()
    saved = torch.load(directory / "pytorch_model.bin")
    assert saved["first.weight"].data_ptr() == saved["second.weight"].data_ptr()
    types = {name: value.dtype for name, value in saved.items()}
    assert types.pop("scale") == torch.float32
    assert set(types.values()) == {torch.bfloat16}
    assert trainer.module_state_dict()["first.weight"].dtype == torch.float32
    trained = trainer.module_state_dict(exclude_frozen_parameters=True, prefix="net.")
    assert sorted(trained) == [
        "net.first.bias", "net.first.weight", "net.scale", "net.second.bias", "net.second.weight",
    ]  # fmt: skip


@pytest.mark.parametrize("stage", [0, 3])
def test_saved_weights_keep_ties_and_have_the_precision_of_the_run(tmp_path, stage):
    run_distributed_test(save_tied, 2, tmp_path, stage)
