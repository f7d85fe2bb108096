"""`Engine.batches`, reported metrics, the best checkpoint and early stopping."""

import itertools
import logging
import math
import os

import pytest
import torch
from torch.utils.data import IterableDataset

import engine
from engine import MisuseError
from engine.checkpoint import storage
from tests.engine.test_run_ends import BATCH, STEPS_PER_EPOCH, build_data
from tests.testing.distributed import run_distributed_test


def start(directory=None, data=None, scheduler=None, batch=BATCH, accumulation=1, **section):
    torch.manual_seed(0)
    if directory is not None:
        plan = {"dir": str(directory), "every": 3} | section.get("checkpoint", {})
        section["checkpoint"] = plan
    config = {
        "train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "SGD", "params": {"lr": 0.01}},
        "engine": section,
    }
    if scheduler is not None:
        config["scheduler"] = scheduler
    model = torch.nn.Linear(2, 1)
    return engine.initialize(config=config, model=model, training_data=data or build_data())[0]


def train(trainer, stop_at=math.inf):
    """Train on `batches` and return their sums; leave the loop at a number of steps."""
    seen = []
    for (x,) in trainer.batches():
        trainer.backward(trainer(x).pow(2).mean())
        trainer.step()
        seen.append(x.sum().item())
        if trainer.global_steps == stop_at:
            break
    return seen


def test_batches_end_at_max_duration():
    trainer = start(max_duration="2ep")
    assert len(train(trainer)) == 2 * STEPS_PER_EPOCH
    assert trainer.run_is_over


def test_batches_end_with_the_schedule_if_the_run_has_no_length():
    cycle = {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1, "cycle_first_step_size": 5}
    trainer = start(scheduler={"type": "OneCycle", "params": cycle | {"cycle_momentum": False}})
    train(trainer)
    assert trainer.global_steps == 10
    assert trainer.get_lr() == [0.01]


@pytest.mark.parametrize(
    ("scheduler", "cause"), [(None, "`scheduler`"), ({"type": "WarmupLR"}, "WarmupLR")]
)
def test_batches_without_a_length_are_an_error(scheduler, cause):
    trainer = start(scheduler=scheduler)
    with pytest.raises(MisuseError, match=f"{cause}.*`engine.max_duration`"):
        trainer.batches()


