"""The guide to losses weighted by tokens: on any number of ranks, each token counts once."""

import pytest
import torch
from torch.nn import functional

import engine
from tests.docs.snippets import ROOT, read_blocks
from tests.testing.distributed import run_distributed_test

IGNORED = -100
CONFIG = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 0,
    "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
}


def build_batch():
    """Build 16 sequences of 1 to 5 tokens, padded to 5."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(16, 5, 3, generator=generator)
    labels = torch.randint(2, (16, 5), generator=generator)
    lengths = torch.randint(1, 6, (16, 1), generator=generator)
    return inputs, labels.where(torch.arange(5) < lengths, IGNORED)


def build_model():
    model = torch.nn.Linear(3, 2)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    return model


def train_with_the_guide():
    guide = ROOT / "docs" / "guides" / "token_weighted_loss.md"
    namespace = {"nn": torch.nn}
    first = next(block for block in read_blocks(guide) if block.language == "python")
    exec(first.text, namespace)
    dataset = torch.utils.data.TensorDataset(*build_batch())
    trainer, _, loader, _ = engine.initialize(
        config=CONFIG, model=build_model(), training_data=dataset
    )
    namespace["train_epoch"](trainer, loader)
    assert trainer.global_steps == 1
    return trainer.module.weight.detach()


def take_step(compute_loss):
    """Return the weights after one step on the whole batch."""
    model = build_model()
    inputs, labels = build_batch()
    compute_loss(model(inputs), labels).backward()
    return (model.weight - model.weight.grad).detach()


def mean_over_tokens(logits, labels):
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def mean_over_samples(logits, labels):
    losses = [mean_over_tokens(logits[k : k + 1], labels[k : k + 1]) for k in range(len(labels))]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("ranks", [1, 2])
def test_loss_of_the_guide_counts_each_token_once(ranks):
    expected = take_step(mean_over_tokens)
    assert not torch.allclose(expected, take_step(mean_over_samples), rtol=0.01)
    for weights in run_distributed_test(train_with_the_guide, ranks):
        torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)
