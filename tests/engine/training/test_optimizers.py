"""Optimizers from config blocks: the class, its hyperparameters and its steps."""

import pytest
import torch

import engine
from engine import load_config
from engine.config.schedule_context import build_base_values
from engine.config.schema import OPTIMIZERS
from engine.training.optimizers import build_optimizer
from schedules import WarmupLR


def build(block, parameters, backend="auto"):
    config = engine.load_config(
        {"train_batch_size": 1, "optimizer": block, "engine": {"backend": backend}}
    )
    return build_optimizer(config.optimizer, parameters)


def weights():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(5, 3))]


@pytest.mark.parametrize(
    ("block", "reference"),
    [
        (
            {"type": "Adam", "params": {"weight_decay": 0.1}},
            (torch.optim.AdamW, {"weight_decay": 0.1}),
        ),
        (
            {"type": "Adam", "params": {"weight_decay": 0.1, "adam_w_mode": False}},
            (torch.optim.Adam, {"weight_decay": 0.1}),
        ),
        ({"type": "adamw"}, (torch.optim.AdamW, {"weight_decay": 0.0})),
        (
            {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9, "nesterov": True}},
            (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
        ),
        (
            {"type": "SGD", "params": {"lr": 0.1, "maximize": True}},
            (torch.optim.SGD, {"lr": 0.1, "maximize": True}),
        ),
        ({"type": "RMSprop", "params": {"alpha": 0.9}}, (torch.optim.RMSprop, {"alpha": 0.9})),
        ({"type": "Adagrad"}, (torch.optim.Adagrad, {})),
        ({"type": "NAdam"}, (torch.optim.NAdam, {})),
        ({"type": "RAdam"}, (torch.optim.RAdam, {})),
        ({"type": "Adamax"}, (torch.optim.Adamax, {})),
        ({"type": "Adafactor"}, (torch.optim.Adafactor, {})),
        ({"type": "adafactor", "params": {"d": 2.0}}, (torch.optim.Adafactor, {"d": 2.0})),
        ({"type": "Muon"}, (torch.optim.Muon, {})),
        (
            {"type": "Muon", "params": {"lr": 0.02, "ns_steps": 3, "nesterov": False}},
            (torch.optim.Muon, {"lr": 0.02, "ns_steps": 3, "nesterov": False}),
        ),
        (
            {"type": "Muon", "params": {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0}},
            (torch.optim.Muon, {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0}),
        ),
    ],
)
def test_build_optimizer_takes_the_same_steps_as_torch(block, reference):
    ours, theirs = weights(), weights()
    make, arguments = reference
    built, expected = build(block, ours, backend="torch"), make(theirs, **arguments)
    assert type(built) is make
    for _ in range(5):
        for parameters, optimizer in ((ours, built), (theirs, expected)):
            parameters[0].grad = parameters[0].detach().sin()
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


TORCH_OPTIMIZERS = [
    name
    for name, schema in OPTIMIZERS.items()
    if schema.get("x-backend") != "deepspeed" and "x-removed" not in schema
]


@pytest.mark.parametrize("name", TORCH_OPTIMIZERS)
def test_build_optimizer_passes_all_hyperparameters(name):
    params = {
        key: schema["default"]
        for key, schema in OPTIMIZERS[name]["properties"].items()
        if "default" in schema and schema.get("x-backend") != "deepspeed"
    }
    optimizer = build({"type": name, "params": params}, weights(), backend="torch")
    for key in params.keys() - {"adam_w_mode", "torch_adam"}:
        assert optimizer.defaults[key] == (tuple(params[key]) if key == "betas" else params[key])


@pytest.mark.parametrize(
    "name", [name for name, schema in OPTIMIZERS.items() if "x-removed" not in schema]
)
def test_optimizer_type_selects_the_backend_that_has_it(name):
    config = {"train_batch_size": 8, "optimizer": {"type": name}}
    on_torch = name in TORCH_OPTIMIZERS and name != "Muon"  # the name means DeepSpeed's Muon
    assert load_config(config).backend.name == ("torch" if on_torch else "deepspeed")
    if name not in TORCH_OPTIMIZERS:
        with pytest.raises(engine.ConfigError, match=r"`optimizer\.type`"):
            load_config(config | {"engine": {"backend": "torch"}})


def test_build_optimizer_is_fused_unless_torch_adam_is_set():
    assert build({"type": "AdamW"}, weights()).defaults["fused"] is True
    plain = build({"type": "AdamW", "params": {"torch_adam": True}}, weights())
    assert plain.defaults["fused"] is None


