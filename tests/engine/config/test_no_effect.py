"""Test the table of keys that do not affect results: each is a note and selects no backend."""

import pytest
import torch

import engine
import schemas
from engine.config import load_document
from engine.config.no_effect import find_reason_for_no_effect
from engine.config.schema import SCHEMA, SECTION, Member, walk
from engine.config.validate import examine

TABLE = schemas.read("no_effect.json")
MEMBERS = {
    member.pointer: member.schema
    for params in ("Adam", "SGD")
    for member in walk(
        {"optimizer": {"type": params}},
        schemas.read(SCHEMA),
        fill=lambda schema: SECTION if "properties" in schema else None,
    )
}


def find_problems(config, backend):
    config = {"train_batch_size": 8, **config, "engine": {"backend": backend}}
    problems, context = examine(load_document(config), None)
    return [(each.rule, each.severity, each.pointer) for each in problems], context.backend.name


def zero(**keys):
    return {"zero_optimization": keys}


def test_table_names_only_keys_of_the_schema():
    named = {pointer for rows in TABLE.values() for pointer in rows}
    assert named <= MEMBERS.keys()


def test_default_of_each_deepspeed_key_has_no_effect_on_torch():
    missing = [
        pointer
        for pointer, schema in MEMBERS.items()
        if schema.get("x-backend") == "deepspeed"
        and "default" in schema
        and find_reason_for_no_effect(Member(pointer, schema["default"], schema), "torch") is None
    ]
    assert missing == []


@pytest.mark.parametrize(
    ("config", "pointer"),
    [
        (zero(stage=2, overlap_comm=True), "/zero_optimization/overlap_comm"),
        (zero(stage=2, contiguous_gradients=True), "/zero_optimization/contiguous_gradients"),
        (zero(stage=2, reduce_bucket_size="auto"), "/zero_optimization/reduce_bucket_size"),
        (
            zero(stage=3, param_persistence_threshold=9),
            "/zero_optimization/param_persistence_threshold",
        ),
        ({"prescale_gradients": False}, "/prescale_gradients"),
        ({"communication_data_type": "fp32"}, "/communication_data_type"),
        ({"data_types": {"grad_accum_dtype": "fp32"}}, "/data_types"),
        ({"data_types": {"grad_accum_dtype": "torch.float32"}}, "/data_types"),
        ({"bfloat16": {"check_grad_overflow": True}}, "/bfloat16/check_grad_overflow"),
        ({"tensor_parallel": {"autotp_size": 1}}, "/tensor_parallel"),
        ({"hybrid_engine": {"max_out_tokens": 9}}, "/hybrid_engine"),
        ({"comms_logger": {"enabled": True}}, "/comms_logger"),
        ({"timers": {"throughput": {"enabled": True}}}, "/timers"),
    ],
)
def test_key_without_effect_on_torch_is_one_note(config, pointer):
    problems, _ = find_problems(config, "torch")
    assert [each for each in problems if each[0] != "deprecated-key"] == [
        ("no-effect", "note", pointer)
    ]


@pytest.mark.parametrize(
    ("config", "pointer"),
    [
        ({"communication_data_type": "bf16"}, "/communication_data_type"),
        ({"gradient_allreduce_op": "sum"}, "/gradient_allreduce_op"),
        ({"managed_gradient_accumulation": False}, "/managed_gradient_accumulation"),
        ({"tensor_parallel": {"autotp_size": 2}}, "/tensor_parallel"),
        ({"hybrid_engine": {"enabled": True}}, "/hybrid_engine"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "/data_types"),
        ({"bf16": {"check_grad_overflow": False}}, "/bf16/check_grad_overflow"),
        (
            zero(stage=2, zero_quantized_gradients=True),
            "/zero_optimization/zero_quantized_gradients",
        ),
    ],
)
def test_key_that_changes_results_is_an_error_on_torch_and_selects_deepspeed(config, pointer):
    problems, _ = find_problems(config, "torch")
    assert problems == [("other-backend", "error", pointer)]
    assert find_problems(config, "auto")[1] == "deepspeed"