def test_batches_without_data_are_an_error():
    config = {"train_batch_size": 4, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    trainer, *_ = engine.initialize(config=config, model=torch.nn.Linear(2, 1))
    with pytest.raises(MisuseError, match="requires training data"):
        trainer.batches()


def test_epoch_without_a_step_is_an_error():
    trainer = start(max_duration="2ep")
    with pytest.raises(
        MisuseError, match=r"epoch .* without an optimizer step.*`trainer.step\(\)`"
    ):
        list(trainer.batches())


class UnequalStream(IterableDataset):
    """A dataset with 6 samples on rank 0 and 4 on rank 1."""

    def __len__(self):
        return 6 - 2 * int(os.environ["RANK"])

    def __iter__(self):
        yield from torch.full((len(self), 1, 2), 1.0 + int(os.environ["RANK"]))


def train_on_an_unequal_stream(directory):
    decay = {"warmup_num_steps": "1ep", "total_num_steps": "3ep", "warmup_min_lr": 0}
    block = {"type": "WarmupDecayLR", "params": decay}
    section = {"checkpoint": {"every": "1ep", "keep": None}, "max_duration": "3ep"}
    trainer = start(directory, data=UnequalStream(), batch=2, scheduler=block, **section)
    lrs = []
    for (x,) in trainer.batches():
        lrs.append(trainer.get_lr())
        trainer.backward(trainer(x).pow(2).mean())
        trainer.step()
    return lrs


def test_durations_in_epochs_are_equal_on_all_ranks(tmp_path):
    first, second = run_distributed_test(train_on_an_unequal_stream, 2, tmp_path)
    assert first == second
    assert len(first) == 12
    steps = [manifest.step for _, manifest in storage.list_checkpoints(tmp_path)]
    assert steps == [4, 8, 12]


class ShortStream(IterableDataset):
    def __iter__(self):
        yield torch.ones(2)


def test_epoch_that_is_shorter_than_a_step_is_an_error():
    trainer = start(data=ShortStream(), batch=4, accumulation=4, max_duration="10ba")
    with pytest.raises(MisuseError, match="at least 4 micro-batches"):
        for x in trainer.batches():
            trainer.backward(trainer(x).pow(2).mean())
            trainer.step()


@pytest.mark.parametrize("stop_at", [1, 4, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 3])
def test_batches_continue_where_the_script_left_its_loop(stop_at):
    whole = train(start(max_duration="2ep"))
    trainer = start(max_duration="2ep")
    assert train(trainer, stop_at) + train(trainer) == whole


@pytest.mark.parametrize("stop_at", [2, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 2, 2 * STEPS_PER_EPOCH])
def test_resumed_batches_are_those_of_the_whole_run(tmp_path, stop_at):
    expected = start(max_duration="2ep")
    whole = train(expected)
    stopped = start(tmp_path, checkpoint={"every": 1}, max_duration="2ep")
    first = train(stopped, stop_at)
    resumed = start(tmp_path, checkpoint={"every": 1}, max_duration="2ep")
    assert first + train(resumed) == whole
    assert torch.equal(resumed.module.weight, expected.module.weight)


@pytest.mark.parametrize(
    ("every", "interval"),
    [("1ep", STEPS_PER_EPOCH), ("2ep", 2 * STEPS_PER_EPOCH), (f"{3 * BATCH}sp", 3), ("2ba", 2)],
)
def test_checkpoints_are_saved_at_an_interval_in_any_unit(tmp_path, every, interval):
    total = 4 * STEPS_PER_EPOCH
    trainer = start(tmp_path, checkpoint={"every": every, "keep": None}, max_duration=total)
    train(trainer)
    steps = [manifest.step for _, manifest in storage.list_checkpoints(tmp_path)]
    assert steps == sorted({*range(interval, total + 1, interval), total})


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"max_duration": "2ep"}, "engine.max_duration"),
        ({"max_duration": 9, "checkpoint": {"every": "1ep"}}, "engine.checkpoint.every"),
    ],
)
def test_durations_in_epochs_require_the_length_of_an_epoch(tmp_path, caplog, section, key):
    with pytest.raises(ValueError, match=f"`{key}` must not be in epochs"):
        start(tmp_path, data=ShortStream(), batch=1, **section)
    model = torch.nn.Linear(2, 1)
    section["checkpoint"] = {"dir": str(tmp_path)} | section.get("checkpoint", {})
    config = {"train_batch_size": 4, "engine": section}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with caplog.at_level(logging.WARNING, "onecycle"):
        trainer, *_ = engine.initialize(config=config, model=model, optimizer=optimizer)
    assert f"the run ignores `{key}` until you call `trainer.prepare(loader)`" in caplog.text
    loader = trainer.prepare(torch.utils.data.DataLoader(build_data(), batch_size=BATCH))
    train(trainer)
    expected = [STEPS_PER_EPOCH, 9] if key == "engine.checkpoint.every" else []
    assert [manifest.step for _, manifest in storage.list_checkpoints(tmp_path)] == expected
    assert loader is trainer.training_dataloader


def test_checkpoints_are_saved_every_few_steps_while_the_length_of_an_epoch_is_unknown(tmp_path):
    plan = {"checkpoint": {"dir": str(tmp_path), "every": 2, "keep": None}, "max_duration": "2ep"}
    optimizer = {"type": "SGD", "params": {"lr": 0.01}}
    config = {"train_batch_size": 1, "optimizer": optimizer, "engine": plan}
    trainer, *_ = engine.initialize(config=config, model=torch.nn.Linear(2, 1))
    for _ in range(5):
        trainer.backward(trainer(torch.ones(1, 2)).mean())
        trainer.step()
    assert [manifest.step for _, manifest in storage.list_checkpoints(tmp_path)] == [2, 4]


