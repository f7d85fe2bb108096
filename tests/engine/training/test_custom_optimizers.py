"""Optimizers of the user's own: classes that a config names, and what the engine cannot step."""

import io
import json
import logging
import sys

import pytest
import torch

import engine
from engine.cli.main import main
from tests.testing.distributed import run_distributed_test

MODULE = "optimizers_named_by_a_config"
SOURCE = '''
import torch


class Scaled(torch.optim.SGD):
    """SGD with its learning rate multiplied by a required factor."""

    def __init__(self, params, lr=0.1, *, factor):
        super().__init__(params, lr=lr * factor)


class Late(torch.optim.SGD):
    def step(self, closure):
        return super().step(closure)


def build(params):
    return torch.optim.SGD(params, lr=0.1)


class NotAnOptimizer:
    pass


NUMBER = 3
'''


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    (tmp_path / f"{MODULE}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop(MODULE, None)


def config_of(name, backend="torch", **params):
    return {
        "train_batch_size": 2,
        "gradient_clipping": 0,
        "optimizer": {"type": name, "params": params},
        "scheduler": {"type": "ConstantLR", "params": {"factor": 0.5, "total_iters": 2}},
        "engine": {"backend": backend},
    }


def train(trainer, steps=3):
    for step in range(steps):
        x = torch.full((2, 3), float(step + 1))
        trainer.backward((trainer(x) ** 2).mean())
        trainer.step()
    return trainer.module.weight.detach().clone()


def build_model():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 1, bias=False)


@pytest.mark.parametrize("command", ["validate", "config", "plot"])
def test_commands_never_import_an_optimizer_class(tmp_path, command):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(config_of(f"{MODULE}:Scaled", factor=2.0)))
    options = ["--csv", "-"] if command == "plot" else []
    assert main([command, str(path), *options], io.StringIO(), io.StringIO()) == 0
    assert MODULE not in sys.modules


@pytest.mark.parametrize(
    ("path", "severity"),
    [
        (f"{MODULE}:Scaled", "note"),
        ("no_such_module:Scaled", "warning"),
        ("not a path:Scaled", "error"),
    ],
)
def test_validate_checks_form_and_file_of_an_optimizer_class(path, severity):
    (problem,) = engine.validate(config_of(path, factor=2.0))
    assert (problem.rule, problem.severity) == ("named-code", severity)
    assert problem.pointer == "/optimizer/type"


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("Scale", {}, "has no attribute 'Scale'"),
        ("build", {}, "subclass of torch.optim.Optimizer"),
        ("NotAnOptimizer", {}, "subclass of torch.optim.Optimizer"),
        ("NUMBER", {}, "subclass of torch.optim.Optimizer"),
        ("Late", {}, "needs a closure"),
        ("Scaled", {}, "Missing key `factor`"),
        ("Scaled", {"factor": 1.0, "learning_rate": 1.0}, "Unknown key `learning_rate`"),
    ],
)
def test_invalid_optimizer_class_is_an_error_of_the_config(name, params, message):
    config = config_of(f"{MODULE}:{name}", **params)
    with pytest.raises(engine.ConfigError) as raised:
        engine.initialize(config=config, model=build_model())
    assert message in str(raised.value)
    (problem,) = engine.validate(config, allow_imports=True)
    assert message in str(problem)


def test_optimizer_class_that_rejects_its_params_raises_value_error():
    with pytest.raises(ValueError, match=rf"{MODULE}:Scaled .* Invalid learning rate: -2"):
        config = config_of(f"{MODULE}:Scaled", factor=-2, lr=1)
        engine.initialize(config=config, model=build_model())


