"""Evaluation: exact means over a dataset on any number of ranks; training is not affected."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Sampler,
    TensorDataset,
)

import engine
from tests.testing.distributed import run_distributed_test
from tests.testing.small_model import copy_parameters
from tests.testing.small_model import start as start_fsdp

DATA = TensorDataset(torch.arange(10.0).reshape(5, 2))
MEAN = 4.5


class Net(nn.Module):
    """A model with dropout, a trained BatchNorm and a frozen one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.frozen = nn.BatchNorm1d(4).eval().requires_grad_(False)
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.frozen(self.body(x)))


CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "AdamW"},
    "engine": {"backend": "torch"},
}


def start(model=None, **sections):
    return engine.initialize(model=model or Net(), config=CONFIG | sections)[0]


def compute_mean(batch):
    """Return the mean over a batch of the data itself."""
    return batch[0].mean()


# --- One process


def test_evaluate_weights_batches_by_their_samples():
    trainer = start()
    assert trainer.evaluate(DataLoader(DATA, 2), compute_mean) == MEAN
    metrics = {"mean": MEAN, "first": 0.2}

    def compute_metrics(batch):
        return {"mean": compute_mean(batch), "first": float((batch[0] == 0).any(1).float().mean())}

    assert trainer.evaluate(DataLoader(DATA, 2), compute_metrics) == pytest.approx(metrics)


def test_evaluate_with_a_count_weights_by_it():
    trainer = start()
    tokens = [(1.0, 3), (torch.tensor(2.0), torch.tensor(1)), (math.nan, 0)]
    assert trainer.evaluate(tokens, lambda batch: batch) == 1.25
    assert trainer.evaluate(tokens, lambda batch: ({"loss": batch[0]}, batch[1])) == {"loss": 1.25}


def test_evaluate_runs_in_eval_mode_without_gradients_in_the_precision_of_the_run():
    trainer = start(bf16={"enabled": True})

    def check(batch):
        assert not any(module.training for module in trainer.modules())
        assert not torch.is_grad_enabled()
        output = trainer(batch[0])
        assert output.dtype == torch.bfloat16
        assert torch.equal(output, trainer(batch[0]))
        return output.mean()

    assert isinstance(trainer.evaluate(DataLoader(DATA, 2), check), float)


def test_evaluate_restores_the_mode_of_each_module_even_after_an_exception():
    trainer = start()
    trainer.module.body[2].eval()
    before = [module.training for module in trainer.modules()]
    assert set(before) == {True, False}
    trainer.evaluate(DataLoader(DATA, 2), compute_mean)
    assert [module.training for module in trainer.modules()] == before
    with pytest.raises(ZeroDivisionError):
        trainer.evaluate(DataLoader(DATA, 2), lambda batch: 1 / 0)
    assert [module.training for module in trainer.modules()] == before
    assert torch.is_grad_enabled()


def test_evaluate_with_a_module_that_overrides_train_calls_it_again():
    class LoRA(nn.Linear):
        is_merged = False

        def train(self, mode=True):
            self.is_merged = not mode
            return super().train(mode)

    trainer = start(nn.Sequential(LoRA(2, 2)))
    trainer.evaluate([torch.ones(1, 2)], lambda x: float(trainer.module[0].is_merged))
    assert not trainer.module[0].is_merged


def test_evaluate_accumulates_16_bit_losses_in_double_precision():
    ones = [torch.ones(1, dtype=torch.bfloat16)] * 1000  # a sum in bfloat16 stops at 256
    assert start().evaluate(ones, torch.mean) == 1.0


def test_evaluate_of_a_nan_loss_returns_nan():
    assert math.isnan(start().evaluate([torch.ones(1), torch.tensor([math.nan])], torch.mean))


@pytest.mark.parametrize(
    ("loader", "fn", "message"),
    [
        ([], compute_mean, "`loader` must yield at least one sample, got 0. Check the dataset"),
        ([torch.ones(3)], lambda x: x, "one number for the loss, got a tensor of shape (3,)"),
        ([torch.ones(3)], lambda x: {"loss": x}, "one number for `loss`, got a tensor of shape"),
        ([torch.ones(3)], lambda x: None, "one number for the loss, got None. Return"),
        ([torch.ones(3)], lambda x: (1.0, x), "one number for the number of samples, got"),
        ([torch.ones(3)], lambda x: (1.0, -1), "a number of samples >= 0, got -1"),
        ([["text"]], lambda x: 1.0, "not contain a tensor. Return `(metrics, number_of_samples)`"),
    ],
)
def test_evaluate_with_invalid_results_raises(loader, fn, message):
    with pytest.raises(ValueError) as error:
        start().evaluate(loader, fn)
    assert message in str(error.value)


