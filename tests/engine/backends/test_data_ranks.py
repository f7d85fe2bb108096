"""Test models that several ranks share: batch sizes, data and steps count data-parallel ranks."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import engine
from engine.config import load_config
from engine.config.validate import validate
from tests.testing.distributed import run_distributed_test

OPTIMIZER = {"type": "Adam", "params": {"lr": 0.01, "torch_adam": True}}
CONFIG = {"train_micro_batch_size_per_gpu": 2, "optimizer": OPTIMIZER}
SIZES = {
    "train_batch_size": 4,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
}
TENSOR_PARALLEL = {
    "autotp_size": 2,
    "partition_config": {
        "use_default_specs": False,
        "layer_specs": [
            {"patterns": [".*\\.0\\.weight$"], "partition_type": "column"},
            {"patterns": [".*\\.1\\.weight$"], "partition_type": "row"},
        ],
    },
}
PARALLEL = [
    {"sequence_parallel_size": 2},
    {"sequence_parallel_size": 2, "data_parallel_size": 1},
    {"tensor_parallel": {"autotp_size": 2}},
    {"pipeline": {"stages": 2}},
]


def find_errors(config, world_size):
    problems = validate(config, world_size=world_size)
    return [problem for problem in problems if problem.severity == "error"]


@pytest.mark.parametrize("parallel", PARALLEL)
def test_validate_with_ranks_that_share_a_model_counts_them_once(parallel):
    assert find_errors(SIZES | parallel, 2) == []
    assert find_errors(SIZES | {"train_batch_size": 8} | parallel, 4) == []
    (error,) = find_errors(SIZES | {"train_batch_size": 32} | parallel, 4)
    assert "2 data-parallel ranks = 8, got 32" in error.message


def test_validate_with_pipeline_stages_and_the_torch_backend_counts_all_ranks():
    config = SIZES | {"pipeline": {"stages": 2}, "engine": {"backend": "torch"}}
    assert find_errors(config | {"train_batch_size": 16}, 4) == []
    (error,) = find_errors(config | {"train_batch_size": 8}, 4)
    assert "4 ranks = 16, got 8" in error.message


def test_validate_with_train_batch_size_of_all_ranks_accepts_autotp_only():
    config = SIZES | {"train_batch_size": 8}
    (problem,) = validate(config | {"tensor_parallel": {"autotp_size": 2}}, world_size=2)
    assert problem.severity == "note"
    assert "4 samples" in problem.message
    assert find_errors(config | {"sequence_parallel_size": 2}, 2) != []
    resolved = load_config(config | {"tensor_parallel": {"autotp_size": 2}}, world_size=2)
    assert (resolved.batch.train, resolved.batch.micro, resolved.batch.accumulation) == (4, 2, 2)


def test_validate_with_a_world_size_that_is_no_multiple_reports_it():
    (error,) = find_errors(CONFIG | {"sequence_parallel_size": 2}, 3)
    assert error.message == (
        "The world size must be a multiple of `sequence_parallel_size` (2), got 3."
    )


@pytest.mark.parametrize("parallel", [*PARALLEL[:1], *PARALLEL[2:]])
def test_validate_with_fewer_ranks_than_a_model_needs_reports_it(parallel):
    (error,) = find_errors(CONFIG | parallel, 1)
    assert "must be a multiple of" in error.message
    assert find_errors(CONFIG | parallel, None) == []


class Shared:
    """A model-parallel unit of two ranks that share one model."""

    def __init__(self):
        self._all = dist.new_group([0, 1])
        self._own = [dist.new_group([rank]) for rank in (0, 1)][dist.get_rank()]

    def get_model_parallel_rank(self):
        return dist.get_rank()

    def get_model_parallel_world_size(self):
        return 2

    def get_model_parallel_group(self):
        return self._all

    def get_data_parallel_rank(self):
        return 0

    def get_data_parallel_world_size(self):
        return 1

    def get_data_parallel_group(self):
        return self._own


def check_batches(trainer, loader):
    """Check that both ranks load the same samples: all of them, two at a time."""
    assert trainer.train_batch_size() == 2
    assert trainer.dp_world_size == 1
    batches = torch.stack(list(loader))
    both = [torch.empty_like(batches) for _ in range(2)]
    dist.all_gather(both, batches)
    assert torch.equal(both[0], both[1])
    assert sorted(batches.flatten().tolist()) == [0.0, 1.0, 2.0, 3.0]
    data = torch.utils.data.DataLoader([torch.tensor(float(i)) for i in range(4)], batch_size=1)
    seen = []
    mean = trainer.evaluate(data, lambda batch: seen.append(trainer.gather(batch)) or batch.mean())
    assert mean == 1.5
    assert torch.cat(seen).tolist() == [0.0, 1.0, 2.0, 3.0]


def load_with(**arguments):
    config = CONFIG | {"zero_optimization": {"stage": 1}, **arguments.pop("config", {})}
    data = [torch.tensor(float(i)) for i in range(4)]
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    mpu = arguments.pop("mpu", None)
    trainer, _, loader, _ = engine.initialize(
        config=config, model=model, training_data=data, mpu=mpu and mpu(), **arguments
    )
    check_batches(trainer, loader)
    trainer.backward(trainer(torch.ones(2, 4)).mean())
    assert trainer.step()


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        {"mpu": Shared},
        {"mesh_param": (1, 2)},
        {"config": {"sequence_parallel_size": 2, "data_parallel_size": 1}},
        {"config": {"sequence_parallel_size": 2}},
        {"config": {"tensor_parallel": TENSOR_PARALLEL}},
        {
            "config": {
                "tensor_parallel": TENSOR_PARALLEL,
                "train_batch_size": 4,
                "gradient_accumulation_steps": 1,
            }
        },
    ],
)
def test_ranks_that_share_a_model_load_the_same_samples(arguments):
    run_distributed_test(load_in_group, 2, arguments)


def load_in_group(arguments):
    dist.init_process_group("gloo")
    load_with(**arguments)


class Halves(torch.utils.data.Dataset):
    """Pairs of an input and its half."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        value = torch.tensor([index / 8])
        return value, value / 2


