"""16-bit precision: methods under autocast, weights in float32 and the dtype of inputs."""

import copy
import functools
import inspect

import pytest
import torch

import engine
from engine.training.precision import AutocastMethod, convert_to_float32
from tests.testing.distributed import run_distributed_test

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
BF16 = {"bf16": {"enabled": True}}
SECTIONS = {"bf16": BF16, "fp16": {"fp16": {"enabled": True, "loss_scale": 64}}}


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x).tanh()


class Net(torch.nn.Module):
    """Two blocks and a head, with a method besides ``forward``."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(), Block()])
        self.head = torch.nn.Linear(4, 1)

    def encode(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x, *, factor: float = 1.0):
        return self.head(self.encode(x)) * factor


def start(model, **changes):
    config = {
        "train_batch_size": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
        "engine": {"backend": "torch"},
    }
    return engine.initialize(model=model, config=config | changes)[0]


def train(trainer, steps=1):
    for _ in range(steps):
        trainer.backward((trainer(torch.ones(4, 4)) - 1).float().pow(2).mean())
        assert trainer.step()


@pytest.mark.parametrize("precision", DTYPES)
def test_autocast_methods_run_in_16_bits_whoever_calls_them(precision):
    model = Net()
    trainer = start(model, **SECTIONS[precision])
    for caller in (trainer, trainer.module, model):
        assert caller(torch.ones(4, 4)).dtype == DTYPES[precision]
        assert caller.encode(torch.ones(4, 4)).dtype == DTYPES[precision]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_autocast_keeps_the_gradients_of_a_method_called_inside_no_grad():
    class Distilled(Net):
        def forward(self, x):
            with torch.no_grad():
                target = self.encode(x)
            return self.head(self.encode(x)) + target.mean()

    model = Distilled()
    trainer = start(model, **BF16)
    trainer.backward(trainer(torch.ones(4, 4)).float().mean())
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_autocast_leaves_the_signature_of_forward_unchanged():
    before = inspect.signature(Net().forward)
    model = Net()
    start(model, **BF16)
    assert inspect.signature(model.forward) == before
    assert list(before.parameters) == ["x", "factor"]


def copy_by_pickle(model, directory):
    torch.save(model, directory / "model.pt")
    return torch.load(directory / "model.pt", weights_only=False)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize(
    "sections",
    [BF16, {"activation_checkpointing": {}}, {**BF16, "activation_checkpointing": {}}],
    ids=["autocast", "activation checkpointing", "both"],
)
def test_copy_of_a_model_computes_with_its_own_weights(sections, way, tmp_path):
    trainer = start(Net(), **sections)
    model = trainer.module
    copied = copy.deepcopy(model) if way == "deepcopy" else copy_by_pickle(model, tmp_path)
    inputs = torch.ones(4, 4)
    before, encoded = model(inputs).detach(), model.encode(inputs).detach()
    train(trainer, 3)
    assert not torch.equal(model(inputs), before)
    assert torch.equal(copied(inputs), before)
    assert torch.equal(copied.encode(inputs), encoded)
    for parameter in copied.parameters():
        torch.nn.init.zeros_(parameter)
    after = model(inputs)
    assert copied(inputs).abs().sum() == 0
    copied(inputs).sum().backward()
    assert copied.head.bias.grad.item() == 4
    assert torch.equal(model(inputs), after)
    assert model.head.bias.grad is None


def test_destroy_restores_the_methods_of_the_model():
    model = Net()
    model.encode = lambda x: x + 3  # a script may replace a method of its model
    own = model.encode
    trainer = start(model, **BF16)
    assert isinstance(model.forward, AutocastMethod)
    trainer.destroy()
    assert "forward" not in vars(model)
    assert model.encode is own
    assert model(torch.ones(4, 4)).dtype == torch.float32
    assert model.forward.__self__ is model


def test_initialize_twice_for_one_model_trains_after_the_first_engine_is_destroyed():
    model = Net()
    first = start(model, **BF16)
    second = start(model, **BF16)
    first.destroy()
    assert second(torch.ones(4, 4)).dtype == torch.bfloat16
    second.destroy()
    assert model(torch.ones(4, 4)).dtype == torch.float32


def test_compile_in_bf16_takes_the_same_steps():
    weights = []
    for section in ({}, {"compile": "eager"}):
        torch.manual_seed(0)
        trainer = start(Net(), **BF16, engine={"backend": "torch", **section})
        train(trainer, 3)
        assert trainer(torch.ones(4, 4)).dtype == torch.bfloat16
        weights.append([p.detach().clone() for p in trainer.module.parameters()])
        trainer.destroy()
    torch.testing.assert_close(*weights)


LR = 1e-5  # too small a step for most 16-bit weights
OPTIMIZERS = ["config", "object", "function"]


def train_16_bits(dtype, optimizer, unfreeze, changes):
    """Train three steps; return how many of the 512 weights moved, and the weights' dtypes."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)).to(dtype)
    model[0].requires_grad_(not unfreeze)
    if unfreeze == "in float32":
        model[0].float()
    before = [layer.weight.detach().float() for layer in model]
    config = {"train_batch_size": 4, "gradient_clipping": 0, "engine": {"backend": "torch"}}
    arguments = {"model_parameters": list(model.parameters())}
    if optimizer == "config":
        config["optimizer"] = {"type": "AdamW", "params": {"lr": LR}}
    elif optimizer == "object":
        arguments = {"optimizer": torch.optim.AdamW(model.parameters(), lr=LR)}
    else:
        arguments["optimizer"] = functools.partial(torch.optim.AdamW, lr=LR)
    trainer, *_ = engine.initialize(model=model, config=config | changes, **arguments)
    inputs = torch.randn(4 // trainer.world_size, 16)
    for _ in range(4 if unfreeze else 3):
        output = trainer(inputs.to(dtype))
        assert output.dtype == dtype
        trainer.backward(output.float().pow(2).mean())
        assert trainer.step()
        model[0].requires_grad_(True)
    after = [layer.weight.detach() for layer in model]
    after = [each.full_tensor() if hasattr(each, "full_tensor") else each for each in after]
    moved = sum(int((a.float() != b).sum()) for a, b in zip(after, before, strict=True))
    return moved, {each.dtype for each in after}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("is_section_given", [True, False])
@pytest.mark.parametrize("precision", DTYPES)
def test_weights_in_16_bits_all_move_in_small_steps(precision, is_section_given, optimizer):
    section = SECTIONS[precision] if is_section_given else {}
    result = train_16_bits(DTYPES[precision], optimizer, False, section)
    assert result == (512, {torch.float32})


@pytest.mark.parametrize("precision", DTYPES)
def test_weights_in_16_bits_unfrozen_later_all_move_in_small_steps(precision):
    for optimizer in OPTIMIZERS:
        result = train_16_bits(DTYPES[precision], optimizer, True, SECTIONS[precision])
        assert result == (512, {torch.float32}), optimizer


def test_weights_without_master_weights_stay_in_16_bits():
    section = {"engine": {"backend": "torch", "master_weights": False}}
    for changes in ({}, BF16):
        moved, dtypes = train_16_bits(torch.bfloat16, "config", False, section | changes)
        assert dtypes == {torch.bfloat16}
        assert moved < 512


def train_16_bits_on_ranks(precision, stages):
    dtype, section = DTYPES[precision], SECTIONS[precision]
    for stage in stages:
        zero = {"zero_optimization": {"stage": stage}}
        for optimizer in OPTIMIZERS:
            for changes in (zero, zero | section):
                result = train_16_bits(dtype, optimizer, False, changes)
                assert result == (512, {torch.float32}), (optimizer, changes)
            if stage:
                with pytest.raises(engine.MisuseError, match=r"`0\.weight`"):
                    train_16_bits(dtype, optimizer, True, zero | section)
                result = train_16_bits(dtype, optimizer, "in float32", zero | section)
                assert result == (512, {torch.float32}), (optimizer, stage)
            else:
                result = train_16_bits(dtype, optimizer, True, zero | section)
                assert result == (512, {torch.float32}), optimizer


slow = [pytest.param(name, range(4), marks=pytest.mark.slow) for name in DTYPES]


@pytest.mark.parametrize(("precision", "stages"), [("bf16", [0, 3]), *slow])
def test_weights_in_16_bits_on_two_ranks_all_move_in_small_steps(precision, stages):
    run_distributed_test(train_16_bits_on_ranks, 2, precision, stages)


class Positions(torch.nn.Module):
    """A layer, and an input that bfloat16 would round to 1004."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def embed(self, x):
        return self.layer(x)

    def forward(self, x, position, *, more):
        assert position.item() == 1003.0
        assert more["position"].item() == 1003.0
        return self.embed(x)


def pass_a_position(backend, stage, cast_inputs):
    """Call the model in bf16 with inputs in float32."""
    trainer = start(
        Positions(),
        **BF16,
        train_batch_size=2,
        engine={"backend": backend, "cast_inputs": cast_inputs},
        zero_optimization={"stage": stage},
    )
    position = torch.tensor(1003.0)
    inputs = torch.ones(1, 4)
    call = functools.partial(trainer, position=position, more={"position": position})
    assert call(inputs.bfloat16()).dtype == torch.bfloat16
    if not cast_inputs:
        with pytest.raises(RuntimeError, match="dtype"):
            call(inputs)
        return
    trainer.backward(call(inputs).float().mean())
    assert trainer.step()
    assert trainer.embed(inputs).dtype == torch.bfloat16
    trainer.destroy()


def pass_positions(backend, stages):
    for stage in stages:
        for cast_inputs in (True, False):
            pass_a_position(backend, stage, cast_inputs)


@pytest.mark.parametrize(
    ("backend", "stages"),
    [
        ("torch", [1, 3]),
        pytest.param("deepspeed", [0, 3], marks=pytest.mark.slow),
    ],
)
def test_cast_inputs_casts_the_inputs_of_layers_but_not_those_of_the_model(backend, stages):
    run_distributed_test(pass_positions, 2, backend, stages)


def test_convert_to_float32_converts_states_and_gradients_of_trained_parameters():
    frozen, trained = (torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = torch.optim.Adam([frozen, trained])
    for parameter in (frozen, trained):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    frozen.requires_grad_(False)
    steps = optimizer.state[trained]["step"]
    assert convert_to_float32([frozen, trained], optimizer) == torch.bfloat16
    for parameter, dtype in ((frozen, torch.bfloat16), (trained, torch.float32)):
        state = optimizer.state[parameter]
        tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        assert {each.dtype for each in tensors} == {dtype}
    assert optimizer.state[trained]["step"] is steps
    optimizer.step()
    assert convert_to_float32([frozen, trained], optimizer) is None
