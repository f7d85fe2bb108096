"""The choice of each rank's device, and process groups next to one for GPUs.

This machine has no GPU, so `torch.cuda` and NCCL are replaced; `make test-gpu` runs them.
"""

import logging
import sys
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

import engine
from engine.checkpoint import collectives
from engine.checkpoint.async_saver import AsyncSaver
from engine.distributed import ranks as ranks_module
from engine.distributed.environment import TIMEOUT
from engine.distributed.ranks import Ranks, destroy_distributed, init_distributed
from engine.distributed.signals import Signals
from engine.training.gradient_averaging import broadcast
from tests.testing.distributed import run_distributed_test
from tests.testing.small_model import build_config, build_model, start, train_step


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that this process can use two GPUs."""
    state = SimpleNamespace(count=2, current=0, is_initialized=False, chosen=[])
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: state.count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: state.count)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: state.is_initialized)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: state.current)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: state.chosen.append(device.index))
    return state


@pytest.fixture
def own_group(monkeypatch):
    """Pretend that the script has created an NCCL group, in which this process is rank 3 of 4."""
    group = SimpleNamespace(bound_device_id=None)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(dist, "new_group", lambda **settings: settings)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_group", lambda: group)
    return group


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_init_distributed_single_process_uses_the_gpu_of_its_local_rank(gpus, monkeypatch, device):
    assert init_distributed(device=device).device == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert init_distributed(device=device).device == torch.device("cuda", 1)
    assert gpus.chosen == [0, 1]


def test_init_distributed_with_device_cpu_leaves_the_gpus_alone(gpus):
    assert init_distributed(device="cpu").device == torch.device("cpu")
    assert gpus.chosen == []


def test_device_cuda_without_a_gpu_is_an_error(gpus):
    gpus.count = 0
    assert init_distributed(device="auto").device == torch.device("cpu")
    config = {"train_batch_size": 1, "engine": {"device": "cuda"}}
    with pytest.raises(ValueError, match=r'`engine\.device` is "cuda", but PyTorch finds no GPU'):
        engine.initialize(model=nn.Linear(1, 1), config=config)


@pytest.mark.parametrize(("count", "fix"), [(1, "Set LOCAL_RANK=0 in each task"), (2, "Start")])
def test_local_rank_beyond_the_visible_gpus_is_an_error(gpus, monkeypatch, count, fix):
    gpus.count = count
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=f"LOCAL_RANK is 2, but .* only {count} GPUs?. {fix}"):
        init_distributed()
    assert gpus.chosen == []


@pytest.mark.parametrize(
    ("local_rank", "bound", "current", "expected"),
    [
        (None, None, None, 1),  # rank 3 of hosts with two GPUs
        (None, None, 0, 0),  # the script has called `torch.cuda.set_device(0)`
        (None, 0, 1, 0),  # and the group is bound to another GPU
        ("1", 0, 0, 1),
    ],
)
def test_own_process_group_uses_the_gpu_that_the_script_has_chosen(
    gpus, own_group, monkeypatch, local_rank, bound, current, expected
):
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    own_group.bound_device_id = None if bound is None else torch.device("cuda", bound)
    gpus.is_initialized, gpus.current = current is not None, current or 0
    found = init_distributed()
    assert (found.rank, found.world_size, found.local_rank) == (3, 4, expected)
    assert found.device == torch.device("cuda", expected)
    assert gpus.chosen == [expected]


@pytest.mark.parametrize("backend", ["nccl", "cpu:gloo,cuda:nccl"])
def test_control_group_next_to_nccl_has_the_timeout_of_the_run(
    gpus, own_group, monkeypatch, backend
):
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setenv(TIMEOUT, "90")
    expected = {"backend": "gloo", "timeout": timedelta(seconds=90)}
    ranks = init_distributed()
    assert ranks.control_group == expected
    assert AsyncSaver().get_process_group(ranks) == expected


def test_new_nccl_group_is_bound_to_the_gpu(gpus, monkeypatch):
    calls = []
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kw: calls.append((args, kw)))
    monkeypatch.setattr(ranks_module.atexit, "register", lambda _: None)
    with pytest.raises(ValueError, match="process group has not been initialized"):
        init_distributed()  # the group does not exist, because it was only recorded
    assert calls == [(("nccl",), {"timeout": None, "device_id": torch.device("cuda", 1)})]


@pytest.mark.parametrize(("fails", "destroyed"), [(True, []), (False, ["destroyed"])])
def test_exit_after_an_exception_does_not_destroy_an_nccl_group(
    own_group, monkeypatch, fails, destroyed
):
    calls = []
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("destroyed"))
    monkeypatch.setattr(ranks_module, "_log_missing_ranks", lambda _: None)
    monkeypatch.setattr(ranks_module, "_announce_exit", lambda: None)
    monkeypatch.setattr(sys, "last_value", ValueError(), raising=False)
    if not fails:
        monkeypatch.delattr(sys, "last_value")
    destroy_distributed()
    assert calls == destroyed


def exchange_host_values():
    """Exchange values in the control group, and only there."""
    dist.init_process_group("gloo")
    group = dist.new_group(backend="gloo")
    ranks = Ranks(dist.get_rank(), 0, 2, torch.device("meta"), group)
    used = []
    for name in ("all_reduce", "all_gather_object", "broadcast_object_list"):
        call = getattr(dist, name)

        def record(*args, call=call, **settings):
            used.append(settings.get("group"))
            return call(*args, **settings)

        setattr(dist, name, record)
    signals = Signals()
    signals._received = ranks.rank
    assert signals.find_on_any_rank(ranks) == "SIGUSR1"
    signals.restore_handlers()
    collectives.check_same_tag("a", ranks)
    assert collectives.call_on_rank_0(ranks, lambda: 5) == 5
    with collectives.raise_on_all_ranks(ranks):
        pass
    backend = engine.backends.base.Backend
    mean = backend.mean(SimpleNamespace(ranks=ranks), float(ranks.rank))
    assert mean == 0.5
    assert used == [group] * 5


def test_host_values_are_exchanged_in_the_control_group():
    run_distributed_test(exchange_host_values, 2)


def save_while_rank_1_is_busy(directory):
    logged = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())
    logging.getLogger("onecycle").addHandler(handler)
    trainer = start()
    collectives._PATIENCE = 0.5
    if trainer.global_rank == 1:
        time.sleep(1.5)
    trainer.save_checkpoint(directory)
    waits = [line for line in logged if "is waiting for rank" in line]
    assert len(waits) == (trainer.global_rank == 0)
    assert all("for rank 1 (timeout: 600 seconds)" in line for line in waits)


def test_save_waits_for_a_rank_that_is_busy_and_logs_it(tmp_path):
    run_distributed_test(save_while_rank_1_is_busy, 2, tmp_path)
    assert (tmp_path / "global_step0").is_dir()


def broadcast_tensors():
    dist.init_process_group("gloo")
    rank, calls, call = dist.get_rank(), [], dist.broadcast

    def record(tensor, **settings):
        calls.append(tensor.numel())
        return call(tensor, **settings)

    dist.broadcast = record
    value = float(rank + 1)
    tensors = [
        *(torch.full((3,), value) for _ in range(100)),
        torch.full((2, 3), value).t(),  # not contiguous
        torch.full((), value, dtype=torch.float64),
        torch.tensor([rank == 0, True]),
        torch.full((4,), rank, dtype=torch.int64),
        torch.empty(0),
    ]
    broadcast(tensors)
    assert all((tensor == 1.0).all() for tensor in tensors[:102])
    assert tensors[102].tolist() == [True, True]
    assert tensors[103].tolist() == [0] * 4
    assert len(calls) <= 6


def test_broadcast_many_tensors_takes_few_collectives():
    run_distributed_test(broadcast_tensors, 2)


def shard_in_steps():
    from engine.backends import fsdp

    order, copy, fully_shard = [], fsdp._copy_from_rank_0, fsdp.fully_shard
    fsdp._copy_from_rank_0 = lambda module, *rest: (order.append(module), copy(module, *rest))
    fsdp.fully_shard = lambda module, **settings: (
        order.append(module),
        fully_shard(module, **settings),
    )
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    model.append(nn.ModuleList(nn.Linear(4, 4) for _ in range(2)))
    model.forward = lambda x: model[3][1](model[3][0](model[2](model[1](model[0](x)))))
    engine.initialize(model=model, config=build_config())
    names = {id(module): name for name, module in model.named_modules()}
    # FSDP also shards a test weight first, which is not in the model.
    found = [names[id(module)] for module in order if id(module) in names]
    assert found == ["3.0", "3.0", "3.1", "3.1", "", ""]


def test_shard_copies_and_shards_one_block_at_a_time():
    run_distributed_test(shard_in_steps, 2)


def evaluate_on_rank_0():
    model = nn.Sequential(build_model(), nn.BatchNorm1d(1))
    config = build_config(zero_optimization={"stage": 0})
    trainer, *_ = engine.initialize(model=model, config=config)
    train_step(trainer)
    if trainer.global_rank == 0:
        trainer.eval()
        with torch.no_grad():
            trainer(torch.ones(2, 6))
        trainer.train()
    assert train_step(trainer)


def test_evaluation_on_rank_0_only_does_not_hang_with_buffers():
    run_distributed_test(evaluate_on_rank_0, 2, timeout=60)