def train_pipeline(directory):
    import deepspeed
    from deepspeed.pipe import PipelineModule

    deepspeed.init_distributed("gloo", verbose=False)
    torch.manual_seed(0)
    model = PipelineModule(
        layers=[nn.Linear(1, 4), nn.Linear(4, 1)], num_stages=2, loss_fn=nn.MSELoss()
    )
    config = SIZES | {
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4}},
    }
    trainer, *_ = engine.initialize(config=config, model=model, training_data=Halves())
    assert trainer.train_batch_size() == 4
    losses = [float(trainer.train_batch()) for _ in range(5)]
    assert losses[4] < losses[0]
    assert trainer.global_steps == 5
    assert trainer.get_lr() == [0.1]
    held_back = [(torch.ones(2, 1), torch.ones(2, 1) / 2)] * 2
    before = float(trainer.eval_batch(iter(held_back)))
    trainer.save_checkpoint(directory)
    trainer.train_batch(iter(held_back))
    after = float(trainer.eval_batch(iter(held_back)))
    assert after < before
    one, outputs = trainer.eval_batch(iter(held_back), True, num_micro_batches=1)
    assert float(one) == after
    assert (outputs is not None) == (dist.get_rank() == 1)
    trainer.load_checkpoint(directory)
    assert float(trainer.eval_batch(iter(held_back))) == before
    assert trainer.global_steps == 5
    trainer.training_dataloader = None
    trainer.set_dataloader(held_back)
    trainer.train_batch()
    assert float(trainer.eval_batch(iter(held_back))) == after
    trainer.train_batch(iter([(torch.full((2, 1), torch.inf), torch.ones(2, 1))] * 2))
    assert (trainer.global_steps, trainer.skipped_steps) == (7, 1)
    assert float(trainer.eval_batch(iter(held_back))) == after


STAGES = {"pipeline": {"stages": 2}}
DEEPSPEED, TORCH = ({"engine": {"backend": name}} for name in ("deepspeed", "torch"))


def find_disagreements(kind):
    """Return the configs that `validate` calls valid and `initialize` refuses, or vice versa."""
    import deepspeed
    from deepspeed.pipe import PipelineModule

    deepspeed.init_distributed("gloo", verbose=False)
    size, found = dist.get_world_size(), []
    for backend in ({}, DEEPSPEED, TORCH):
        for train in (4, 8, 16):
            config = SIZES | {"optimizer": OPTIMIZER, "train_batch_size": train} | backend
            config |= {} if kind == "plain" else STAGES
            layers = [nn.Linear(1, 4), nn.Linear(4, 1)]
            is_pipeline = kind == "pipeline" and backend is not TORCH
            model = (
                PipelineModule(layers=layers, num_stages=2, loss_fn=nn.MSELoss())
                if is_pipeline
                else nn.Sequential(*layers)
            )
            is_valid = find_errors(config, size) == []
            try:
                trainer, *_ = engine.initialize(config=config, model=model)
            except ValueError as error:
                accepted, reason = False, str(error)
            else:
                accepted, reason = True, ""
                assert trainer.dp_world_size == (size // 2 if is_pipeline else size)
                trainer.destroy()
            if accepted != is_valid:
                found.append((backend, train, reason))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("kind", ["plain", "pipeline"])
def test_initialize_accepts_the_batch_sizes_that_validate_calls_valid(kind, world_size):
    assert run_distributed_test(find_disagreements, world_size, kind) == [[]] * world_size


def start_with_other_stages():
    import deepspeed
    from deepspeed.pipe import PipelineModule

    deepspeed.init_distributed("gloo", verbose=False)
    for backend in ({}, DEEPSPEED):
        config = CONFIG | STAGES | backend
        with pytest.raises(ValueError, match=r"`pipeline\.stages` .* is 2, .* not a Pipeline"):
            engine.initialize(config=config, model=nn.Linear(1, 1))
    engine.initialize(config=CONFIG | STAGES | TORCH, model=nn.Linear(1, 1))
    layers = [nn.Linear(1, 4), nn.Linear(4, 1)]
    model = PipelineModule(layers=layers, num_stages=1, loss_fn=nn.MSELoss())
    with pytest.raises(ValueError, match=r"a PipelineModule with 1 stages.*set it to 1"):
        engine.initialize(config=CONFIG | STAGES, model=model)


@pytest.mark.slow  # DeepSpeed compiles its collective operations
def test_initialize_with_other_stages_than_the_config_raises():
    run_distributed_test(start_with_other_stages, 2)


@pytest.mark.slow
def test_pipeline_trains_and_resumes(tmp_path):
    run_distributed_test(train_pipeline, 2, str(tmp_path))
