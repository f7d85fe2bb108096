"""Names of DeepSpeed's engine and its classes: their values, or errors that explain them."""

import ast
import inspect
from types import SimpleNamespace

import pytest
import torch

import engine
from engine.backends import deepspeed_names
from engine.backends.deepspeed_import import import_deepspeed
from engine.config import load_config
from engine.errors import MisuseError
from tests.engine.test_deepspeed_accessors import Loss, X, start
from tests.testing.distributed import run_distributed_test


def find_public_names(cls):
    """Return the names of a class's public methods, and of the attributes that its methods set."""
    (definition,) = ast.parse(inspect.getsource(cls)).body
    assigned = {
        node.attr
        for node in ast.walk(definition)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        if isinstance(node.value, ast.Name) and node.value.id == "self"
    }
    return {name for name in {*dir(cls), *assigned} if not name.startswith("_")}


def test_every_public_name_of_deepspeeds_engine_works_or_names_the_backend():
    trainer, unexplained = start(), []
    public = find_public_names(import_deepspeed().DeepSpeedEngine)
    for name in public:
        try:
            getattr(trainer, name)
        except AttributeError as error:
            if f"`{name}` exists only with the DeepSpeed backend" not in str(error):
                unexplained.append(name)
    assert unexplained == []
    assert deepspeed_names._ONLY_DEEPSPEED - public == set()


SETTINGS = [
    {},
    {"zero_optimization": {"stage": 3}},
    {
        "checkpoint": {"tag_validation": "FAIL"},
        "fp16": {"enabled": True},
        "wall_clock_breakdown": True,
        "zero_optimization": {
            "stage": 1,
            "overlap_comm": True,
            "reduce_bucket_size": "auto",
            "allgather_partitions": False,
            "stage3_max_live_parameters": 5,
        },
    },
]


@pytest.mark.parametrize("changes", SETTINGS)
def test_settings_on_pytorch_equal_those_of_deepspeeds_engine(changes):
    deepspeed = import_deepspeed()
    config = {"train_batch_size": 4, **changes}
    resolved = load_config({**config, "engine": {"backend": "torch"}})
    zero = {k: v for k, v in config.get("zero_optimization", {}).items() if v != "auto"}
    with_defaults = deepspeed.DeepSpeedConfig({**config, "zero_optimization": zero})
    deepspeeds = deepspeed.DeepSpeedEngine.__new__(deepspeed.DeepSpeedEngine)
    vars(deepspeeds).update(_config=with_defaults, optimizer=None)
    names = {*deepspeed_names._PYTORCH_KEYS, *deepspeed_names._PYTORCH_SETTINGS}
    names -= {"empty_partition_cache"}
    names |= {"fp16_enabled", "log_level", "wall_clock_breakdown"}
    ours = {name: deepspeed_names.find_setting(resolved, name)() for name in names}
    assert ours == {name: getattr(deepspeeds, name)() for name in names}


def test_optimizer_name_has_deepspeeds_spelling():
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    assert set(DEEPSPEED_OPTIMIZERS) == deepspeed_names._LOWERCASED
    types = ("RMSprop", "NAdam", "AdamW", "Adagrad")
    names = [start(optimizer={"type": each}).optimizer_name() for each in types]
    assert names == ["RMSprop", "NAdam", "adamw", "adagrad"]


def test_names_of_the_run_on_pytorch():
    trainer = start()
    assert (trainer.use_node_local_storage(), trainer.enable_backward_allreduce) == (False, True)
    assert trainer.get_data_parallel_rank() == 0
    assert trainer.param_names == {p: name for name, p in trainer.module.named_parameters()}
    trainer.empty_partition_cache()
    with trainer.no_sync():
        assert trainer.inside_no_sync_ctxt
    assert not trainer.inside_no_sync_ctxt


def count_calls(calls):
    def compile_graph(module, inputs):
        calls.append(len(inputs))
        return module.forward

    return compile_graph


