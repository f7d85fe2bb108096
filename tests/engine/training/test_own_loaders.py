"""Data loaders of the user's own: batch sizes, order, ranks, workers and positions."""

import random
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    WeightedRandomSampler,
    get_worker_info,
)

import engine
from engine import MisuseError
from engine.training.rng import seed_rng
from tests.testing.distributed import run_distributed_test

SAMPLES, MICRO = 22, 2


class Numbers(Dataset):
    """Yields the index of each sample and random numbers, as an augmentation would draw them."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        noise = torch.rand(1).item() + random.random() + np.random.rand()  # noqa: NPY002
        return torch.tensor([float(index), noise])


class Stream(IterableDataset):
    """Splits its samples across ranks and workers."""

    def __iter__(self):
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        info = get_worker_info()
        if info is not None:
            rank, size = rank + size * info.id, size * info.num_workers
        for index in range(rank, SAMPLES, size):
            yield torch.tensor([float(index), torch.rand(1).item()])


class Copies(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(2.0 * SAMPLES).view(SAMPLES, 2))


class SizedStream(Stream):
    def __len__(self):
        return SAMPLES


class StatefulLoader:
    """A stand-in for torchdata's StatefulDataLoader, with a fixed random order."""

    batch_size = MICRO

    def __init__(self):
        self.generator = torch.Generator().manual_seed(5)
        self.order, self.position = [], 0

    def __iter__(self):
        if not self.order:
            self.order = torch.randperm(SAMPLES, generator=self.generator).tolist()
        while self.position < SAMPLES:
            start, self.position = self.position, self.position + MICRO
            yield torch.tensor([[float(i), 0.0] for i in self.order[start : start + MICRO]])
        self.order, self.position = [], 0

    def state_dict(self):
        return {**vars(self), "generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])
        self.order, self.position = state["order"], state["position"]


class ReversedOnOddEpochs(Sampler):
    def __init__(self):
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return SAMPLES

    def __iter__(self):
        return iter(range(SAMPLES)[:: -1 if self.epoch % 2 else 1])


class Endless(Sampler):
    def __iter__(self):
        while True:
            yield 0


def shuffled(**settings):
    return DataLoader(Numbers(), MICRO, shuffle=True, **settings)


def distributed():
    if not dist.is_initialized():
        return DataLoader(Numbers(), MICRO, sampler=DistributedSampler(Numbers(), 1, 0))
    return DataLoader(Numbers(), MICRO, sampler=DistributedSampler(Numbers()))


def with_global_randomness():
    return DataLoader(
        Numbers(), batch_sampler=BatchSampler(RandomSampler(Numbers()), MICRO, drop_last=False)
    )


def weighted():
    generator = torch.Generator().manual_seed(3)
    sampler = WeightedRandomSampler(torch.ones(SAMPLES), SAMPLES, generator=generator)
    return DataLoader(Numbers(), MICRO, sampler=sampler)


def with_own_batches():
    batches = [[2 * (i * 7 % 11), 2 * (i * 7 % 11) + 1] for i in range(11)]
    return DataLoader(Numbers(), batch_sampler=batches)


LOADERS = {
    "shuffled": shuffled,
    # The fork server of the ranks' tests would start its workers in a new fork server.
    "two_workers": lambda: shuffled(num_workers=2, multiprocessing_context="fork"),
    "persistent_workers": lambda: shuffled(num_workers=2, persistent_workers=True),
    "sequential": lambda: DataLoader(Numbers(), MICRO, drop_last=True),
    "distributed": distributed,
    "global_randomness": with_global_randomness,
    "weighted": weighted,
    "own_batches": with_own_batches,
    "set_epoch": lambda: DataLoader(Numbers(), MICRO, sampler=ReversedOnOddEpochs()),
    "stream": lambda: DataLoader(Stream(), MICRO),
    "stream_with_workers": lambda: DataLoader(Stream(), MICRO, num_workers=2),
    "stateful": StatefulLoader,
}


def start(training_data=None, directory=None, micro=MICRO, accumulation=1, **section):
    if directory is not None:
        section["checkpoint"] = {"dir": str(directory), "every": 1}
    config = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "SGD", "params": {"lr": 0.01}},
        "engine": section,
    }
    model = torch.nn.Linear(2, 1)
    return engine.initialize(config=config, model=model, training_data=training_data)[0]