def train_epochs(trainer, epochs, limit):
    """Train on at most ``limit`` batches of each epoch."""
    for _ in range(trainer.epoch, epochs):
        for (x,) in itertools.islice(trainer.training_dataloader, limit):
            trainer.backward(trainer(x).pow(2).mean())
            trainer.step()
    trainer.destroy()


@pytest.mark.parametrize(
    ("epochs", "limit", "every", "warnings"),
    [
        (3, 2, 1, 1),
        (3, 2, 5, 1),  # the first checkpoint is in the last epoch
        (1, 2, 1, 0),  # the script leaves only the last epoch
        (3, STEPS_PER_EPOCH, 1, 0),
        (3, None, 1, 0),
        (3, 2, None, 0),
    ],
)
def test_epochs_left_early_are_reported_if_the_run_is_saved(
    tmp_path, caplog, epochs, limit, every, warnings
):
    plan = {} if every is None else {"checkpoint": {"every": every}}
    train_epochs(start(None if every is None else tmp_path, **plan), epochs, limit)
    text = "the script left epoch 0 after 2 micro-batches and started the next one"
    assert caplog.text.count(text) == warnings
    assert caplog.text.count("the script left epoch") == warnings


def test_epochs_left_early_in_a_trial_run_are_not_reported(tmp_path, caplog):
    trainer = start(tmp_path, max_duration="1ep")
    loader = trainer.training_dataloader
    state = loader.state_dict()
    for _ in range(2):
        next(iter(loader))
    loader.load_state_dict(state)
    train(trainer)
    assert "the script left epoch" not in caplog.text


def test_run_that_is_over_trains_nothing_and_logs_it(tmp_path, caplog):
    train(start(tmp_path, max_duration="1ep"))
    with caplog.at_level(logging.INFO):
        again = start(tmp_path, max_duration="1ep")
        assert train(again) == []
    assert again.global_steps == STEPS_PER_EPOCH  # the last steps were saved
    assert caplog.text.count(f"the run is already over at step {STEPS_PER_EPOCH}") == 1


def test_resumed_run_that_is_over_logs_it_before_any_loop(tmp_path, caplog):
    train(start(tmp_path, max_duration="1ep"))
    with caplog.at_level(logging.INFO):
        start(tmp_path, max_duration="1ep")
    assert f"the run is already over at step {STEPS_PER_EPOCH}" in caplog.text


def test_epochs_after_the_end_of_the_run_warn_once(tmp_path, caplog):
    trainer = start(tmp_path, max_duration="2ep")
    epochs = []
    for _ in range(5):
        epochs.append(0)
        for (x,) in trainer.training_dataloader:
            trainer.backward(trainer(x).pow(2).mean())
            trainer.step()
            epochs[-1] += 1
        assert caplog.text.count("this epoch has no batches") == (len(epochs) > 2)
    assert epochs == [STEPS_PER_EPOCH] * 2 + [0] * 3


BEST = {"metric": "val_loss", "mode": "min"}


def report_losses(trainer, losses):
    """Train and report a validation loss after each step; return the number of steps."""
    for (x,), loss in zip(trainer.batches(), losses, strict=False):
        trainer.backward(trainer(x).pow(2).mean())
        trainer.step()
        trainer.report(val_loss=loss, accuracy=torch.tensor(0.5))
    return trainer.global_steps


def load_best(directory):
    _, manifest = storage.find(directory, "best")
    return manifest.step


def test_best_checkpoint_is_that_of_the_best_metric(tmp_path):
    plan = {"keep": 1, "best": BEST}
    trainer = start(tmp_path, checkpoint=plan, max_duration="10ba")
    report_losses(trainer, [3.0, 2.0, 2.5, math.nan, 2.0, 2.1])
    assert load_best(tmp_path) == 2
    report_losses(trainer, [1.5, 9.0])
    assert load_best(tmp_path) == 7
    resumed = start(tmp_path, checkpoint=plan, max_duration="10ba")
    report_losses(resumed, [1.6])
    assert load_best(tmp_path) == 7
    resumed.load_checkpoint(tmp_path, tag="best")
    assert resumed.global_steps == 7


