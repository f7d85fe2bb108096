"""The estimate of the model states' memory: hand-computed sizes and real runs."""

import math

import pytest
import torch

from engine.config import load_document
from engine.config.optimizer_block import OptimizerBlock, build_optimizer_block
from engine.config.validate import examine
from engine.memory import MemorySettings, ParameterSize, estimate_memory, read_settings
from engine.memory.alternatives import list_alternatives
from engine.memory.optimizer_states import count_state_elements, has_known_states
from engine.training.optimizers import build_optimizer
from tests.testing.distributed import run_distributed_test
from tests.testing.memory_runs import estimate, list_runs, measure_all

RUNS = list_runs()
SAMPLE = {
    1: ["torch, stage 0, bf16, 2 micro-batches", "deepspeed, stage 1, fp32, 1 micro-batch"],
    2: [
        "torch, stage 0, fp32, 1 micro-batch",
        "torch, stage 1, bf16, 2 micro-batches",
        "torch, stage 2, fp32, 1 micro-batch",
        "torch, stage 3, bf16, 1 micro-batch",
        "deepspeed, stage 2, bf16, 2 micro-batches",
        "deepspeed, stage 3, bf16, 1 micro-batch",
    ],
}


def settings(world_size=2, **config):
    document = load_document({"train_micro_batch_size_per_gpu": 1, **config})
    return read_settings(examine(document, world_size)[1], world_size)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", SAMPLE)
def test_estimate_is_within_five_percent_of_the_allocated_tensors(world_size):
    runs = {name: RUNS[name] for name in SAMPLE[world_size]}
    for name, allocated in run_distributed_test(measure_all, world_size, runs)[0].items():
        assert estimate(RUNS[name], world_size) == pytest.approx(allocated, rel=0.05), name


def test_replicated_adam_in_float32_needs_sixteen_bytes_and_the_averaging_buffers():
    model = [ParameterSize((10, 10))]
    one = estimate_memory(model, settings(1, engine={"backend": "torch"}))
    two = estimate_memory(model, settings(2, engine={"backend": "torch"}))
    # float32 weights, gradients and two states; a second rank adds buffers of 4 bytes
    assert (one.peak("GPU"), two.peak("GPU")) == (1600, 2000)
    assert one.total("GPU") == (1200, 1600, 1600)


def test_fsdp_shards_the_first_dimension_and_rounds_up():
    config = {"zero_optimization": {"stage": 3}, "engine": {"backend": "torch"}}
    found = estimate_memory([ParameterSize((3, 5))], settings(2, **config))
    assert found.peak("GPU") == 2 * 5 * 16


def test_parameters_outside_of_blocks_stay_gathered_in_stage_3():
    config = {"zero_optimization": {"stage": 3}, "engine": {"backend": "torch"}}
    model = [ParameterSize((4, 5), in_block=False), ParameterSize((4, 5))]
    parts = {part.name: part for part in estimate_memory(model, settings(2, **config)).parts}
    assert parts["gathered parameters"].forward == 20 * 4


def test_offloading_moves_the_optimizer_to_the_cpu_and_keeps_the_weights_on_the_gpu():
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    config = {"zero_optimization": zero, "bf16": {"enabled": True}}
    found = estimate_memory([ParameterSize((1000,))], settings(4, **config))
    assert found.peak("GPU") == 2000
    # a quarter of: float32 weights, two states, gradients, and a 16-bit copy of the weights
    assert found.peak("CPU") == 250 * (4 + 8 + 4 + 2)


def test_frozen_parameters_have_no_gradients_and_no_states():
    frozen = ParameterSize((100,), itemsize=2, is_trained=False)
    run = settings(1, engine={"backend": "torch"})
    both = estimate_memory([ParameterSize((100,)), frozen], run).peak("GPU")
    assert both - estimate_memory([ParameterSize((100,))], run).peak("GPU") == 200