def train(trainer, micro_batches, epochs=3):
    """Train, and return the samples of each micro-batch."""
    seen = []
    for _ in range(trainer.epoch, epochs):
        for x in trainer.training_dataloader:
            trainer.backward(trainer(x).pow(2).mean())
            trainer.step()
            seen.append(x.tolist())
            if len(seen) == micro_batches:
                return seen
    return seen


def run_with_a_cut(kind, directory, cut, prepares=True):
    """Return the samples of a whole run, and those before and after a cut."""

    def run(micro_batches, seed, directory=None):
        seed_rng(str(seed))
        trainer = start(None if prepares else LOADERS[kind](), directory)
        if prepares:
            trainer.prepare(LOADERS[kind]())
        seen = train(trainer, micro_batches)
        trainer.destroy()
        return seen

    whole, head = run(20, 0), run(cut, 0, directory)
    return whole, head, run(20 - cut, 1, directory)


@pytest.mark.parametrize("kind", list(LOADERS))
def test_own_loader_after_a_cut_continues_with_the_same_samples(tmp_path, kind):
    whole, head, tail = run_with_a_cut(kind, tmp_path, 14, prepares=kind != "shuffled")
    assert len(whole) == 20
    assert head == whole[:14]
    assert tail == whole[14:]


def find_global_steps(ranks, accumulation=1):
    """Return the sorted samples of each step, over ranks and micro-batches."""
    steps = range(0, len(ranks[0]), accumulation)
    return [
        sorted(int(x[0]) for rank in ranks for batch in rank[i : i + accumulation] for x in batch)
        for i in steps
    ]


def train_on_rank(kind, directory, *parts):
    """Train with a cut between the parts; each part is a number of micro-batches."""
    seen = []
    for number, micro_batches in enumerate(parts):
        seed_rng(str(number))
        trainer = start(directory=directory)
        trainer.prepare(LOADERS[kind]())
        seen += train(trainer, micro_batches)
        trainer.destroy()
    return seen


@pytest.mark.parametrize("kind", ["two_workers", "distributed", "own_batches", "stream"])
def test_own_loader_on_two_ranks_splits_the_samples_and_continues_after_a_cut(tmp_path, kind):
    whole = run_distributed_test(train_on_rank, 2, kind, None, 12)
    cut = run_distributed_test(train_on_rank, 2, kind, tmp_path, 7, 5)
    first_epoch = find_global_steps([rank[:5] for rank in whole])
    seen = [sample for step in first_epoch for sample in step]
    assert len(set(seen)) == len(seen) == 20
    assert find_global_steps(cut) == find_global_steps(whole)
    if kind == "two_workers":
        assert cut == whole


def test_own_loader_global_batches_do_not_depend_on_the_number_of_ranks():
    one_rank = train(start(shuffled(), accumulation=2), 20)
    two_ranks = run_distributed_test(train_on_rank, 2, "shuffled", None, 10)
    assert find_global_steps(two_ranks) == find_global_steps([one_rank], accumulation=2)


@pytest.mark.parametrize("kind", ["shuffled", "global_randomness", "weighted"])
def test_own_loader_draws_a_new_order_for_each_epoch(kind):
    steps = find_global_steps([train(start(LOADERS[kind]()), 22)])
    assert steps[:11] != steps[11:]


class StatefulStream:
    """Saves a different position on each rank."""

    def __init__(self):
        self.position = 0

    def __iter__(self):
        while self.position < SAMPLES // 2:
            self.position += 1
            yield torch.full((MICRO, 2), 100.0 * dist.get_rank() + self.position)
        self.position = 0

    def state_dict(self):
        return {"position": self.position, "rank": torch.tensor(dist.get_rank())}

    def load_state_dict(self, state):
        assert state["rank"] == dist.get_rank()
        self.position = state["position"]


