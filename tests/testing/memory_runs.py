"""Training runs that measure the memory of the model states on each rank."""

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary, WeakIdRef

import engine
from engine.config import load_document
from engine.config.validate import examine
from engine.config.wording import count_noun
from engine.memory import ParameterSize, estimate_memory, read_settings

WIDTH = 192
LAYERS = 32


class Stack(torch.nn.Module):
    """A chain of wide layers, whose activations are small for a batch of one sample."""

    def __init__(self, width=WIDTH, layers=LAYERS):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(width, width, bias=False) for _ in range(layers)
        )

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Allocations(TorchDispatchMode):
    """The memory of the tensors that are created inside a `with` block and still exist."""

    def __init__(self):
        super().__init__()
        self._storages = WeakIdKeyDictionary(ref_type=WeakIdRef)
        self.steps = []
        """The largest number of allocated bytes at the marked moments of each step."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # see the tensors inside of it
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor) and not each.is_meta:
                self._storages[each.untyped_storage()] = True
        return out

    def start_step(self):
        """Start the measurement of a step."""
        self.steps.append(0)

    def mark(self):
        """Measure the memory at this moment."""
        total = sum(storage.nbytes() for storage in list(self._storages))
        self.steps[-1] = max(self.steps[-1], total)


def measure(config, *, steps=4):
    """Train a few steps, and return the largest number of allocated bytes in a step.

    The moments are the end of each forward and backward pass and the start of the optimizer step.
    The first step is left out, and the result is that of the step that needs the least: Python has
    not always freed the tensors of an earlier step that are part of a reference cycle.
    """
    torch.manual_seed(0)
    with Allocations() as allocations:
        trainer, *_ = engine.initialize(config=config, model=Stack())
        chosen = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        chosen.register_step_pre_hook(lambda *_: allocations.mark())
        for _ in range(steps):
            allocations.start_step()
            for _ in range(trainer.gradient_accumulation_steps()):
                loss = trainer(torch.ones(1, WIDTH)).float().pow(2).mean()
                allocations.mark()
                trainer.backward(loss)
                allocations.mark()
                trainer.step()
                del loss
        trainer.destroy()
    return min(allocations.steps[1:])


def list_runs():
    """Return the runs to measure, by name: every backend, ZeRO stage, precision and offloading."""
    runs = {}
    for backend in ("torch", "deepspeed"):
        for stage in range(4):
            for precision, section in (("fp32", {}), ("bf16", {"bf16": {"enabled": True}})):
                for accumulation in (1, 2):
                    batches = count_noun(accumulation, "micro-batch")
                    name = f"{backend}, stage {stage}, {precision}, {batches}"
                    runs[name] = build_config(backend, stage, accumulation, **section)
    bf16 = {"bf16": {"enabled": True}}
    optimizer = {"offload_optimizer": {"device": "cpu"}}
    both = {**optimizer, "offload_param": {"device": "cpu"}}
    offloads = [(stage, optimizer, "optimizer") for stage in (1, 2, 3)]
    for stage, offload, shown in [*offloads, (3, both, "everything")]:
        name = f"deepspeed, stage {stage}, bf16, offloads {shown}"
        runs[name] = build_config("deepspeed", stage, offload=offload, **bf16)
    accumulates = {"data_types": {"grad_accum_dtype": "fp32"}}
    for stage in (1, 2, 3):
        name = f"deepspeed, stage {stage}, bf16, float32 gradients"
        runs[name] = build_config("deepspeed", stage, **bf16, **accumulates)
    sgd = {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}}
    untested = {"zero_allow_untested_optimizer": True}
    runs["torch, stage 0, fp32, SGD"] = build_config("torch", 0, **sgd)
    runs["torch, stage 2, fp32, SGD"] = build_config("torch", 2, **sgd)
    runs["deepspeed, stage 2, bf16, SGD"] = build_config("deepspeed", 2, **bf16, **sgd, **untested)
    return runs


def build_config(backend, stage, accumulation=1, *, offload=None, **sections):
    zero = {"stage": stage, **(offload or {})}
    if backend == "deepspeed":
        # Small buffers, and parameters that stage 3 shards, as in a large model.
        zero |= {"reduce_bucket_size": 1000, "stage3_param_persistence_threshold": 0}
        zero |= {"stage3_prefetch_bucket_size": 0}
    settings = {"backend": backend} | ({"device": "cpu"} if backend == "torch" else {})
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.001}},
        "engine": settings,
        **({"zero_optimization": zero} if stage else {}),
        **sections,
    }


def estimate(config, world_size):
    """Return the estimated peak of the model states of `Stack` on all devices of a rank."""
    _, context = examine(load_document(config), world_size)
    model = [ParameterSize((WIDTH, WIDTH))] * LAYERS
    found = estimate_memory(model, read_settings(context, world_size))
    totals = (found.total(device) for device in found.devices)
    return max(map(sum, zip(*totals, strict=True)))


def measure_all(runs):
    """Measure all runs in this process, one after another, and return their results by name."""
    return {name: measure(config) for name, config in runs.items()}
