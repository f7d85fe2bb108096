"""Activation checkpointing and torch.compile on PyTorch leave the steps unchanged."""

import pytest
import torch

import engine


class Block(torch.nn.Module):
    runs = 0

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, x):
        Block.runs += 1
        return torch.nn.functional.dropout(self.layer(x).relu(), 0.5, training=self.training)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def train_two_steps(net=Net, **changes):
    torch.manual_seed(0)
    config = {"train_batch_size": 8, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    trainer, *_ = engine.initialize(config=config | changes, model=net())
    Block.runs = 0
    for _ in range(2):
        trainer.backward(trainer(torch.ones(8, 4)).pow(2).mean())
        trainer.step()
    return [p.detach().clone() for p in trainer.module.parameters()], Block.runs


@pytest.mark.parametrize("on_host", [False, True])
def test_activation_checkpointing_recomputes_blocks_and_takes_the_same_steps(on_host):
    plain, runs = train_two_steps()
    section = {"activation_checkpointing": {"cpu_checkpointing": on_host}}
    checkpointed, more_runs = train_two_steps(**section)
    assert (runs, more_runs) == (6, 12)
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))


def test_activation_checkpointing_without_blocks_warns_unless_wrap_is_set(caplog):
    section = {"partition_activations": False, "cpu_checkpointing": False}
    train_two_steps(lambda: torch.nn.Linear(4, 4), activation_checkpointing=section)
    assert "`engine.wrap`" in caplog.text
    caplog.clear()
    wrap = {"wrap": ["Linear"]}
    train_two_steps(lambda: torch.nn.Linear(4, 4), activation_checkpointing=section, engine=wrap)
    assert "has no effect, because" not in caplog.text
    with pytest.raises(ValueError, match=r"`engine\.wrap` must name classes.*got \['Nonsense'\]"):
        train_two_steps(activation_checkpointing=section, engine={"wrap": ["Linear", "Nonsense"]})


def test_compile_takes_the_same_steps():
    plain, _ = train_two_steps()
    compiled, _ = train_two_steps(engine={"compile": "eager"})
    torch.testing.assert_close(plain, compiled)


def test_compile_with_an_unknown_backend_raises():
    with pytest.raises(ValueError, match=r"`engine\.compile` must be one of .*inductor.*'indctor'"):
        train_two_steps(engine={"compile": "indctor"})
