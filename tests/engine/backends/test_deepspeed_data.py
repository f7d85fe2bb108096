"""DeepSpeed's curriculum sampler and ZenFlow, with the training data of a run."""

import copy
import functools
import itertools
import logging

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

import engine
from engine.config.validate import validate
from tests.testing.distributed import run_distributed_test

SAMPLES = [(torch.full((4,), float(i)), torch.tensor(i)) for i in range(40)]
METRIC = {
    "difficulty_type": "value",
    "clustering_type": "single_cluster",
    "min_difficulty": 1,
    "max_difficulty": 4,
    "schedule_type": "fixed_linear",
    "schedule_config": {"total_curriculum_step": 4, "difficulty_step": 1},
}
OPTIMIZER = {"optimizer": {"type": "AdamW", "params": {"lr": 0.01}}}


def start(sampling, data=SAMPLES, **changes):
    torch.manual_seed(0)
    config = {"train_micro_batch_size_per_gpu": 2} | OPTIMIZER | changes
    config["data_efficiency"] = {"seed": 1, "data_sampling": {"num_epochs": 3} | sampling}
    return engine.initialize(config=config, model=torch.nn.Linear(4, 1), training_data=data)


def curriculum(clusters):
    metrics = {"seqlen": METRIC}
    section = {"enabled": True, "data_cluster_path": str(clusters), "curriculum_metrics": metrics}
    return {"curriculum_learning": section}


def train_with_curriculum(directory, clusters, steps, *, first=0):
    """Train the steps from ``first`` on; return the samples and the difficulties of each step."""
    trainer, _, loader, _ = start(curriculum(clusters), gradient_accumulation_steps=2)
    seen, difficulties = [], []

    def note_difficulty(batch, state):
        difficulties.append(state["current_difficulties"]["seqlen"])
        return batch

    trainer.set_data_post_process_func(note_difficulty)
    if first:
        trainer.load_checkpoint(directory)
    assert trainer.global_steps == first
    for x, index in itertools.islice(loader, 2 * (steps - first)):
        seen += index.tolist()
        trainer.backward(trainer(x).mean())
        trainer.step()
    if not first:
        trainer.save_checkpoint(directory, tag=f"step{steps}")
    return seen, difficulties, trainer, loader


def compare_resumed_curriculum(directory):
    clusters = f"{directory}/clusters"
    whole, difficulties, trainer, loader = train_with_curriculum(directory, clusters, 6)
    assert difficulties == [1, 1, 2, 2, 3, 3, 4, 4, 4, 4, 4, 4]
    assert len(loader) == 3 * len(SAMPLES) // (2 * dist.get_world_size())
    assert type(trainer.deepspeed_io(SAMPLES).data_sampler) is type(loader.data_sampler)
    before, *_ = train_with_curriculum(f"{directory}/part", clusters, 3)
    after, difficulties, *_ = train_with_curriculum(f"{directory}/part", clusters, 6, first=3)
    assert before + after == whole
    assert difficulties == [4] * 6


@pytest.mark.parametrize("world_size", [1, 2])
def test_curriculum_selects_the_samples_and_resumes(tmp_path, world_size):
    run_distributed_test(compare_resumed_curriculum, world_size, str(tmp_path))


def schedule_curriculum(directory):
    metric = METRIC | {"schedule_type": "custom", "schedule_config": {}}
    sampling = curriculum(f"{directory}/clusters")
    sampling["curriculum_learning"]["curriculum_metrics"] = {"seqlen": metric}
    trainer, _, loader, _ = start(sampling)
    trainer.set_custom_curriculum_learning_schedule({"seqlen": lambda step: 10 * step})
    next(iter(loader))
    assert loader.data_sampler.current_difficulties == {"seqlen": 10}


def test_custom_curriculum_schedule_reaches_the_sampler(tmp_path):
    run_distributed_test(schedule_curriculum, 1, str(tmp_path))