def test_evaluate_on_the_training_loader_raises():
    trainer, _, loader, _ = engine.initialize(model=Net(), config=CONFIG, training_data=DATA)
    with pytest.raises(ValueError, match="must not be the training loader"):
        trainer.evaluate(loader, compute_mean)
    assert trainer.epoch == 0


def test_gather_in_one_process_returns_detached_rows():
    weight = nn.Parameter(torch.ones(()))
    gathered = start().gather({"a": (weight, torch.ones(2, 3))})
    assert gathered["a"][0].shape == (1,)
    assert not gathered["a"][0].requires_grad
    assert gathered["a"][1].shape == (2, 3)
    with pytest.raises(ValueError, match="only tensors, got 3. Convert"):
        start().gather([3])


# --- Several ranks


def train(backend, stage, *, evaluates):
    """Train two steps with or without evaluations at every point; return the weights and losses."""
    trainer = start(engine={"backend": backend}, zero_optimization={"stage": stage})
    x = torch.ones(2, 2) * (trainer.global_rank + 1)
    results = []

    def evaluate():
        torch.rand(trainer.global_rank)
        if evaluates:
            seen = []

            def compute_loss(batch):
                seen.append(trainer.gather(batch[0]))
                return trainer(batch[0]).pow(2).mean()

            loader = DataLoader(DATA, 2, shuffle=True)
            results.append(trainer.evaluate(loader, compute_loss))
            rows = torch.cat(seen)[:, 0].tolist()
            assert sorted(rows) == [0, 2, 4, 6, 8], rows

    for _ in range(4):
        evaluate()
        loss = trainer(x).pow(2).mean()
        evaluate()
        trainer.backward(loss)
        evaluate()
        trainer.step()
    weights = [weight.tolist() for weight in copy_parameters(trainer)]
    return weights, [each.tolist() for each in trainer.module.buffers()], results


def check_training_is_unchanged(backend):
    for stage in range(4):
        expected = train(backend, stage, evaluates=False)
        weights, buffers, losses = train(backend, stage, evaluates=True)
        assert (weights, buffers) == expected[:2], stage
        assert len(set(losses)) > 1  # the weights have changed


@pytest.mark.parametrize("backend", ["torch", "deepspeed"])
def test_evaluate_changes_nothing_in_the_training(backend):
    run_distributed_test(check_training_is_unchanged, 2, backend)


class Numbers(Dataset):
    """The numbers from ``start`` to ``start + size - 1``, as tensors."""

    def __init__(self, size, start=0):
        self.size, self.start = size, start

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return torch.tensor([float(self.start + index)])


class Noise(Numbers):
    """The same numbers; the samples also contain random numbers, as with augmentation."""

    def __getitem__(self, index):
        return super().__getitem__(index), torch.rand(1)


class Stream(IterableDataset):
    def __init__(self, *numbers):
        self.numbers = numbers

    def __iter__(self):
        return (torch.tensor([float(number)]) for number in self.numbers)


class EvenFirst(Sampler):
    def __iter__(self):
        return iter([0, 2, 4, 1, 3])


def batches(*sizes, start=0):
    return [torch.full((size, 1), float(start + index)) for index, size in enumerate(sizes)]


# For each kind of loader: the loader of each of two ranks, the numbers that count, and how many
# numbers rank 0 passes to the model, including those that it repeats.
LOADERS = {
    "plain": (lambda rank: DataLoader(Numbers(5), 2), [0, 1, 2, 3, 4], 3),
    "shuffled": (lambda rank: DataLoader(Numbers(5), 2, shuffle=True), [0, 1, 2, 3, 4], 3),
    "workers": (
        lambda rank: DataLoader(Numbers(3), 1, num_workers=1, multiprocessing_context="fork"),
        [0, 1, 2],
        2,
    ),
    "drop_last": (lambda rank: DataLoader(Numbers(5), 2, drop_last=True), [0, 1, 2, 3], 2),
    "distributed sampler": (
        lambda rank: DataLoader(
            Numbers(5), 2, sampler=DistributedSampler(Numbers(5), shuffle=False)
        ),
        [0, 1, 2, 3, 4],
        3,
    ),
    "one batch": (lambda rank: DataLoader(Numbers(1), 2), [0], 1),
    "own datasets of equal size": (
        lambda rank: DataLoader(Numbers(3, start=3 * rank), 2),
        [0, 1, 2, 3, 4, 5],
        3,
    ),
    "own datasets": (lambda rank: DataLoader(Numbers(3 - rank), 2), [0, 1, 2, 0, 1], 3),
    "random transform": (lambda rank: DataLoader(Noise(2), 1), [0, 1], 1),
    "sampler": (
        lambda rank: DataLoader(Numbers(5), 2, sampler=EvenFirst()),
        [0, 1, 2, 3, 4] * 2,
        5,
    ),
    "stream": (lambda rank: DataLoader(Stream(1, 2, 3) if rank else Stream(4), 2), [1, 2, 3, 4], 2),
    "list": (lambda rank: batches(2, 1, start=2) if rank else batches(3), [0, 0, 0, 2, 2, 3], 6),
    "generator": (lambda rank: iter([] if rank else batches(2, 2, 1)), [0, 0, 1, 1, 2], 5),
}