@pytest.mark.parametrize(
    ("params", "fused", "foreach"),
    [
        ({"fused": False}, False, None),
        ({"foreach": True}, None, True),
        ({"torch_adam": True, "fused": True}, True, None),
    ],
)
def test_build_optimizer_uses_the_implementation_that_the_config_selects(params, fused, foreach):
    defaults = build({"type": "AdamW", "params": params}, weights()).defaults
    assert (defaults["fused"], defaults["foreach"]) == (fused, foreach)


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD"])
@pytest.mark.parametrize(
    ("dtypes", "is_fused"),
    [
        ([torch.float32], True),
        ([torch.float64], True),
        ([torch.float32, torch.float64], True),
        ([torch.bfloat16], False),
        ([torch.float32, torch.float16], False),
    ],
)
def test_build_optimizer_is_fused_for_float32_and_float64_only(name, dtypes, is_fused):
    parameters = [torch.nn.Parameter(torch.ones(5, dtype=dtype)) for dtype in dtypes]
    for groups in (parameters, [{"params": parameters}]):
        assert bool(build({"type": name}, groups).defaults["fused"]) == is_fused


def test_initialize_with_sparse_gradients_uses_no_fused_kernel():
    model = torch.nn.Sequential(torch.nn.Embedding(5, 2, sparse=True), torch.nn.Linear(2, 1))
    before = model[0].weight.detach().clone()
    config = {"train_batch_size": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    trainer, *_ = engine.initialize(config=config, model=model)
    trainer.backward(trainer(torch.tensor([1, 3])).sum())
    assert trainer.step()
    changed = (model[0].weight != before).any(dim=1)
    assert changed.tolist() == [False, True, False, True, False]


@pytest.mark.parametrize(
    ("name", "params", "weight_decay"),
    [
        ("Adam", {"torch_adam": True}, 0.01),
        ("AdamW", {"torch_adam": True}, 0.01),
        ("Adam", {"torch_adam": True, "adam_w_mode": False}, 0.0),
        ("Adam", {"torch_adam": True, "weight_decay": 0.0}, 0.0),
        ("Adam", {"torch_adam": True, "weight_decay": 0.5}, 0.5),
        ("Adam", {}, 0.0),
        ("AdamW", {"torch_adam": False}, 0.0),
    ],
)
def test_torch_adam_without_weight_decay_decays_as_torch_does(name, params, weight_decay):
    params = {"lr": 0.1, **params}
    if params.get("torch_adam") is not False:  # DeepSpeed's optimizer
        (weight,) = parameters = weights()
        before = weight.detach().clone()
        optimizer = build({"type": name, "params": params}, parameters)
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        torch.testing.assert_close(weight.detach(), before * (1 - 0.1 * weight_decay))
    schedule = WarmupLR(warmup_num_steps=2)
    base = build_base_values({"optimizer": {"type": name, "params": params}}, schedule)
    assert base["weight_decay"] == (weight_decay,)


def test_build_optimizer_keeps_the_values_of_param_groups():
    groups = [{"params": weights(), "lr": 0.5}, {"params": weights(), "weight_decay": 0.25}]
    optimizer = build({"type": "AdamW", "params": {"lr": 0.1}}, groups)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.25]


@pytest.mark.parametrize("kind", ["generator", "tensor"])
def test_initialize_with_a_generator_or_tensor_in_a_param_group_trains(kind):
    model = torch.nn.Linear(3, 1)
    params = model.parameters() if kind == "generator" else model.weight
    before = model.weight.detach().clone()
    config = {"train_batch_size": 2, "optimizer": {"type": "AdamW"}}
    trainer, *_ = engine.initialize(
        config=config, model=model, model_parameters=[{"params": params}]
    )
    trainer.backward(trainer(torch.ones(2, 3)).mean())
    trainer.step()
    assert not torch.equal(model.weight, before)


def test_sgd_momentum_of_a_layer_that_is_used_later_is_that_of_torch():
    """Torch's fused kernel fails if only some parameters have a momentum."""
    weights_by_kind = []
    for is_ours in (True, False):
        first, second = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
        params = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
        optimizer = (
            build({"type": "SGD", "params": params}, [first, second])
            if is_ours
            else torch.optim.SGD([first, second], **params)
        )
        for step in range(4):
            loss = first.pow(2).sum() + (second.pow(3).sum() if step > 0 else 0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        weights_by_kind.append((first.detach(), second.detach()))
    torch.testing.assert_close(*weights_by_kind)
