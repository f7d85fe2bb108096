"""Every optimizer of the config on PyTorch takes the same steps as in a loop without the engine."""

import copy
import itertools

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import mse_loss

import engine
from tests.testing.distributed import run_distributed_test
from tests.testing.torch_optimizers import NOT_SHARDED, VARIANTS, build_reference

STEPS, BATCH, SCALE = 5, 8, 64
PRECISIONS = {
    "fp32": (torch.float32, {}),
    "bf16": (torch.bfloat16, {"bf16": {"enabled": True}}),
    "fp16": (torch.float16, {"fp16": {"enabled": True, "loss_scale": SCALE}}),
}
TOLERANCE = 1e-6  # fused kernels round differently; 16-bit matrix products are the same


class Net(torch.nn.Module):
    """Two layers in a ModuleList, which FSDP shards one by one, and a head."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(2))
        self.head = torch.nn.Linear(6, 3)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def draw_batch(step, rank, world_size):
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(BATCH, 6, generator=generator), torch.randn(BATCH, 3, generator=generator)
    return x.chunk(world_size)[rank], y.chunk(world_size)[rank]


def train_by_hand(model, variant, precision):
    """Train float32 weights under autocast with the mean of the ranks' gradients."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dtype, _ = PRECISIONS[precision]
    scale = SCALE if precision == "fp16" else 1
    model = model.float()
    optimizer = build_reference(variant, model.parameters())
    for step in range(STEPS):
        x, y = draw_batch(step, rank, world_size)
        with torch.autocast("cpu", dtype, enabled=precision != "fp32"):
            out = model(x)
        (mse_loss(out.float(), y) * scale).backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= world_size * scale
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


def train_by_engine(model, variant, precision, stage):
    config = {
        "train_batch_size": BATCH,
        "gradient_clipping": 0,
        "optimizer": VARIANTS[variant],
        "zero_optimization": {"stage": stage},
        "engine": {"backend": "torch"},
        **PRECISIONS[precision][1],
    }
    trainer, *_ = engine.initialize(model=model, config=config)
    for step in range(STEPS):
        x, y = draw_batch(step, trainer.global_rank, trainer.world_size)
        trainer.backward(mse_loss(trainer(x).float(), y))
        assert trainer.step()
    weights = [p.detach() for p in model.parameters()]
    trainer.destroy()
    return [p.full_tensor() if hasattr(p, "full_tensor") else p for p in weights]


def compare_all(precision):
    """Return the largest difference to the loop by hand, by variant, stage and weights' dtype."""
    dist.init_process_group("gloo")
    dtype, _ = PRECISIONS[precision]
    differences = {}
    for variant, stage in itertools.product(VARIANTS, range(4)):
        if dist.get_world_size() > 1 and stage and variant in NOT_SHARDED:
            continue
        for cast_to in dict.fromkeys((torch.float32, dtype)):
            torch.manual_seed(0)
            model = Net().to(cast_to)
            reference = copy.deepcopy(model)
            own = train_by_engine(model, variant, precision, stage)
            expected = train_by_hand(reference, variant, precision)
            differences[variant, stage, str(cast_to)] = max(
                float((a - b).abs().max()) for a, b in zip(own, expected, strict=True)
            )
    return differences


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_optimizer_takes_the_same_steps_as_a_loop_by_hand(world_size, precision):
    for differences in run_distributed_test(compare_all, world_size, precision, timeout=300):
        assert {variant for variant, *_ in differences} == set(VARIANTS)
        assert {run: each for run, each in differences.items() if not each < TOLERANCE} == {}


def start_not_sharded(name):
    for stage in (1, 2, 3):
        with pytest.raises(engine.ConfigError, match=f"{name} cannot|/optimizer/type"):
            train_by_engine(Net(), name, "fp32", stage)
    model = Net()
    config = {
        "train_batch_size": 2,
        "zero_optimization": {"stage": 3},
        "engine": {"backend": "torch"},
    }
    optimizer = getattr(torch.optim, name)(model.parameters())
    with pytest.raises(ValueError, match=f"`{name}`"):
        engine.initialize(model=model, config=config, optimizer=optimizer)


@pytest.mark.parametrize("name", sorted(NOT_SHARDED))
def test_optimizer_that_cannot_be_sharded_raises(name):
    run_distributed_test(start_not_sharded, 2, name)