def evaluate_all_loaders():
    trainer = start_fsdp(zero_optimization={"stage": 3})  # forward passes gather parameters
    results = {}
    seen, passed = [], []

    def compute_mean(batch):
        numbers = batch[0] if isinstance(batch, list) else batch
        trainer(torch.ones(1, 6))
        seen.append(trainer.gather(numbers))
        passed.append(numbers)
        return numbers.mean()

    for name, (build, *_) in LOADERS.items():
        seen.clear()
        passed.clear()
        torch.manual_seed(trainer.global_rank)
        mean = trainer.evaluate(build(trainer.global_rank), compute_mean)
        results[name] = mean, torch.cat(seen).flatten().tolist(), len(torch.cat(passed))
    with pytest.raises(ValueError, match="at least one sample"):
        trainer.evaluate(DataLoader(Numbers(0), 2), compute_mean)
    return results


@pytest.fixture(scope="module")
def evaluated():
    return run_distributed_test(evaluate_all_loaders, 2)


@pytest.mark.parametrize("name", LOADERS)
def test_evaluate_on_two_ranks_counts_each_sample_once(evaluated, name):
    _, numbers, passed = LOADERS[name]
    (mean, seen, passed_on_first), second = (rank[name] for rank in evaluated)
    assert second[:2] == (mean, seen)
    assert mean == pytest.approx(sum(numbers) / len(numbers), rel=1e-12)
    assert sorted(seen) == sorted(numbers)
    assert passed_on_first == passed


def test_gather_in_evaluate_keeps_the_order_of_the_dataset(evaluated):
    assert evaluated[0]["plain"][1] == [0, 1, 2, 3, 4]


def evaluate_on_ranks():
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(50, 2))
    trainer = start()

    def compute_loss(batch):
        return trainer(batch[0]).pow(2).mean()

    return trainer.evaluate(DataLoader(data, 4), compute_loss)


def test_evaluate_is_equal_on_any_number_of_ranks():
    one = run_distributed_test(evaluate_on_ranks, 1)
    assert run_distributed_test(evaluate_on_ranks, 3) == one * 3


def gather_everything():
    trainer = start()
    rank = trainer.global_rank
    value = {
        "uneven": torch.arange(2.0).expand(rank + 1, 2).T.contiguous().T + rank,
        "scalar": (torch.tensor(rank), [torch.tensor(rank == 1)]),
        "bf16": torch.full((1, 2), rank + 0.5, dtype=torch.bfloat16),
        "complex": torch.full((rank,), 1j),
        "empty": torch.empty(0, 3),
    }
    gathered = trainer.gather(value)
    assert gathered["uneven"].tolist() == [[0, 1], [1, 2], [1, 2]]
    assert gathered["scalar"][0].tolist() == [0, 1]
    assert gathered["scalar"][1][0].tolist() == [False, True]
    assert gathered["bf16"].dtype == torch.bfloat16
    assert gathered["bf16"].tolist() == [[0.5, 0.5], [1.5, 1.5]]
    assert gathered["complex"].tolist() == [1j]
    assert gathered["empty"].shape == (0, 3)
    with pytest.raises(ValueError, match=r"shape .*got .*\(1, 3\).* Pad or convert"):
        trainer.gather(torch.ones(1, 2 + rank))
    with pytest.raises(ValueError, match="same dtype on every rank"):
        trainer.gather(torch.ones(1, dtype=torch.float64 if rank else torch.float32))


def test_gather_concatenates_uneven_tensors_of_every_dtype():
    run_distributed_test(gather_everything, 2)