def test_optimizer_class_trains_as_in_a_loop_by_hand(caplog):
    caplog.set_level(logging.INFO, "onecycle")
    config = config_of(f"{MODULE}:Scaled", lr=0.01, factor=2)
    config["optimizer"]["params"]["//"] = "a comment"
    trainer, *_ = engine.initialize(config=config, model=build_model())
    assert f"imported {MODULE}:Scaled, as specified by /optimizer/type" in caplog.text
    model = build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=2)
    for step in range(3):
        (model(torch.full((2, 3), float(step + 1))) ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    torch.testing.assert_close(train(trainer), model.weight.detach())


def test_optimizer_class_of_torch_resumes_bit_for_bit(tmp_path):
    config = config_of("torch.optim:NAdam", lr=0.1, betas=[0.8, 0.9])
    trainer, optimizer, *_ = engine.initialize(config=config, model=build_model())
    assert optimizer.defaults["betas"] == (0.8, 0.9)
    train(trainer)
    trainer.save_checkpoint(tmp_path)
    resumed, *_ = engine.initialize(config=config, model=build_model())
    resumed.load_checkpoint(tmp_path)
    assert torch.equal(train(trainer), train(resumed))


def test_param_groups_with_an_optimizer_class_have_their_own_values_and_schedules():
    config = config_of("torch.optim:SGD", lr=0.1, momentum=0.9)
    config["optimizer"]["param_groups"] = [
        {"params": "bias", "lr": 0.5, "weight_decay": 0.25},
        {"params": "weight", "scheduler": {"type": "ConstantLR", "params": {"factor": 0.1}}},
    ]
    assert [each.severity for each in engine.validate(config)] == ["note"]
    assert engine.validate(config, allow_imports=True) == []
    _, optimizer, *_ = engine.initialize(config=config, model=torch.nn.Linear(3, 1))
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.25, 0.01])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0]


def test_param_groups_with_muon_of_torch_have_their_own_values():
    config = {
        "train_batch_size": 2,
        "optimizer": {"type": "Muon", "param_groups": [{"params": "^0", "lr": 0.5}]},
        "engine": {"backend": "torch"},
    }
    layers = (torch.nn.Linear(3, 2, bias=False), torch.nn.Linear(2, 1, bias=False))
    _, optimizer, *_ = engine.initialize(config=config, model=torch.nn.Sequential(*layers))
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.001]
    config["engine"] = {"backend": "deepspeed"}
    (error,) = (each for each in engine.validate(config) if each.severity == "error")
    assert error.pointer == "/optimizer/param_groups"


def train_on_both_backends():
    weights = []
    for backend in ("torch", "deepspeed"):
        config = config_of("torch.optim:NAdam", backend, lr=0.1)
        trainer, optimizer, *_ = engine.initialize(config=config, model=build_model())
        assert type(optimizer) is torch.optim.NAdam
        weights.append(train(trainer))
    torch.testing.assert_close(*weights)


def test_optimizer_class_takes_the_same_steps_on_deepspeed():
    run_distributed_test(train_on_both_backends, 1)


def test_optimizer_class_with_zero_is_untested_by_deepspeed():
    config = config_of(f"{MODULE}:Scaled", "deepspeed", factor=2.0)
    config["zero_optimization"] = {"stage": 1}
    assert "untested-optimizer" in {each.rule for each in engine.validate(config)}


LBFGS = torch.optim.LBFGS


def build_lbfgs(params):
    return LBFGS(params)


@pytest.mark.parametrize("how", ["config", "path", "object", "class", "function"])
def test_optimizer_that_needs_a_closure_is_refused(how):
    model, optimizer, config = build_model(), None, {"train_batch_size": 2}
    if how in {"config", "path"}:
        name = "LBFGS" if how == "config" else "torch.optim:LBFGS"
        config["optimizer"] = {"type": name}
    else:
        built = LBFGS(model.parameters())
        optimizer = {"object": built, "class": LBFGS, "function": build_lbfgs}[how]
    with pytest.raises(ValueError, match="LBFGS, which needs a closure"):
        engine.initialize(config=config, model=model, optimizer=optimizer)


