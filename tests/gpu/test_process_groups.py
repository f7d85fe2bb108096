"""Process groups on one GPU: replicas, FSDP2 and DeepSpeed, each with a world size of 1."""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils import cpp_extension

from engine.checkpoint.collectives import call_on_rank_0, check_same_tag, raise_on_all_ranks
from engine.distributed.ranks import init_distributed
from engine.distributed.signals import Signals
from tests.testing.gpu import copy_weights, train

PRECISIONS = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 8}}
ROOT = Path(__file__).parent.parent.parent

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)


def start_group(machine):
    """Create a process group of one rank, with NCCL on a GPU, as for several ranks."""
    return init_distributed(always_create_group=True, device=machine.device.type)


def start_replica(machine, **sections):
    """Return an engine that averages its gradients over the one rank, as replicas do."""
    from engine.training.gradient_averaging import GradientAverager

    ranks = start_group(machine)
    trainer = machine.start(**sections)
    backend = trainer._backend
    backend._averager = GradientAverager(backend.model, backend.optimizer, ranks)
    return trainer


def start_sharded(machine, stage=3, **sections):
    """Return an engine whose parameters are sharded with FSDP2 over the one rank."""
    from engine.backends.fsdp import FSDPBackend

    start_group(machine)

    def build(model, optimizer, config, ranks, *, parameters, **_):
        return FSDPBackend(model, optimizer, config, ranks, parameters=parameters)

    zero = {"stage": stage} | sections.pop("zero_optimization", {})
    with mock.patch("engine.backends.build", build):
        return machine.start(zero_optimization=zero, **sections)


def use_collectives(machine):
    ranks = start_group(machine)
    assert dist.get_backend() == ("gloo" if machine.is_dry else "nccl")
    assert ranks.device == machine.device
    check_same_tag("a", ranks)
    assert call_on_rank_0(ranks, lambda: 3) == 3
    with raise_on_all_ranks(ranks):
        pass
    signals = Signals()
    assert signals.find_on_any_rank(ranks) is None
    signals.restore_handlers()
    total = torch.ones(2, device=ranks.device)
    dist.all_reduce(total)
    found = [None]
    dist.all_gather_object(found, {"a": 1})
    assert (total.tolist(), found) == ([1, 1], [{"a": 1}])


def test_collectives_of_a_group_on_the_device(machine):
    machine.run(use_collectives)


def train_replica(machine, precision):
    batches = machine.draw_batches(5)
    expected = train(machine.start(**PRECISIONS[precision]), batches)
    trainer = start_replica(machine, **PRECISIONS[precision])
    assert train(trainer, batches) == pytest.approx(expected, rel=1e-3)
    with machine.count_syncs() as found:
        train(trainer, batches[:1])
    assert found.total() <= 3, found  # the norm, the loss of `train`, and a check of the ranks


@pytest.mark.parametrize("precision", PRECISIONS)
def test_replica_trains_as_a_single_process(machine, precision):
    machine.run(train_replica, precision)


def train_sharded(machine, stage, precision, directory):
    batches = machine.draw_batches(5)
    expected = train(machine.start(), batches)
    section = {"checkpoint": {"async": stage == 3}}
    trainer = start_sharded(machine, stage, engine=section, **PRECISIONS[precision])
    losses = train(trainer, batches[:3])
    trainer.save_checkpoint(directory)
    saved = copy_weights(trainer)
    losses += train(trainer, batches[3:])
    tolerance = {"fp32": 1e-3, "bf16": 0.05}[precision]
    assert losses == pytest.approx(expected, rel=tolerance)
    trainer.wait_for_checkpoint()
    other = start_sharded(machine, stage, engine=section, **PRECISIONS[precision])
    other.load_checkpoint(directory)
    assert all(map(torch.equal, saved, copy_weights(other)))
    assert train(other, batches[3:]) == pytest.approx(losses[3:], rel=1e-4)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_sharded_model_trains_and_resumes(machine, stage, precision, tmp_path):
    machine.run(train_sharded, stage, precision, tmp_path)