def misuse_curriculum(directory):
    sampling = curriculum(directory)
    with pytest.raises(ValueError, match="`training_data` must be a dataset, got the data loader"):
        start(sampling, DataLoader(SAMPLES, 2))
    with pytest.raises(ValueError, match="`training_data` must have `__len__`"):
        start(sampling, iter(SAMPLES))
    section = {"dataloader": {"shuffle": False}}
    with pytest.raises(ValueError, match="`engine.dataloader` has no effect"):
        start(sampling, engine=section)


def test_curriculum_with_other_data_than_a_dataset_raises(tmp_path):
    run_distributed_test(misuse_curriculum, 1, str(tmp_path))


def warn_of_dynamic_batching():
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("onecycle").addHandler(handler)
    start({"dynamic_batching": {"enabled": True, "max_tokens": 8}})
    assert any("`dynamic_batching` has no effect on the returned" in each for each in records)


def test_dynamic_batching_with_training_data_is_reported():
    run_distributed_test(warn_of_dynamic_batching, 1)


class PlainAdam(torch.optim.AdamW):
    """Replaces ZenFlow's CPU Adam, which DeepSpeed must compile first."""

    def __init__(self, params, *, adamw_mode, fp32_optimizer_states, overlap_step, **settings):
        assert adamw_mode
        assert fp32_optimizer_states
        assert not overlap_step
        super().__init__(params, **settings)

    def step(self, closure=None, step_id=None):
        return super().step(closure)


ZENFLOW = {
    "topk_ratio": 0.3,
    "select_strategy": "auto",
    "select_interval": "auto",
    "update_interval": 2,
    "full_warm_up_rounds": 0,
    "overlap_step": False,
}


def build_zenflow_config(**changes):
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}, "zenflow": ZENFLOW | changes}
    return {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    } | OPTIMIZER


def train_zenflow(initialize, config, data):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    trainer, *_ = initialize(
        config=copy.deepcopy(config),
        model=model,
        model_parameters=list(model.parameters()),
        training_data=data,
    )
    batches = torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(1))
    for batch in batches:
        trainer.backward(trainer(batch).pow(2).mean())
        trainer.step()
    return trainer, [parameter.detach().clone() for parameter in model.parameters()]


def compare_zenflow():
    import deepspeed
    import deepspeed.ops.adam

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # takes a minute to compile
    deepspeed.ops.adam.ZenFlowCPUAdam = PlainAdam
    deepspeed.init_distributed("gloo", verbose=False)
    config = build_zenflow_config()
    for data in (None, SAMPLES[:8]):  # an epoch has 4 micro-batches
        theirs, expected = train_zenflow(deepspeed.initialize, config, data)
        ours, found = train_zenflow(engine.initialize, config, data)
        assert all(map(torch.equal, found, expected))
        assert (ours.select_interval, ours.global_steps) == (theirs.select_interval, 6)
    check = functools.partial(train_zenflow, engine.initialize)
    with pytest.raises(ValueError, match="`zenflow.update_interval` must be <= 4"):
        check(build_zenflow_config(update_interval=5), SAMPLES[:8])
    with pytest.raises(ValueError, match="`gradient_accumulation_steps` must be 1 with `zenflow`"):
        check(config | {"gradient_accumulation_steps": 2}, None)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="`optimizer` must not be passed with `zenflow`"):
        engine.initialize(config=config, model=model, optimizer=optimizer)
    _, found = check(build_zenflow_config(update_interval="auto"), None)
    assert all(torch.isfinite(each).all() for each in found)


def test_zenflow_takes_the_steps_of_deepspeed():
    run_distributed_test(compare_zenflow, 1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, None),
        ({"optimizer": {"type": "Adagrad"}}, "requires DeepSpeed's CPU Adam"),
        (
            {"zero_optimization": {"stage": 2, "zenflow": ZENFLOW}},
            "requires the optimizer to be offloaded",
        ),
    ],
)
def test_validate_zenflow_requires_cpu_adam(config, message):
    problems = validate(build_zenflow_config() | config)
    errors = [each for each in problems if each.severity == "error"]
    assert [message in each.message for each in errors] == ([True] if message else [])
    assert not any("bf16" in str(each.hint) for each in errors)