def test_16_bit_parameters_are_converted_unless_master_weights_are_off():
    model = [ParameterSize((100,), itemsize=2)]
    on = settings(1, engine={"backend": "torch"})
    off = settings(1, engine={"backend": "torch", "master_weights": False})
    assert estimate_memory(model, on).peak("GPU") == 1600
    assert estimate_memory(model, off).peak("GPU") == 800


def test_config_without_batch_sizes_or_optimizer_is_estimated_with_adamw():
    found = read_settings(examine(load_document({}), 2)[1], 2)
    assert not found.has_optimizer
    assert estimate_memory([ParameterSize((100,))], found).peak("GPU") == 2000


def test_accumulation_is_derived_from_the_batch_sizes():
    sizes = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4}
    assert not settings(4, **sizes).accumulates
    assert settings(2, **sizes).accumulates


def test_tensor_parallelism_is_rejected():
    with pytest.raises(ValueError, match="tensor_parallel.autotp_size"):
        settings(2, tensor_parallel={"autotp_size": 2})


@pytest.mark.parametrize(
    ("backend", "chosen", "count"), [("torch", 2, 7), ("deepspeed", 0, 8), ("deepspeed", 3, 8)]
)
def test_alternatives_list_each_stage_once_and_mark_the_config(backend, chosen, count):
    run = MemorySettings(backend=backend, world_size=8, zero_stage=chosen, precision="bf16")
    found = list(list_alternatives([ParameterSize((10**6,))], run))
    assert len(found) == count
    assert [each.settings.zero_stage for each in found if each.is_chosen] == [chosen]
    peaks = [
        each.estimate.peak("GPU") for each in found if each.settings.offload_optimizer == "none"
    ]
    assert peaks == sorted(peaks, reverse=True)


def test_nvme_offloading_is_an_alternative_of_its_own():
    run = MemorySettings(backend="deepspeed", world_size=8, zero_stage=3, offload_optimizer="nvme")
    found = list(list_alternatives([ParameterSize((10**6,))], run))
    assert [each.estimate.peak("NVMe") > 0 for each in found if each.is_chosen] == [True]


OPTIMIZERS = {
    "Adadelta": {}, "Adafactor": {}, "Adagrad": {}, "Adam": {"amsgrad": True}, "AdamW": {},
    "Adamax": {}, "ASGD": {}, "NAdam": {}, "RAdam": {}, "Rprop": {},
    "RMSprop": {"momentum": 0.9, "centered": True}, "SGD": {"momentum": 0.9},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_number_of_states_equals_that_of_torch(name):
    block = build_optimizer_block({"type": name, "params": OPTIMIZERS[name]}, "torch")
    weight = torch.nn.Parameter(torch.ones(6, 7))
    optimizer = build_optimizer(block, [weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    stored = sum(
        state.numel()
        for state in optimizer.state[weight].values()
        if torch.is_tensor(state) and state.numel() > 1
    )
    assert count_state_elements(name, block.params, (6, 7)) == stored
    assert has_known_states(name)


def test_deepspeeds_muon_trains_vectors_with_adam():
    assert count_state_elements("Muon", {}, (4, 4), has_adam=True) == 16
    assert count_state_elements("Muon", {}, (4,), has_adam=True) == 8


def test_states_of_a_custom_optimizer_are_those_of_adam():
    block = OptimizerBlock("my_module:MyOptimizer", {})
    run = MemorySettings(backend="torch", world_size=1, zero_stage=0, optimizer=block)
    assert estimate_memory([ParameterSize((100,))], run).peak("GPU") == 1600
    assert not has_known_states(block.type)


@pytest.mark.parametrize("ranks", [8, 64])
def test_estimate_with_offloading_equals_deepspeeds_estimator(ranks):
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    count = 7 * 10**9
    run = MemorySettings(
        backend="deepspeed",
        world_size=ranks,
        zero_stage=2,
        precision="bf16",
        offload_optimizer="cpu",
    )
    peer = estimate_zero2_model_states_mem_needs(count, ranks, 1, cpu_offload=True)[1]
    assert math.isclose(estimate_memory([ParameterSize((count,))], run).peak("GPU"), peer)