LOADERS["stateful_stream"] = StatefulStream


def test_stateful_loader_on_two_ranks_restores_the_state_of_each_rank(tmp_path):
    ranks = run_distributed_test(train_on_rank, 2, "stateful_stream", tmp_path, 4, 3)
    assert find_global_steps([ranks[0]]) == [[i, i] for i in range(1, 8)]
    assert find_global_steps([ranks[1]]) == [[100 + i] * 2 for i in range(1, 8)]


class OtherOrderPerRank(ReversedOnOddEpochs):
    def __iter__(self):
        return iter(range(SAMPLES)[:: -1 if dist.get_rank() else 1])


class MapStyleStatefulLoader(StatefulLoader):
    dataset, sampler = Numbers(), SequentialSampler(Numbers())


def read_error(kind):
    loaders = {
        "order": lambda: DataLoader(Numbers(), MICRO, sampler=OtherOrderPerRank()),
        "shard": lambda: DataLoader(Numbers(), MICRO, sampler=DistributedSampler(Numbers(), 3, 0)),
        "stateful": MapStyleStatefulLoader,
        "stream": lambda: DataLoader(Copies(), MICRO),
    }
    trainer = start()
    try:
        train(_prepare(trainer, loaders[kind]()), 10)
    except ValueError as error:
        return str(error)
    except RuntimeError:  # the other rank has failed
        return ""


def _prepare(trainer, loader):
    trainer.prepare(loader)
    return trainer


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("order", "in the same order on all ranks"),
        ("shard", "must yield the samples of rank 1 of 2, got the samples of rank 0 of 3"),
        ("stateful", "Create it with `sampler=DistributedSampler(dataset)`"),
        ("stream", "and another rank load the same batches"),
    ],
)
def test_loader_that_does_not_split_its_samples_across_ranks_raises(kind, message):
    assert any(message in error for error in run_distributed_test(read_error, 2, kind))


def test_iterable_dataset_that_does_not_split_its_samples_across_workers_raises():
    trainer = start(DataLoader(Copies(), MICRO, num_workers=2))
    with pytest.raises(ValueError, match="All 2 workers of the data loader load the same"):
        train(trainer, 10)


def test_constant_data_is_not_taken_for_repeated_batches():
    class Ones(IterableDataset):
        def __iter__(self):
            return iter(torch.ones(SAMPLES, 2))

    assert len(train(start(DataLoader(Ones(), MICRO, num_workers=2)), 20)) == 20


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (
            lambda: DataLoader(Numbers(), 3),
            r"must equal `train_micro_batch_size_per_gpu` \(2\), got 3",
        ),
        (
            lambda: DataLoader(
                Numbers(), batch_sampler=BatchSampler(SequentialSampler(Numbers()), 5, False)
            ),
            r"`train_micro_batch_size_per_gpu` \(2\), got 5",
        ),
        (lambda: DataLoader(Numbers(), MICRO, sampler=Endless()), "Endless must have a length"),
        (Numbers, "must be a torch DataLoader"),
        (lambda: [torch.ones(2, 2)], "must be a torch DataLoader"),
        (lambda: iter([torch.ones(2, 2)]), "must be a torch DataLoader"),
    ],
)
def test_prepare_of_an_unsuitable_loader_raises(loader, message):
    with pytest.raises(ValueError, match=message):
        start().prepare(loader())


def test_own_loader_with_settings_for_a_dataset_raises():
    with pytest.raises(ValueError, match=r"`engine\.dataloader` applies only to a dataset"):
        start(shuffled(), dataloader={"num_workers": 1})
    config = {"train_batch_size": MICRO, "optimizer": {"type": "SGD"}}
    with pytest.raises(ValueError, match="`collate_fn` applies only to a dataset"):
        engine.initialize(
            config=config, model=torch.nn.Linear(2, 1), training_data=shuffled(), collate_fn=list
        )


