"""Activation checkpointing and torch.compile on PyTorch: the same update by another way."""

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


def after_updates(net=Net, **changes):
    torch.manual_seed(0)
    config = {"train_batch_size": 8, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    trainer, *_ = engine.initialize(config=config | changes, model=net())
    Block.runs = 0
    for _ in range(2):
        trainer.backward(trainer(torch.ones(8, 4)).pow(2).mean())
        trainer.step()
    return [p.detach().clone() for p in trainer.module.parameters()], Block.runs


@pytest.mark.parametrize("on_host", [False, True])
def test_blocks_are_computed_again_and_come_to_the_same_update(on_host):
    plain, runs = after_updates()
    section = {"activation_checkpointing": {"cpu_checkpointing": on_host}}
    again, twice = after_updates(**section)
    assert (runs, twice) == (6, 12)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_a_model_without_blocks_says_what_to_name():
    with pytest.raises(ValueError, match=r'name their classes in "engine": \{"wrap"'):
        after_updates(lambda: torch.nn.Linear(4, 4), activation_checkpointing={})
    chosen = {"wrap": ["Linear"]}
    after_updates(lambda: torch.nn.Linear(4, 4), activation_checkpointing={}, engine=chosen)


def test_a_compiled_model_comes_to_the_same_update():
    plain, _ = after_updates()
    compiled, _ = after_updates(engine={"compile": "eager"})
    torch.testing.assert_close(plain, compiled)


def test_a_compiler_that_there_is_not_is_known_at_the_start():
    with pytest.raises(ValueError, match=r"`engine\.compile` must be one of .*inductor.*'indctor'"):
        after_updates(engine={"compile": "indctor"})
