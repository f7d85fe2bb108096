"""Test the rules: their pages, their examples, and combinations of keys."""

import json
import re
from pathlib import Path

import pytest

import engine
from engine.config.parser import parse
from engine.config.rules.pages import RULEBOOK
from engine.config.validate import check

SOURCES = Path(engine.__file__).parent / "config"
RUNS_ALONE = {"unresolved-auto"}  # reported only if a run starts from the config
GATHER, ON_SAVE = "stage3_gather", "_weights_on_model_save"
# Rules that report notes.
NOTES = {
    "unused-betas",
    "deprecated-key",
    "jump",
    "log-warmup",
    "no-effect",
    "no-minimum-loss-scale",
    "number-as-boolean",
    "unused-lr",
}


@pytest.mark.parametrize("rule", [rule for rule, page in RULEBOOK.items() if page.example])
def test_rule_example_breaks_only_this_rule(rule):
    problems = check(parse(RULEBOOK[rule].example, "f"), 1, reject_auto=rule in RUNS_ALONE)
    serious = {problem.rule for problem in problems if problem.severity != "note"}
    assert rule in {problem.rule for problem in problems}
    assert serious <= {rule}


def test_every_rule_id_in_the_code_has_a_page():
    names = r"([a-z0-9]+(?:-[a-z0-9]+)*)"
    calls = rf'(?:problem|error|warning|note)\(\s*"{names}"|Problem\(\s*"{names}"'
    raised = {
        found
        for path in SOURCES.rglob("*.py")
        for pair in re.findall(calls, path.read_text())
        for found in pair
        if found
    }
    assert raised - RULEBOOK.keys() <= {"schedule"}
    assert {"unknown-key", "offload-without-stage", "unquoted"} <= raised


def find_problems(config, world_size=None):
    return [
        (p.rule, p.severity, p.pointer) for p in check(parse(json.dumps(config), "f"), world_size)
    ]


def zero_config(**section):
    return {"train_batch_size": 8, "zero_optimization": section}


def schedule_config(type_name, lr=0.01, **params):
    optimizer = {"type": "Adam", "params": {"lr": lr}}
    scheduler = {"type": type_name, "params": params}
    return {"train_batch_size": 8, "optimizer": optimizer, "scheduler": scheduler}


def config_with_length(length, **params):
    block = {"type": "CosineAnnealingScheduler", "params": {"t_max": params.pop("T_max"), **params}}
    return schedule_config("WarmupLR") | {"scheduler": block, "engine": {"max_duration": length}}


CYCLE = {"cycle_min_lr": 0.001, "cycle_max_lr": 0.1}
OFFLOAD = "/zero_optimization/offload_param"


def dataloader_config(**settings):
    return {"train_batch_size": 8, "engine": {"dataloader": settings}}


def elastic_config(stage, optimizer, **params):
    block = {"optimizer": {"type": optimizer, "params": params}}
    return zero_config(stage=stage, elastic_checkpoint=True) | block


def optimizer_config(name, **params):
    return {"train_batch_size": 8, "optimizer": {"type": name, "params": params}}


# The phase starts at the optimizer's weight decay, which is 0 by default.
EXPONENTIAL_FROM_0 = {
    "type": "Phases",
    "params": {"weight_decay": [{"shape": "exponential", "to": 0.1, "duration": 5}]},
}

NO_NORM = {"stage": 2, "compute_grad_norm": False}
NORM = [("gradient-norm", "error", "/zero_optimization/compute_grad_norm")]
SAMPLING = "/data_efficiency/data_sampling"