@pytest.mark.parametrize("kind", [list, tuple, dict])
def test_several_optimizers_are_an_error_that_names_two_engines(kind):
    model = build_model()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2)]
    given = dict(enumerate(optimizers)) if kind is dict else kind(optimizers)
    with pytest.raises(ValueError, match="`initialize` once"):
        engine.initialize(config={"train_batch_size": 2}, model=model, optimizer=given)


MUON = {"type": "Muon", "params": {"lr": 0.1, "momentum": 0.9}}


def test_muon_on_torch_names_parameters_that_are_not_matrices_before_training():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    before = {name: each.clone() for name, each in model.state_dict().items()}
    config = {"train_batch_size": 2, "optimizer": MUON, "engine": {"backend": "torch"}}
    with pytest.raises(ValueError, match=r"3 of 4 .* `0\.bias` of shape \(2,\).*deepspeed"):
        engine.initialize(config=config, model=model)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    matrices = [each for each in model.parameters() if each.ndim == 2]
    trainer, *_ = engine.initialize(
        config=config, model=model, model_parameters=[{"params": matrices}]
    )
    assert type(trainer.optimizer) is torch.optim.Muon


@pytest.mark.parametrize(
    ("block", "backend", "pointer"),
    [
        ({"type": "Muon", "params": {"ns_steps": 3}}, "deepspeed", "/optimizer/params/ns_steps"),
        ({"type": "Muon", "params": {"muon_lr": 0.1}}, "torch", "/optimizer/params/muon_lr"),
        ({"type": "Muon", "params": {"ns_step": 3}}, "torch", "/optimizer/params/ns_step"),
        ({"type": "Adafactor"}, "deepspeed", "/optimizer/type"),
        ({"type": "Adafactor", "params": {"d": 0.5}}, "torch", "/optimizer/params/d"),
        ({"type": "Adafactor", "params": {"eps": [None]}}, "torch", "/optimizer/params/eps"),
        (
            {"type": "Adafactor", "params": {"betas": [0.9, 0.9]}},
            "torch",
            "/optimizer/params/betas",
        ),
    ],
)
def test_validate_muon_and_adafactor_accept_the_params_of_their_backend(block, backend, pointer):
    config = {"train_batch_size": 2, "optimizer": block, "engine": {"backend": backend}}
    errors = [each for each in engine.validate(config) if each.severity == "error"]
    assert [each.pointer for each in errors] == [pointer]


def build_wide():
    torch.manual_seed(0)
    layers = (torch.nn.Linear(6, 8, bias=False), torch.nn.Tanh(), torch.nn.Linear(8, 2, bias=False))
    return torch.nn.Sequential(*layers)


def train_muon():
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.manual_seed(1)
    batches = torch.randn(3, 4, 6)
    reference = build_wide()
    optimizer = torch.optim.Muon(reference.parameters(), **MUON["params"])
    for batch in batches:
        reference(batch).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for stage in range(4):
        config = {"train_batch_size": 4, "optimizer": MUON, "engine": {"backend": "torch"}}
        config |= {"zero_optimization": {"stage": stage}, "gradient_clipping": 0}
        trainer, *_ = engine.initialize(config=config, model=build_wide())
        for batch in batches:
            trainer.backward(trainer(batch.chunk(size)[rank]).pow(2).mean())
            trainer.step()
        for weight, expected in zip(
            trainer.module.parameters(), reference.parameters(), strict=True
        ):
            own = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
            # Muon computes in bfloat16, in which sums over shards differ by up to 0.04 per step.
            is_sharded = stage > 0 and size > 1
            torch.testing.assert_close(own, expected, rtol=0, atol=0.012 if is_sharded else 1e-6)


def start_and_train_muon():
    torch.distributed.init_process_group("gloo")
    train_muon()


@pytest.mark.parametrize("world_size", [1, 2])
def test_muon_takes_the_same_steps_as_a_loop_by_hand(world_size):
    run_distributed_test(start_and_train_muon, world_size)
