"""Models and arguments that only DeepSpeed supports select it, or are rejected on PyTorch."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import engine
from engine.backends import find_deepspeed_need
from engine.backends.model_parallelism import find_model_parallelism
from engine.config import load_config
from tests.testing.distributed import run_distributed_test

CONFIG = {"train_batch_size": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
TORCH = {"engine": {"backend": "torch"}}


def build_marked(name, value):
    """Return a model with a parameter that a library has marked."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    setattr(model[1].weight, name, value)
    return model


def build_from(module):
    """Return a model with a layer whose class is defined in a module."""
    layer = type("Layer", (nn.Linear,), {"__module__": module})
    return nn.Sequential(nn.Linear(2, 2), layer(2, 1))


PARALLEL = {
    "expert": build_marked("allreduce", False),
    "tensor-parallel": build_marked("tensor_model_parallel", True),
    "zero.Init": build_marked("ds_id", 3),
    "moe": build_from("deepspeed.moe.layer"),
    "auto_tp": build_from("deepspeed.module_inject.layers"),
    "pipeline": build_from("deepspeed.runtime.pipe.module"),
    "sequence": build_from("deepspeed.sequence.layer"),
}
USUAL = [
    nn.Linear(2, 1),
    build_marked("allreduce", True),
    build_marked("tensor_model_parallel", False),
    build_from("deepspeed.ops.transformer"),
]


@pytest.mark.parametrize("model", PARALLEL.values(), ids=PARALLEL)
def test_model_with_its_own_parallelism_selects_deepspeed(model):
    need = find_deepspeed_need(model)
    assert "1" in need  # the name of the layer or of its parameter
    choice = load_config(CONFIG, needs_deepspeed=need).backend
    assert choice.name == "deepspeed"
    assert need in choice.reason


@pytest.mark.parametrize("model", PARALLEL.values(), ids=PARALLEL)
def test_model_with_its_own_parallelism_on_torch_raises(model):
    with pytest.raises(ValueError, match='"backend": "deepspeed"'):
        engine.initialize(config=CONFIG | TORCH, model=model)


@pytest.mark.parametrize("model", USUAL)
def test_model_without_parallelism_does_not_select_deepspeed(model):
    assert find_model_parallelism(model) is None
    assert load_config(CONFIG, needs_deepspeed=find_deepspeed_need(model)).backend.name == "torch"


class ModelParallelUnit:
    """A model-parallel unit of a single rank, with the methods that DeepSpeed calls."""

    def __init__(self):
        self._group = dist.new_group([0])

    def get_model_parallel_rank(self):
        return 0

    def get_model_parallel_world_size(self):
        return 1

    def get_model_parallel_group(self):
        return self._group

    get_data_parallel_group = get_model_parallel_group
    get_data_parallel_rank = get_model_parallel_rank
    get_data_parallel_world_size = get_model_parallel_world_size


def train_with_mpu():
    dist.init_process_group("gloo")
    model = nn.Linear(2, 1)
    before = model.weight.detach().clone()
    trainer, *_ = engine.initialize(config=CONFIG, model=model, mpu=ModelParallelUnit())
    assert trainer.config.backend.name == "deepspeed"
    trainer.backward(trainer(torch.ones(2, 2)).sum())
    assert trainer.step()
    assert not torch.equal(model.weight, before)


def test_initialize_with_mpu_trains_on_deepspeed():
    run_distributed_test(train_with_mpu, 1)


@pytest.mark.parametrize("argument", ["mpu", "mesh_param"])
def test_initialize_with_an_argument_of_deepspeed_on_torch_raises(argument):
    with pytest.raises(ValueError, match=f"`{argument}`"):
        engine.initialize(config=CONFIG | TORCH, model=nn.Linear(2, 1), **{argument: object()})


class WithExperts(nn.Module):
    """A layer, and one expert on each of two ranks."""

    def __init__(self):
        from deepspeed.moe.layer import MoE

        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.moe = MoE(
            hidden_size=4, expert=nn.Linear(4, 4), num_experts=2, ep_size=2, min_capacity=1
        )

    def forward(self, x):
        return self.moe(self.inner(x))[0].pow(2).mean()


def train_experts():
    import deepspeed

    deepspeed.init_distributed("gloo", verbose=False)
    results = []
    for stage in (0, 1, 2):
        torch.manual_seed(dist.get_rank())
        model = WithExperts()
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "Adam", "params": {"lr": 0.01}},
            "zero_optimization": {"stage": stage},
        }
        trainer, *_ = engine.initialize(config=config, model=model)
        x = torch.randn(2, 4)
        before = float(trainer(x))
        for _ in range(4):
            trainer.backward(trainer(x))
            assert trainer.step()
        results.append(float(trainer(x)))
        assert results[-1] < before
    assert results == pytest.approx([results[0]] * 3)
    with pytest.raises(ValueError, match="MoE layers .* ZeRO stage 3"):
        engine.initialize(config=config | {"zero_optimization": {"stage": 3}}, model=WithExperts())


@pytest.mark.slow
def test_moe_with_adam_trains_equally_in_each_zero_stage():
    run_distributed_test(train_experts, 2)