@pytest.mark.parametrize(
    "config",
    [
        zero(stage=0, overlap_comm=True, reduce_bucket_size=9),
        {"wall_clock_breakdown": True, "dump_state": True, "flops_profiler": {"enabled": True}},
        {
            "prescale_gradients": False,
            "memory_breakdown": False,
            "zero_allow_untested_optimizer": True,
        },
        {"checkpoint": {"tag_validation": "FAIL", "load_universal": False}},
        {"activation_checkpointing": {"partition_activations": True, "profile": True}},
    ],
)
def test_keys_without_effect_select_no_backend(config):
    problems, backend = find_problems(config, "auto")
    assert backend == "torch"
    assert {severity for _, severity, _ in problems} <= {"note"}


@pytest.mark.parametrize(
    ("config", "pointers"),
    [
        (zero(stage=0, overlap_comm=True), ["/zero_optimization/overlap_comm"]),
        (zero(stage=2, overlap_comm=True), []),
        (
            zero(stage=2, max_live_parameters=9, stage3_max_reuse_distance=9),
            [
                "/zero_optimization/max_live_parameters",
                "/zero_optimization/stage3_max_reuse_distance",
            ],
        ),
        (zero(stage=3, stage3_max_live_parameters=9), []),
        (zero(stage="auto", stage3_max_live_parameters=9), []),
    ],
)
def test_key_that_the_stage_does_not_use_is_a_note_on_deepspeed(config, pointers):
    problems, _ = find_problems(config, "deepspeed")
    assert problems == [("no-effect", "note", pointer) for pointer in pointers]


def test_initialize_accepts_keys_without_effect_on_torch():
    params = {"lr": 0.5, "bias_correction": True, "fp32_optimizer_states": True}
    config = {
        "train_batch_size": 4,
        "optimizer": {"type": "Adam", "params": {**params, "set_grad_none": False}},
        "zero_optimization": {"stage": 2, "cpu_offload": True, "overlap_comm": True},
        "comms_logger": {"enabled": True},
        "tensor_parallel": {"autotp_size": 1},
        "engine": {"backend": "torch"},
    }
    model = torch.nn.Linear(1, 1, bias=False)
    start = model.weight.item()
    trainer, *_ = engine.initialize(config=config, model=model)
    assert trainer.config.cpu_offload
    trainer.backward(trainer(torch.ones(4, 1)).mean())
    trainer.step()
    assert model.weight.item() == pytest.approx(start - 0.5, abs=1e-5)


ACCUMULATED = 1 + 2**-9
"""A sum of two gradients that float32 represents, and bfloat16 rounds to 1."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("master_weights", [True, False])
def test_note_on_grad_accum_dtype_is_true(master_weights, dtype):
    config = {
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "data_types": {"grad_accum_dtype": "fp32"},
        "engine": {"backend": "torch", "master_weights": master_weights},
    }
    problems = engine.validate(config, world_size=1)
    (note,) = (each for each in problems if each.rule == "no-effect")
    assert note.severity == "note"
    assert "in the data type of its parameter, which is float32 unless" in note.message
    warnings = [each for each in problems if each.severity == "warning"]
    assert [each.pointer for each in warnings] == (
        [] if master_weights else ["/data_types/grad_accum_dtype"]
    )
    model = torch.nn.Linear(1, 1, bias=False).to(dtype)
    trainer, *_ = engine.initialize(config=config, model=model)
    seen = []
    trainer.optimizer.register_step_pre_hook(lambda *_: seen.append(model.weight.grad.clone()))
    for value in (2.0, 2**-8):  # the engine divides both losses by 2
        trainer.backward(trainer(torch.full((1, 1), value, dtype=dtype)).sum())
        trainer.step()
    (gradient,) = seen
    has_16_bits = dtype is torch.bfloat16 and not master_weights
    assert gradient.dtype is (torch.bfloat16 if has_16_bits else torch.float32)
    assert gradient.item() == (1.0 if has_16_bits else ACCUMULATED)