def train_offloaded(machine):
    batches = machine.draw_batches(4)
    expected = train(machine.start(), batches)
    zero = {"offload_optimizer": {"device": "cpu"}}
    trainer = start_sharded(machine, zero_optimization=zero)
    assert train(trainer, batches) == pytest.approx(expected, rel=1e-3)
    assert {parameter.device.type for parameter in trainer.module.parameters()} == {"cpu"}


def test_sharded_model_with_offloading_trains(machine):
    machine.run(train_offloaded)


def move_blocks(machine):
    from engine.backends import fsdp

    start_group(machine)
    model, moved = machine.build_model(), []
    copy = fsdp._copy_from_rank_0

    def record(module, *rest):
        before = {name: p.device.type for name, p in model.named_parameters()}
        copy(module, *rest)
        after = {name: p.device.type for name, p in model.named_parameters()}
        moved.append([name for name in after if before[name] != after[name]])

    with mock.patch.object(fsdp, "_copy_from_rank_0", record):
        start_sharded(machine, model=model)
    blocks = [[name for name in names if name.startswith("blocks")] for names in moved]
    expected = 0 if machine.is_dry else len(list(model.blocks[0].parameters()))
    assert [len(names) for names in blocks] == [expected] * len(model.blocks) + [0]


def test_sharding_moves_one_block_at_a_time(machine):
    machine.run(move_blocks)


FAIL = """
import torch, torch.distributed as dist
from engine.distributed.ranks import init_distributed
ranks = init_distributed(always_create_group=True, device="{device}")
dist.all_reduce(torch.ones(1, device=ranks.device))
raise ValueError("planted")
"""


def test_process_exits_after_an_exception(machine):
    start = time.monotonic()
    command = [sys.executable, "-c", FAIL.format(device=machine.device.type)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=environment
    )
    assert done.returncode == 1, done.stderr
    assert "ValueError: planted" in done.stderr
    assert time.monotonic() - start < 60


def prepare_deepspeed(machine):
    """Select DeepSpeed's accelerator, and leave out an op that the CPU would compile."""
    if machine.is_dry:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def train_with_deepspeed(machine, stage, precision, directory):
    if machine.is_dry and precision == "fp16":
        precision = "bf16"  # DeepSpeed does not support fp16 on the CPU
    batches = machine.draw_batches(5)
    expected = train(machine.start(), batches)
    prepare_deepspeed(machine)
    zero = {"zero_optimization": {"stage": stage}} if stage else {}
    sections = {
        "engine": {"backend": "deepspeed"},
        **zero,
        **(PRECISIONS | {"fp16": FP16})[precision],
    }
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]

    def cast(batches):
        return [(x.to(dtype), y) for x, y in batches]

    trainer = machine.start(**sections)
    losses = train(trainer, cast(batches[:3]))
    trainer.save_checkpoint(directory)
    losses += train(trainer, cast(batches[3:]))
    assert trainer.skipped_steps == 0
    tolerance = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.02}[precision]
    assert losses == pytest.approx(expected, rel=tolerance)
    trainer.load_checkpoint(directory)
    assert train(trainer, cast(batches[3:])) == pytest.approx(losses[3:], rel=tolerance)


@needs_deepspeed
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_trains_and_resumes(machine, stage, precision, tmp_path):
    machine.run(train_with_deepspeed, stage, precision, tmp_path)


def train_with_fused_adam(machine, stage):
    prepare_deepspeed(machine)
    batches = machine.draw_batches(4)
    optimizer = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": machine.is_dry}}
    zero = {"zero_optimization": {"stage": stage}} if stage else {}
    trainer = machine.start(optimizer=optimizer, engine={"backend": "deepspeed"}, **zero)
    own = trainer._backend.basic_optimizer
    assert type(own).__name__ == ("AdamW" if machine.is_dry else "FusedAdam")
    plain = {
        "type": "AdamW",
        "params": {"lr": 0.01, "weight_decay": own.param_groups[0]["weight_decay"]},
    }
    expected = train(machine.start(optimizer=plain), batches)
    assert train(trainer, batches) == pytest.approx(expected, rel=1e-3)


@needs_deepspeed
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_with_its_fused_adam_trains(machine, stage):
    if not machine.is_dry and cpp_extension.CUDA_HOME is None:
        pytest.skip("DeepSpeed compiles FusedAdam with nvcc, which is not installed")
    machine.run(train_with_fused_adam, stage)