PAIRS = [
    (zero_config(**NO_NORM), []),
    (zero_config(**NO_NORM) | {"gradient_clipping": 0}, []),
    (zero_config(**NO_NORM) | {"gradient_clipping": 1.0}, NORM),
    (zero_config(**NO_NORM | {"stage": 3}), NORM),
    (zero_config(**NO_NORM, offload_optimizer={"device": "cpu"}), NORM),
    (
        zero_config(stage=3, prefetch_bucket_size=10, stage3_prefetch_bucket_size=10),
        [("duplicate-key", "error", "/zero_optimization/prefetch_bucket_size")],
    ),
    (
        zero_config(stage=3, prefetch_bucket_size="auto", stage3_prefetch_bucket_size=10),
        [("unsupported-auto", "warning", "/zero_optimization/prefetch_bucket_size")],
    ),
    (
        zero_config(stage=3, offload_param={"device": "cpu", "pin_memory": "auto"}),
        [("unsupported-auto", "warning", f"{OFFLOAD}/pin_memory")],
    ),
    (
        {
            "train_batch_size": 8,
            "data_efficiency": {
                "data_sampling": {
                    "curriculum_learning": {"enabled": True},
                    "dynamic_batching": {"enabled": True},
                }
            },
        },
        [
            ("missing-key", "error", f"{SAMPLING}/curriculum_learning"),
            ("missing-key", "error", f"{SAMPLING}/dynamic_batching"),
        ],
    ),
    (
        {"train_batch_size": 8, "bfloat16": {"enabled": True, "bf16_optimizer_states": True}},
        [
            ("deprecated-key", "note", "/bfloat16"),
            ("precision", "error", "/bfloat16/bf16_optimizer_states"),
            ("precision", "error", "/bfloat16/bf16_optimizer_states"),
        ],
    ),
    (optimizer_config("SGD", maximize=True, foreach=False), []),
    (optimizer_config("AdamW", fused=True, torch_adam=True), []),
    (
        optimizer_config("AdamW", fused=True, foreach=True),
        [("optimizer-params", "error", "/optimizer/params/fused")],
    ),
    (
        optimizer_config("AdamW", fused=True, torch_adam=False)
        | {"engine": {"backend": "deepspeed"}},
        [("optimizer-params", "error", "/optimizer/params/fused")],
    ),
    (zero_config(stage=3, offload_param={"device": "cpu"}), []),
    (zero_config(stage=2, offload_param={"device": "none"}), []),
    (
        zero_config(stage=1, offload_param={"device": "cpu"}),
        [("offload-without-stage", "error", OFFLOAD)],
    ),
    (zero_config(stage="auto", offload_param={"device": "cpu"}), []),
    # An invalid or misspelled stage is reported once, without errors that follow from it.
    (
        zero_config(stage=7, offload_param={"device": "cpu"}),
        [("out-of-range", "error", "/zero_optimization/stage")],
    ),
    (
        zero_config(stge=2, offload_param={"device": "cpu"}),
        [("unknown-key", "error", "/zero_optimization/stge")],
    ),
    (zero_config(stage=3, offload_param={"device": "nvme", "nvme_path": "/x"}), []),
    (
        zero_config(stage=3, offload_param={"device": "cpu", "nvme_path": "/x"}),
        [("no-effect", "note", f"{OFFLOAD}/nvme_path")],
    ),
    (
        zero_config(stage=2, offload_optimizer={"device": "cpu", "ratio": 0.5}),
        [("offload-without-stage", "error", "/zero_optimization/offload_optimizer/ratio")],
    ),
    (
        {"engine": {"report": "run"}} | schedule_config("OneCycle", **CYCLE),
        [],
    ),
    (
        {"engine": {"report": "run"}} | schedule_config("LRRangeTest"),
        [("unused-lr", "note", "/optimizer/params/lr")],
    ),
    (
        {"train_batch_size": 8, "checkpoint": {"tag_validation": "Warn"}},
        [("no-effect", "note", "/checkpoint/tag_validation")],
    ),
    ({"train_batch_size": 8, "checkpoint": {"tag_validation": "FAIL"}}, []),
    (
        {"train_batch_size": 8, "engine": {"find_unused_parameters": True}},
        [("no-effect", "note", "/engine/find_unused_parameters")],
    ),
    (
        {"train_batch_size": 8, "engine": {"find_unused_parameters": False}},
        [("no-effect", "note", "/engine/find_unused_parameters")],
    ),
    (
        elastic_config(1, "AdamW"),
        [("elastic-checkpoint", "error", "/zero_optimization/elastic_checkpoint")],
    ),
    (
        zero_config(stage=1, elastic_checkpoint=True, cpu_offload=True)
        | {"optimizer": {"type": "Lion"}},
        [
            ("elastic-checkpoint", "error", "/zero_optimization/elastic_checkpoint"),
            ("deprecated-key", "note", "/zero_optimization/cpu_offload"),
        ],
    ),
    *(
        (
            zero_config(stage=3, **{old: True, new: value}),
            [("deprecated-key", severity, f"/zero_optimization/{old}")] if severity else [],
        )
        for old, new, value, severity in [
            ("cpu_offload", "offload_optimizer", {"device": "cpu"}, "error"),
            ("cpu_offload_param", "offload_param", {"device": "cpu"}, "error"),
            (f"{GATHER}_fp16{ON_SAVE}", f"{GATHER}_16bit{ON_SAVE}", True, "error"),
            (f"{GATHER}_fp16{ON_SAVE}", f"{GATHER}_16bit{ON_SAVE}", "auto", None),
        ]
    ),
    (elastic_config(1, "AdamW", torch_adam=False), []),
    (elastic_config(3, "AdamW"), []),
    (
        elastic_config(2, "SGD") | {"zero_allow_untested_optimizer": True},
        [("elastic-checkpoint", "error", "/zero_optimization/elastic_checkpoint")],
    ),
    (
        {"train_batch_size": 8, "zero_optimization": True},
        [("deprecated-key", "note", "/zero_optimization")],
    ),
    (
        zero_config(stage=1, mics_shard_size=2),
        [("removed-key", "error", "/zero_optimization/mics_shard_size")],
    ),
    (
        {"train_batch_size": 8, "fp16": {"enabled": True}, "torch_autocast": {"enabled": True}},
        [("precision", "error", "/fp16/enabled")],
    ),
    (
        {"train_batch_size": 8, "bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
        [("precision", "error", "/bf16/bf16_master_weights_and_grads")],
    ),
    (schedule_config("OneCycle", **CYCLE), []),
    (
        schedule_config("OneCycle", lr=1.0, **CYCLE),
        [("unused-lr", "note", "/optimizer/params/lr")],
    ),
    *(
        (
            schedule_config(name, lr=0.5, **params),
            [("unused-lr", "note", "/optimizer/params/lr")],
        )
        for name, params in (
            ("OneCycleLR", {"max_lr": 0.1, "total_steps": 100}),
            ("CyclicLR", {"base_lr": 0.01, "max_lr": 0.1, "cycle_momentum": False}),
            ("PolyScheduler", {"base_lr": 0.1, "final_lr": 0.01, "max_update": 9}),
        )
    ),
    # The peak of these cycles is between two steps, or before the first one.
    *(
        (config, [])
        for steps in (2, 5, 10, 12, 20)
        for three_phase in ((False, True) if steps >= 10 else (False,))
        for config in [
            schedule_config(
                "OneCycleLR", lr=0.1, max_lr=0.1, total_steps="1dur", three_phase=three_phase
            )
            | {"engine": {"max_duration": steps}}
        ]
    ),
    (schedule_config("CosineAnnealingLR", lr=0.5, T_max=10), []),
    (
        {
            "train_batch_size": 8,
            "optimizer": {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.5}},
            "scheduler": {"type": "OneCycle", "params": CYCLE},
        },
        [("unused-betas", "note", "/optimizer/params/momentum")],
    ),
    *(
        (
            config_with_length(length, T_max=100),
            [("end-of-schedule", severity, "/engine/max_duration")],
        )
        for length, severity in ((50, "warning"), (1000, "warning"), ("320sp", "warning"))
    ),
    (
        config_with_length(1000, T_max=100, alpha_f=0.5),
        [("end-of-schedule", "note", "/engine/max_duration")],
    ),
    *((config_with_length(length, T_max=100), []) for length in (99, 100, "10ep")),
    (config_with_length(11, T_max=10), []),  # the last step has the final value
    (
        config_with_length(12, T_max=10),
        [("end-of-schedule", "warning", "/engine/max_duration")],
    ),
    (config_with_length(1000, T_max="1dur"), []),
    (
        schedule_config("OneCycle", **CYCLE, decay_lr_rate=0.1),
        [("decay-without-interval", "warning", "/scheduler/params/decay_lr_rate")],
    ),
    (
        schedule_config("OneCycle", **CYCLE, cycle_first_step_size="1ep", decay_lr_rate=0.1),
        [("decay-without-interval", "warning", "/scheduler/params/decay_lr_rate")],
    ),
    (schedule_config("OneCycle", **CYCLE, decay_lr_rate=0.1, decay_step_size=10), []),
    (
        schedule_config("OneCycle", **CYCLE, decay_lr_rate=0.1, decay_step_size=0),
        [("decay-without-interval", "warning", "/scheduler/params/decay_lr_rate")],
    ),
    (
        {"train_batch_size": 8, "bf16": {"enabled": True}, "bfloat16": {"enabled": True}},
        [("precision", "error", "/bfloat16")],
    ),
    (
        {"engine": {"backend": "deepspeed"}}
        | zero_config(stage=0, offload_optimizer={"device": "cpu", "ratio": 0.5}),
        [("offload-without-stage", "error", "/zero_optimization/offload_optimizer")],
    ),
    (
        {"train_batch_size": 8, "engine": {"backend": "deepspeed", "compile": "inductor"}},
        [("other-backend", "error", "/engine/compile")],
    ),
    (
        {"train_batch_size": 8, "engine": {"backend": "deepspeed", "compile": None}},
        [],
    ),
    (
        {
            "train_batch_size": 8,
            "engine": {"backend": "deepspeed", "checkpoint": {"dir": "c", "async": True}},
        },
        [("other-backend", "error", "/engine/checkpoint/async")],
    ),
    (
        schedule_config("AutoWU", rollback=True, total_epochs=9, steps_per_epoch=9)
        | {"engine": {"backend": "deepspeed"}},
        [("other-backend", "error", "/scheduler/params/rollback")],
    ),
    (
        {"train_batch_size": 8, "engine": {"checkpoint": {"every": 5, "resume": "must"}}},
        [("checkpoint-without-dir", "error", "/engine/checkpoint/every")],
    ),
    ({"train_batch_size": 8, "engine": {"checkpoint": {"async": True, "resume": "never"}}}, []),
    (
        dataloader_config(num_workers=0, prefetch_factor=2, persistent_workers=True),
        [
            ("dataloader-without-workers", "error", "/engine/dataloader/prefetch_factor"),
            ("dataloader-without-workers", "error", "/engine/dataloader/persistent_workers"),
        ],
    ),
    (dataloader_config(num_workers=2, prefetch_factor=2, persistent_workers=True), []),
    (dataloader_config(prefetch_factor=None, persistent_workers=False), []),
    (
        dataloader_config(num_worker=2, prefetch_factor=2),
        [("unknown-key", "error", "/engine/dataloader/num_worker")],
    ),
    (
        schedule_config("OneCycle", **CYCLE, cycle_first_step_size=9, cycle_first_stair_count=9),
        [("no-effect", "note", "/scheduler/params/cycle_first_stair_count")],
    ),
    (
        schedule_config("WarmupDecayLR", total_num_steps=2000, warmup_type="linear"),
        [("peak-by-default", "warning", "/scheduler/params")],
    ),
    (
        schedule_config(
            "WarmupDecayLR", total_num_steps=2000, warmup_type="linear", warmup_max_lr="auto"
        ),
        [],
    ),
    (schedule_config("WarmupLR"), [("log-warmup", "note", "/scheduler/type")]),
    (
        {"train_batch_size": 8, "optimizer": {"type": "AdamW", "params": {"adam_w_mode": False}}},
        [("no-effect", "error", "/optimizer/params/adam_w_mode")],
    ),
    (
        {"train_batch_size": 8, "optimizer": {"type": "OneBitAdam"}},
        [("removed-key", "error", "/optimizer/type")],
    ),
    (
        {
            "train_batch_size": 8,
            "engine": {"backend": "torch"},
            "optimizer": {"type": "Lamb", "params": {"max_coeff": 5.0}},
        },
        [("other-backend", "error", "/optimizer/type")],
    ),
    (
        {"engine": {"backend": "torch"}} | zero_config(stage=2, load_from_fp32_weights=False),
        [("other-backend", "error", "/zero_optimization/load_from_fp32_weights")],
    ),
    (
        {"engine": {"backend": "torch"}} | zero_config(stage=0, cpu_offload=True),
        [
            ("offload-without-stage", "error", "/zero_optimization/offload_optimizer"),
            ("deprecated-key", "note", "/zero_optimization/cpu_offload"),
        ],
    ),
    (
        {"engine": {"backend": "torch"}} | zero_config(stage=3, offload_param={"device": "nvme"}),
        [
            ("other-backend", "error", "/zero_optimization/offload_param/device"),
        ],
    ),
    ({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": 3}, []),
    *(
        (
            optimizer_config("SGD", **params),
            [("optimizer-params", "error", f"/optimizer/params/{key}")],
        )
        for params, key in (
            ({"nesterov": True}, "nesterov"),
            ({"nesterov": True, "momentum": 0.0}, "nesterov"),
            ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "dampening"),
        )
    ),
    (optimizer_config("SGD", nesterov=True, momentum=0.9), []),
    (
        optimizer_config("Rprop", etas=[1.2, 0.5]),
        [("optimizer-params", "error", "/optimizer/params/etas")],
    ),
    (
        optimizer_config("Rprop", etas=["x", 0.5]),
        [("wrong-type", "error", "/optimizer/params/etas/0")],
    ),
    ({"train_batch_size": 8, "engine": {"compile": "eager"}}, []),
    (
        {"train_batch_size": 8, "engine": {"compile": "my_compiler"}},
        [("unknown-compiler", "warning", "/engine/compile")],
    ),
    # A list of one length, and another list of another length
    (
        schedule_config("CyclicLR", base_lr=[0.1, 0.2], max_lr=[0.3, 0.4, 0.5]),
        [("schedule", "error", "/scheduler/params/max_lr")],
    ),
    # A weight decay that the optimizer does not have
    (
        optimizer_config("Rprop")
        | {"scheduler": {"type": "Phases", "params": {"weight_decay": [{"duration": 5}]}}},
        [("schedule", "error", "/scheduler")],
    ),
    # Durations in epochs or samples, and problems that no length of an epoch avoids
    (
        schedule_config(
            "OneCycle", cycle_min_lr=1.0, cycle_max_lr=0.1, cycle_first_step_size="1ep"
        ),
        [("schedule", "error", "/scheduler/params/cycle_max_lr")],
    ),
    *(
        (
            schedule_config(
                "CosineAnnealingWithWarmupScheduler", t_warmup=f"20{unit}", t_max=f"10{unit}"
            )
            | {"train_batch_size": size, "train_micro_batch_size_per_gpu": 1},
            [("schedule", "error", "/scheduler/params/t_warmup")],
        )
        for unit, size in (("ep", 8), ("sp", "auto"))
    ),
    *(
        (
            schedule_config("OneCycle", lr=0.05, **CYCLE, **params),
            [],
        )
        for params in (
            {"cycle_first_step_size": "1ep", "cycle_first_stair_count": 50},
            {"cycle_first_step_size": "1ep", "decay_step_size": 10, "decay_lr_rate": 0.5},
        )
    ),
    (
        schedule_config("CosineAnnealingWithWarmupScheduler", t_warmup="1ep", t_max=100),
        [],
    ),
    (
        schedule_config("ChainedScheduler", schedulers=[EXPONENTIAL_FROM_0, EXPONENTIAL_FROM_0]),
        [("schedule", "error", "/scheduler/params")],
    ),
]


@pytest.mark.parametrize(("config", "expected"), PAIRS)
def test_check_combination_of_keys_reports_the_expected_rules(config, expected):
    assert find_problems(config) == expected


def test_check_samples_per_step_are_known_for_a_number_of_ranks():
    params = {"warmup_num_steps": 10, "total_num_steps": "60sp", "warmup_type": "linear"}
    config = schedule_config("WarmupDecayLR", warmup_max_lr=0.01, **params)
    config = {**config, "train_micro_batch_size_per_gpu": 2}
    del config["train_batch_size"]
    assert find_problems(config) == []
    assert find_problems(config, world_size=2) == []
    assert find_problems(config, world_size=4) == [
        ("schedule", "error", "/scheduler/params/warmup_num_steps")
    ]


@pytest.mark.parametrize(
    ("key", "where", "hint"),
    [
        ("max_grad_norm", "", "Use `gradient_clipping` instead."),
        ("lr_scheduler", "", "Use `scheduler` instead."),
        ("warmup_steps", "", "Use `/scheduler/params/warmup_num_steps` instead."),
        ("stage", "", "Move it to `/zero_optimization`."),
        ("reduce_bucket_sizes", "zero_optimization", "Did you mean `reduce_bucket_size`?"),
        ("find_unused_parameters", "zero_optimization", "Use `ignore_unused_parameters` instead."),
        (
            "completely_unheard_of",
            "",
            'Remove the key, or start the key with "//" or "x-" to keep it as a comment.',
        ),
    ],
)
def test_check_unknown_key_has_a_suggestion(key, where, hint):
    section = {"stage": 1, key: 1}
    config = {"train_batch_size": 8, where: section} if where else {"train_batch_size": 8, key: 1}
    (problem,) = check(parse(json.dumps(config), "f"), None)
    assert problem.hint == hint


def test_check_key_newer_than_installed_deepspeed_warns(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.14.0")
    config = {"train_batch_size": 8, "compile": {"deepcompile": True}}
    assert find_problems(config) == [("newer-key", "warning", "/compile")]
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.19.8")
    assert find_problems(config) == []


COSINE = {"type": "CosineAnnealingLR", "params": {"T_max": 80}}
WARMUP_TO_1 = {"type": "LinearLR", "params": {"start_factor": 0.1, "total_iters": 20}}
TAIL = {"type": "ConstantLR", "params": {"factor": 0.5, "total_iters": 50}}


def schedule(type_name, **params):
    return {"type": type_name, "params": params}


def sequence(*blocks, **params):
    return {"type": "SequentialLR", "params": {"schedulers": list(blocks), **params}}


@pytest.mark.parametrize(
    ("scheduler", "jumps"),
    [
        (sequence(WARMUP_TO_1, COSINE, milestones=[20]), []),
        (
            sequence(WARMUP_TO_1, COSINE, milestones=[10]),
            [("/milestones", "lr jumps from 0.055 to 0.1 at step 10")],
        ),
        (
            sequence(WARMUP_TO_1, COSINE, TAIL, milestones=[20, 100]),
            [("/milestones", "lr jumps from 0 to 0.05 at step 100")],
        ),
        (sequence(WARMUP_TO_1, COSINE, milestones=[10], from_previous=True), []),
        (
            {
                "type": "Combined",
                "params": {"schedulers": [sequence(COSINE, TAIL, milestones=["0.1dur"])]},
            },
            [("/schedulers", "at step 10")],
        ),
        (
            {
                "type": "Phases",
                "params": {
                    "lr": [{"from": 0, "to": 1, "duration": 5}, {"to": 0, "duration": 5}],
                    "momentum": [{"to": 0.5, "duration": 5}, {"from": 0.8, "duration": "5ba"}],
                },
            },
            [("/momentum", "momentum jumps from 0.5 to 0.8 at step 5")],
        ),
        ({"type": "StepLR", "params": {"step_size": 10}}, []),
        (  # the jump of the inner schedule at step 50 is after its end
            sequence(sequence(TAIL, COSINE, milestones=[50]), COSINE, milestones=[20]),
            [("/milestones", "lr jumps from 0.05 to 0.1 at step 20")],
        ),
    ],
)
def test_jump_between_two_parts_is_a_note(scheduler, jumps):
    config = {
        "train_batch_size": 8,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
        "scheduler": scheduler,
        "engine": {"max_duration": 100},
    }
    found = [problem for problem in engine.validate(config) if problem.rule == "jump"]
    assert [problem.severity for problem in found] == ["note"] * len(jumps)
    for problem, (pointer, text) in zip(found, jumps, strict=True):
        assert problem.pointer == f"/scheduler/params{pointer}"
        assert text in problem.message


@pytest.mark.parametrize(
    ("scheduler", "run", "has_effect"),
    [
        (schedule("StepScheduler", step_size="9tok"), {}, True),
        (schedule("StepScheduler", step_size="9ba"), {"max_duration": "90 TOK"}, True),
        (sequence(WARMUP_TO_1, COSINE, milestones=["160tok"]), {}, True),
        (schedule("StepScheduler", step_size="9sp"), {"max_duration": "9ep"}, False),
    ],
)
def test_tokens_per_sample_without_a_duration_in_tokens_has_no_effect(scheduler, run, has_effect):
    config = {
        "train_batch_size": 2,
        "scheduler": scheduler,
        "engine": {"tokens_per_sample": 4, **run},
    }
    rules = [(problem.rule, problem.pointer) for problem in engine.validate(config)]
    assert rules == ([] if has_effect else [("no-effect", "/engine/tokens_per_sample")])


@pytest.mark.parametrize(("world_size", "severity"), [(None, "warning"), (1, None), (2, "error")])
@pytest.mark.parametrize("name", ["Adafactor", "Rprop"])
def test_optimizer_that_cannot_be_sharded_depends_on_the_world_size(name, world_size, severity):
    config = {
        "train_batch_size": 8,
        "optimizer": {"type": name},
        "zero_optimization": {"stage": 2},
        "engine": {"backend": "torch"},
    }
    found = [each for each in find_problems(config, world_size) if each[0] == "not-sharded"]
    assert [each[1] for each in found] == ([] if severity is None else [severity])


def test_check_fix_names_cycle_momentum_only_for_schedules_that_have_it():
    phases = {"lr": [{"to": 0.2, "duration": 9}], "momentum": [{"to": 0.9, "duration": 9}]}
    cycle = {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2}
    for kind, params, expected in (("Phases", phases, False), ("OneCycle", cycle, True)):
        config = {
            "train_batch_size": 8,
            "optimizer": {"type": "Adagrad", "params": {"lr": 0.1}},
            "scheduler": {"type": kind, "params": params},
        }
        found = check(parse(json.dumps(config), "f"), None)
        problem = next(each for each in found if each.rule == "no-momentum")
        assert ("cycle_momentum" in problem.hint) is expected