def test_prepare_of_a_second_loader_raises():
    trainer = start(Numbers())
    assert trainer.prepare(trainer.training_dataloader) is trainer.training_dataloader
    with pytest.raises(MisuseError, match=r"Pass evaluation loaders to `trainer\.evaluate`"):
        trainer.prepare(shuffled())


@pytest.mark.parametrize(
    "loader", [shuffled, lambda: DataLoader(SizedStream(), MICRO)], ids=["shuffled", "stream"]
)
def test_prepare_sets_a_length_in_epochs(loader):
    trainer = start(max_duration="2ep")
    trainer.prepare(loader())
    assert len(train(trainer, 100, epochs=5)) == 22
    assert trainer.run_is_over


def test_own_loader_passed_to_initialize_sets_the_schedule_in_epochs():
    config = {
        "train_batch_size": MICRO,
        "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_num_steps": "1ep", "warmup_type": "linear"},
        },
    }
    model = torch.nn.Linear(2, 1)
    trainer, *_ = engine.initialize(config=config, model=model, training_data=shuffled())
    train(trainer, 10)
    assert trainer.get_lr()[0] < 1.0
    train(trainer, 1)
    assert trainer.get_lr() == [1.0]
    with pytest.raises(ValueError, match="a dataset or a data loader"):
        engine.initialize(config=config, model=model)


def test_loop_after_a_resume_of_unknown_length_raises_with_a_prepared_loader(tmp_path):
    trainer = start(shuffled(), tmp_path)
    train(trainer, 12)
    resumed = start(directory=tmp_path)
    loader = resumed.prepare(shuffled())
    with pytest.raises(MisuseError, match=r"trainer\.epoch.*engine\.max_duration"):
        next(iter(loader))


@pytest.mark.parametrize("saves_loader", [False, True])
def test_resume_without_a_loader_warns_that_the_position_is_not_restored(
    tmp_path, caplog, saves_loader
):
    def step(trainer):
        trainer.backward(trainer(torch.ones(MICRO, 2)).mean())
        trainer.step()

    step(start(shuffled() if saves_loader else None, tmp_path))
    resumed = start(directory=tmp_path)
    step(resumed)
    step(resumed)
    warnings_ = [
        record.message for record in caplog.records if "position in the data" in record.message
    ]
    assert len(warnings_) == 1


def test_prepared_loader_leaves_the_loader_and_the_random_state_unchanged():
    loader = DataLoader(torch.ones(SAMPLES, 2), MICRO, sampler=weighted().sampler)
    before = loader.sampler.generator.get_state()
    prepared = start().prepare(loader)
    seed_rng("0")
    expected = torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
    seed_rng("0")
    assert len(list(prepared)) == len(prepared) == 11
    assert (torch.rand(1), random.random(), np.random.rand()) == expected  # noqa: NPY002
    assert torch.equal(loader.sampler.generator.get_state(), before)
    assert prepared.dataset is loader.dataset


def test_dataset_with_pinned_memory_and_workers_does_not_warn_on_the_cpu():
    settings = {"num_workers": 1, "pin_memory": True, "prefetch_factor": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(train(start(Numbers(), dataloader=settings), 20)) == 20
        assert len(train(start(shuffled(pin_memory=True)), 20)) == 20


def test_dataset_without_shuffle_keeps_its_order():
    seen = train(start(Numbers(), dataloader={"shuffle": False}), 11)
    assert find_global_steps([seen]) == [[i, i + 1] for i in range(0, SAMPLES, 2)]
    with pytest.raises(ValueError, match=r"`engine\.dataloader\.shuffle` has no effect"):
        start(Stream(), dataloader={"shuffle": True})


def test_random_numbers_of_workers_do_not_depend_on_their_number():
    def run(workers):
        settings = {"num_workers": workers, "persistent_workers": workers == 2}
        trainer = start(Numbers(), dataloader=settings)
        seen = train(trainer, 20)
        trainer.destroy()
        return seen

    seen = run(1)
    assert run(2) == seen
    assert len({noise for batch in seen for _, noise in batch}) == 40