def test_compile_on_pytorch_compiles_only_the_module():
    trainer, calls = start(Loss), []
    assert not trainer.is_compiled
    with pytest.raises(ValueError, match=r'`schedule` requires .*"backend": "deepspeed"'):
        trainer.compile(schedule=[(0, [])])
    trainer.compile(backend=count_calls(calls), compile_kwargs={"dynamic": False})
    trainer(X[:2])
    assert (trainer.is_compiled, len(calls), trainer._compiled_call_impl) == (True, 1, None)
    compiled = trainer.module._compiled_call_impl
    trainer.compile()  # like DeepSpeed, which compiles only once
    assert trainer.module._compiled_call_impl is compiled


def use_deepspeeds_engine():
    """Compile with DeepSpeed, and use names that its engine lacks in this run."""
    trainer, calls = start(Loss, engine={"backend": "deepspeed"}), []
    assert not isinstance(trainer, engine.PipelineEngine | engine.DeepSpeedHybridEngine)
    with pytest.raises(AttributeError, match="DeepSpeed's engine does not have the attribute `flo"):
        _ = trainer.flops_profiler
    with pytest.raises(AttributeError, match="Neither .* has the attribute `eigenvalue`"):
        _ = trainer.eigenvalue
    trainer.compile(backend=count_calls(calls), compile_kwargs={"dynamic": False}, schedule=None)
    trainer(X[:2])
    assert (trainer.is_compiled, len(calls), trainer._compiled_call_impl) == (True, 1, None)


@pytest.mark.slow  # imports torch's compiler
def test_names_on_deepspeed_are_those_of_its_engine():
    run_distributed_test(use_deepspeeds_engine, 1)


def use_pipeline():
    deepspeed = import_deepspeed()
    deepspeed.init_distributed("gloo", verbose=False)
    layers = [torch.nn.Linear(2, 4), torch.nn.Linear(4, 1)]

    def build_pipeline():
        loss = torch.nn.MSELoss()
        return deepspeed.pipe.PipelineModule(layers=layers, num_stages=1, loss_fn=loss)

    trainer = start(build_pipeline)
    assert isinstance(trainer, engine.PipelineEngine)
    assert isinstance(trainer, engine.Engine)
    assert not isinstance(trainer, engine.DeepSpeedHybridEngine)
    assert not isinstance(3, engine.PipelineEngine)
    calls = (
        trainer.step,
        lambda: trainer(X),
        lambda: trainer.backward(torch.ones(()).requires_grad_()),
    )
    for call in calls:
        with pytest.raises(MisuseError, match="Call `train_batch` or `eval_batch` instead"):
            call()
    with pytest.raises(MisuseError, match=r"Call `module\.state_dict` instead"):
        trainer.module_state_dict()
    weights = {name: torch.zeros_like(p) for name, p in trainer.module.state_dict().items()}
    trainer.load_module_state_dict({"module": weights})
    assert not any(p.any() for p in trainer.module.parameters())


def test_pipeline_is_a_pipeline_engine_and_names_the_methods_that_work():
    run_distributed_test(use_pipeline, 1)


def test_stand_ins_for_deepspeeds_classes():
    deepspeeds = type("DualPipeVEngine", (type("PipelineEngine", (), {}),), {})
    trainer = SimpleNamespace(_backend=SimpleNamespace(engine=deepspeeds()))
    assert isinstance(trainer, engine.PipelineEngine)
    assert isinstance(trainer, engine.DualPipeVEngine)
    assert not isinstance(trainer, engine.DeepSpeedHybridEngine)
    assert not isinstance(start(), engine.PipelineEngine)
    with pytest.raises(TypeError, match="Call `initialize`"):
        engine.PipelineEngine(None)


def test_load_checkpoint_with_a_function_that_loads_the_weights_raises(tmp_path):
    with pytest.raises(ValueError, match="them to `load_module_state_dict"):
        start().load_checkpoint(tmp_path, custom_load_fn=lambda src, dst: None)