@pytest.mark.parametrize("metric", ["val_loss", "loss"])
def test_metric_that_is_never_reported_is_a_warning_at_the_end(metric, tmp_path, caplog):
    plan = {"best": {"metric": metric, "mode": "min"}}
    trainer = start(tmp_path, checkpoint=plan, max_duration="2ba")
    report_losses(trainer, [3.0, 2.0])
    trainer.destroy()
    warned = f"`trainer.report` was never called with `{metric}`" in caplog.text
    assert warned == (metric == "loss")


def test_largest_metric_is_the_best_if_the_mode_is_max(tmp_path):
    plan = {"best": {"metric": "val_loss", "mode": "max"}}
    report_losses(start(tmp_path, checkpoint=plan, max_duration="10ba"), [1.0, 3.0, 2.0])
    assert load_best(tmp_path) == 2


def test_metric_passed_to_step_is_that_of_the_best_checkpoint(tmp_path):
    trainer = start(tmp_path, checkpoint={"best": BEST}, max_duration="10ba")
    for (x,), loss in zip(trainer.batches(), [3.0, 2.0, 2.5], strict=False):
        trainer.backward(trainer(x).pow(2).mean())
        trainer.step(metric=loss)
    assert load_best(tmp_path) == 2


def test_best_checkpoint_reported_within_a_step_is_saved_after_it(tmp_path):
    trainer = start(tmp_path, checkpoint={"best": BEST}, accumulation=2, max_duration="2ba")
    for index, (x,) in enumerate(trainer.batches()):
        trainer.backward(trainer(x).pow(2).mean())
        trainer.step()
        if index == 2:
            trainer.report(val_loss=1.0)
    assert load_best(tmp_path) == 2


def test_run_stops_early_when_the_metric_does_not_improve(tmp_path, caplog):
    section = {"checkpoint": {"every": 1, "best": BEST | {"patience": 2}}, "max_duration": "10ba"}
    with caplog.at_level(logging.INFO):
        assert report_losses(start(tmp_path, **section), [3.0, 2.0, 2.5, 2.2, 1.0]) == 4
    message = "val_loss has not improved in the last 2 reported values; the best value is 2"
    assert f"{message}, at step 2" in caplog.text
    resumed = start(tmp_path, **section)
    assert resumed.run_is_over
    assert train(resumed) == []


def test_reported_metrics_are_logged_and_sent_to_the_monitors(tmp_path, caplog):
    config = {
        "train_batch_size": 4,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "csv_monitor": {"enabled": True, "output_path": str(tmp_path), "job_name": "run"},
    }
    trainer, *_ = engine.initialize(config=config, model=torch.nn.Linear(2, 1))
    with caplog.at_level(logging.INFO):
        trainer.report(val_loss=0.25)
    assert "val_loss 0.25" in caplog.text
    (file,) = tmp_path.rglob("val_loss.csv")
    assert file.read_text().splitlines() == ["step,val_loss", "0,0.25"]


def test_plateau_schedule_uses_the_reported_metric(tmp_path):
    plateau = {"type": "ReduceLROnPlateau", "params": {"patience": 0, "factor": 0.1}}
    section = {"checkpoint": {"best": BEST}, "max_duration": "10ba"}
    trainer = start(tmp_path, scheduler=plateau, **section)
    report_losses(trainer, [1.0, 2.0, 2.0, 2.0])
    assert trainer.get_lr()[0] < 0.01


def report_different_losses(directory):
    trainer = start(directory, checkpoint={"best": BEST}, max_duration="3ba")
    # Rank 0 alone would find the last value the best.
    losses = [[3.0, 2.0, 1.0], [1.0, 1.0, 5.0]][trainer.global_rank]
    report_losses(trainer, losses)
    assert load_best(directory) == 2


def test_best_metric_is_the_mean_over_the_ranks(tmp_path):
    run_distributed_test(report_different_losses, 2, tmp_path)
