"""Epochs, the end of a run, and runs that cannot continue."""

import gc
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch
from torch.utils.data import IterableDataset, TensorDataset

import engine
from engine import MisuseError
from engine.checkpoint import storage
from tests.testing.lab import ROOT

FAILING_RANK = ROOT / "tests" / "testing" / "failing_rank.py"
SAMPLES, BATCH = 28, 4
STEPS_PER_EPOCH = SAMPLES // BATCH


def build_data():
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(SAMPLES, 2, generator=generator))


def start(directory=None, data=None, every=3, **section):
    torch.manual_seed(0)
    if directory is not None:
        section["checkpoint"] = {"dir": str(directory), "every": every}
    config = {
        "train_batch_size": BATCH,
        "optimizer": {"type": "SGD", "params": {"lr": 0.01}},
        "engine": section,
    }
    trainer, _, loader, _ = engine.initialize(
        config=config, model=torch.nn.Linear(2, 1), training_data=data or build_data()
    )
    return trainer, loader


def train_epoch(trainer, loader, stop_at=math.inf):
    """Train on the loader's batches and return their sums; stop early at a number of steps."""
    seen = []
    for (x,) in loader:
        trainer.backward(trainer(x).pow(2).mean())
        trainer.step()
        seen.append(x.sum().item())
        if trainer.global_steps == stop_at:
            break
    return seen


def test_checkpoint_loaded_after_an_epoch_starts_the_next_epoch(tmp_path):
    trainer, loader = start()
    whole = [train_epoch(trainer, loader) for _ in range(3)]
    stopped, loader = start()
    train_epoch(stopped, loader)
    stopped.save_checkpoint(tmp_path, client_state={"epoch": 0})
    resumed, loader = start()
    _, state = resumed.load_checkpoint(tmp_path)
    assert resumed.epoch == state["epoch"] + 1
    assert [train_epoch(resumed, loader) for _ in range(1, 3)] == whole[1:]


class Stream(IterableDataset):
    def __iter__(self):
        yield from ((x,) for (x,) in build_data())


def test_checkpoint_of_an_iterable_dataset_loaded_after_an_epoch_starts_the_next_epoch(tmp_path):
    trainer, loader = start(data=Stream())
    train_epoch(trainer, loader)
    trainer.save_checkpoint(tmp_path)
    resumed, loader = start(data=Stream())
    resumed.load_checkpoint(tmp_path)
    assert resumed.epoch == 1
    assert len(train_epoch(resumed, loader)) == STEPS_PER_EPOCH


def test_checkpoint_loaded_within_an_epoch_continues_it(tmp_path):
    trainer, loader = start()
    whole = train_epoch(trainer, loader)
    stopped, loader = start()
    train_epoch(stopped, loader, stop_at=5)
    stopped.save_checkpoint(tmp_path)
    resumed, loader = start()
    resumed.load_checkpoint(tmp_path)
    assert resumed.epoch == 0
    assert train_epoch(resumed, loader) == whole[5:]


@pytest.mark.parametrize("stop_at", [2, STEPS_PER_EPOCH, 10, 2 * STEPS_PER_EPOCH])
def test_loop_from_the_trainers_epoch_trains_as_long_as_without_a_stop(tmp_path, stop_at):
    trainer, loader = start()
    for _ in range(2):
        train_epoch(trainer, loader)
    expected = trainer.module.weight.detach().clone()
    stopped, loader = start(tmp_path, every=1)
    while stopped.global_steps < stop_at:
        train_epoch(stopped, loader, stop_at)
    resumed, loader = start(tmp_path, every=1)
    for _ in range(resumed.epoch, 2):
        train_epoch(resumed, loader)
    assert resumed.global_steps == 2 * STEPS_PER_EPOCH
    assert torch.equal(resumed.module.weight, expected)


def test_loop_over_a_range_ends_at_max_duration_after_a_resume(tmp_path):
    stopped, loader = start(tmp_path, max_duration="2ep")
    while stopped.global_steps < 10:
        train_epoch(stopped, loader, stop_at=10)
    resumed, loader = start(tmp_path, max_duration="2ep")
    for _ in range(2):
        train_epoch(resumed, loader)
    assert resumed.global_steps == 2 * STEPS_PER_EPOCH
    assert resumed.run_is_over
    done, loader = start(tmp_path, max_duration="2ep")
    assert [train_epoch(done, loader) for _ in range(2)] == [[], []]


@pytest.mark.parametrize(("duration", "steps"), [("40sp", 10), ("12ba", 12), (9, 9)])
def test_run_without_a_loader_is_over_at_max_duration(duration, steps):
    config = {
        "train_batch_size": BATCH,
        "optimizer": {"type": "SGD", "params": {"lr": 0.01}},
        "engine": {"max_duration": duration},
    }
    trainer, *_ = engine.initialize(config=config, model=torch.nn.Linear(2, 1))
    while not trainer.run_is_over:
        trainer.backward(trainer(torch.ones(BATCH, 2)).mean())
        trainer.step()
    assert trainer.global_steps == steps


def test_run_in_tokens_is_over_after_this_many_tokens():
    config = {
        "train_batch_size": BATCH,
        "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
        "scheduler": {
            "type": "LinearWithWarmupScheduler",
            "params": {"t_warmup": f"{4 * BATCH * 32}tok"},
        },
        "engine": {"max_duration": f"{12 * BATCH * 32}tok", "tokens_per_sample": 32},
    }
    trainer, *_ = engine.initialize(config=config, model=torch.nn.Linear(2, 1))
    lrs = []
    while not trainer.run_is_over:
        lrs.append(trainer.get_lr()[0])
        trainer.backward(trainer(torch.ones(BATCH, 2)).mean())
        trainer.step()
    assert lrs == pytest.approx([0.5 * min(k / 4, (12 - k) / 8) for k in range(12)])
    del config["engine"]["tokens_per_sample"]
    with pytest.raises(engine.ConfigError, match=r"`engine.max_duration`: .* tokens per sample"):
        engine.initialize(config=config, model=torch.nn.Linear(2, 1))


@pytest.mark.parametrize(("duration", "steps"), [("56SP", 7 + 4), ("14 BA", 14)])
def test_run_with_a_larger_batch_ends_after_the_same_samples_or_batches(duration, steps):
    trainer, loader = start(max_duration=duration)
    train_epoch(trainer, loader)
    trainer.set_train_micro_batch_size(2 * BATCH)
    while not trainer.run_is_over:
        trainer.backward(trainer(torch.ones(2 * BATCH, 2)).mean())
        trainer.step()
    assert trainer.global_steps == steps


def test_epoch_at_the_end_of_a_run_is_the_next_one():
    trainer, loader = start(max_duration="2ep")
    while trainer.epoch < 2:
        train_epoch(trainer, loader)
    assert trainer.run_is_over


def test_checkpoint_loaded_explicitly_is_not_saved_again_at_exit(tmp_path):
    trainer, loader = start(tmp_path)
    for _ in range(2):
        train_epoch(trainer, loader)
    resumed, _ = start(tmp_path)
    resumed.load_checkpoint(tmp_path, tag="global_step9")
    before = storage.list_checkpoints(tmp_path)
    resumed._automatic.end_run(resumed._run)
    assert storage.list_checkpoints(tmp_path) == before


def test_loop_after_a_resume_of_unknown_length_raises(tmp_path):
    stopped, loader = start(tmp_path)
    for _ in range(2):
        train_epoch(stopped, loader)
    _, loader = start(tmp_path)
    with pytest.raises(MisuseError, match=r"trainer\.epoch.*engine\.max_duration"):
        next(iter(loader))


@pytest.mark.parametrize(
    ("section", "reads_epoch", "warns"),
    [
        ({}, False, True),
        ({}, True, False),
        ({"max_duration": "2ep"}, False, False),
        ({"checkpoint": {"resume": "never"}}, False, False),
        ({"checkpoint": {"dir": None}}, False, False),
    ],
)
def test_loop_that_a_resume_would_reject_warns_in_the_first_run(
    tmp_path, caplog, section, reads_epoch, warns
):
    checkpoint = {"dir": str(tmp_path), "every": 3} | section.get("checkpoint", {})
    trainer, loader = start(**section | {"checkpoint": checkpoint})
    for _ in range(trainer.epoch if reads_epoch else 0, 2):
        train_epoch(trainer, loader)
    assert caplog.text.count("range(trainer.epoch, n)") == warns


def test_last_steps_are_saved_when_the_loader_ends_the_run(tmp_path, caplog):
    trainer, loader = start(tmp_path, max_duration="2ep")
    for _ in range(3):
        train_epoch(trainer, loader)
    assert storage.list_checkpoints(tmp_path)[-1][1].step == 2 * STEPS_PER_EPOCH
    end = f"step {2 * STEPS_PER_EPOCH}; the last checkpoint is in {tmp_path}"
    assert caplog.text.count(end) == 1


@pytest.mark.parametrize("steps", [2, 3])
def test_destroy_saves_the_last_steps(tmp_path, monkeypatch, caplog, steps):
    monkeypatch.delattr(sys, "last_value", raising=False)  # set by pytest if a test has failed
    trainer, loader = start(tmp_path, every=3)
    train_epoch(trainer, loader, stop_at=steps)
    trainer.destroy()
    assert [manifest.step for _, manifest in storage.list_checkpoints(tmp_path)] == [steps]
    assert f"training ended at step {steps}" in caplog.text
    caplog.clear()
    start(tmp_path)[0].destroy()
    assert "ended" not in caplog.text


def test_end_of_training_is_not_reported_as_saved_while_the_save_is_running(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.delattr(sys, "last_value", raising=False)  # set by pytest if a test has failed
    is_logged = threading.Event()
    describe_files = storage.describe_files

    def wait_and_describe(*args):
        is_logged.wait(timeout=60)
        return describe_files(*args)

    trainer, loader = start(checkpoint={"dir": str(tmp_path), "every": 3, "async": True})
    monkeypatch.setattr(storage, "describe_files", wait_and_describe)
    train_epoch(trainer, loader, stop_at=3)
    trainer._automatic.close(trainer._run)
    assert f"step 3; the last checkpoint is being saved to {tmp_path}" in caplog.text
    is_logged.set()
    trainer.destroy()
    assert [manifest.step for _, manifest in storage.list_checkpoints(tmp_path)] == [3]


@pytest.mark.parametrize(
    ("length", "end", "checkpoint", "is_logged"),
    [
        (40, "", {}, True),
        (40, "raise ValueError", {}, False),
        (STEPS_PER_EPOCH, "", {"dir": "saved"}, False),
        (40, "trainer.destroy()", {"dir": "saved"}, True),
    ],
)
def test_script_logs_that_its_schedule_has_not_ended(tmp_path, length, end, checkpoint, is_logged):
    params = {"warmup_max_lr": 0.1, "warmup_num_steps": 1, "total_num_steps": length}
    config = {
        "train_batch_size": BATCH,
        "optimizer": {"type": "SGD", "params": {"lr": 0.01}},
        "scheduler": {"type": "WarmupDecayLR", "params": params},
        "engine": {"checkpoint": checkpoint},
    }
    script = f"""
import torch
import engine

def main():
    trainer, *_ = engine.initialize(config={config}, model=torch.nn.Linear(2, 1))
    for _ in range({STEPS_PER_EPOCH}):
        trainer.backward(trainer(torch.ones({BATCH}, 2)).mean())
        trainer.step()
    {end}

main()"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    text = (
        f"training ended at step {STEPS_PER_EPOCH}; the schedule ends {40 - STEPS_PER_EPOCH} steps"
    )
    assert done.stderr.count(text) == is_logged, done.stderr
    assert done.stderr.count("training ended") == is_logged


def test_engine_that_is_deleted_is_freed_and_logs_that_its_schedule_has_not_ended(caplog):
    caplog.set_level(logging.INFO, "onecycle")
    config = {"train_batch_size": BATCH, "optimizer": {"type": "SGD", "params": {"lr": 0.01}}}
    config["scheduler"] = {"type": "OneCycle", "params": {"cycle_min_lr": 0.1, "cycle_max_lr": 1}}
    trainer, _, loader, _ = engine.initialize(
        config=config, model=torch.nn.Linear(2, 1), training_data=build_data()
    )
    train_epoch(trainer, loader)
    freed = weakref.ref(trainer._run)
    del trainer, loader
    gc.collect()
    assert freed() is None
    assert f"training ended at step {STEPS_PER_EPOCH}" in caplog.text


def test_script_that_only_loads_a_checkpoint_does_not_log_the_end_of_training(tmp_path, caplog):
    trainer, loader = start(tmp_path)
    train_epoch(trainer, loader)
    trainer.destroy()
    caplog.clear()
    section = {"checkpoint": {"dir": str(tmp_path), "every": 3, "resume": "never"}}
    evaluated, _ = start(**section)
    evaluated.load_checkpoint(tmp_path)
    evaluated.destroy()
    finished, loader = start(max_duration="1ep")
    finished.load_checkpoint(tmp_path)
    assert list(loader) == []
    assert "ended" not in caplog.text
    assert f"the run is already over at step {STEPS_PER_EPOCH}" in caplog.text


def test_range_test_neither_counts_as_use_of_the_loader_nor_as_the_first_loop(tmp_path, caplog):
    trainer, loader = start(tmp_path)
    engine.lr_range_test(
        trainer, loader, loss_fn=lambda model, batch: model(batch[0]).pow(2).mean(), steps=30
    )
    assert "cannot be resumed" not in caplog.text
    for _ in range(2):
        train_epoch(trainer, loader)
    assert caplog.text.count("cannot be resumed") == 1


def test_steps_on_data_of_another_loader_warn_once(caplog):
    trainer, loader = start()
    own = torch.utils.data.DataLoader(build_data(), batch_size=BATCH)
    for _ in range(2):
        train_epoch(trainer, own)
    assert caplog.text.count("the script does not use the data loader") == 1
    caplog.clear()
    trainer, loader = start()
    train_epoch(trainer, loader)
    assert "does not use the data loader" not in caplog.text


def test_resumed_run_on_data_of_another_loader_raises_if_it_could_train_too_long(tmp_path):
    trainer, loader = start(tmp_path)
    train_epoch(trainer, loader)
    own = torch.utils.data.DataLoader(build_data(), batch_size=BATCH)
    trainer, _ = start(tmp_path)
    with pytest.raises(MisuseError, match="Iterate over this loader"):
        train_epoch(trainer, own)
    trainer, _ = start(tmp_path)
    for _ in range(trainer.epoch, 2):
        train_epoch(trainer, own)


@pytest.mark.parametrize(
    ("length", "end"),
    [
        (40, f"; the schedule ends {40 - STEPS_PER_EPOCH} steps later"),
        (STEPS_PER_EPOCH - 2, "; the schedule ends 2 steps earlier"),
        (STEPS_PER_EPOCH - 1, ";"),  # as with "0.3dur" and "0.7dur", which are rounded down
    ],
)
def test_log_tells_where_the_schedule_ends_if_the_run_ends_elsewhere(tmp_path, caplog, length, end):
    params = {"warmup_max_lr": 0.1, "warmup_num_steps": 1, "total_num_steps": length}
    config = {
        "train_batch_size": BATCH,
        "optimizer": {"type": "SGD", "params": {"lr": 0.01}},
        "scheduler": {"type": "WarmupDecayLR", "params": params},
        "engine": {"checkpoint": {"dir": str(tmp_path), "every": 3}},
    }
    trainer, _, loader, _ = engine.initialize(
        config=config, model=torch.nn.Linear(2, 1), training_data=build_data()
    )
    train_epoch(trainer, loader)
    trainer.destroy()
    assert f"training ended at step {STEPS_PER_EPOCH}{end}" in caplog.text
    assert ("the schedule ends" in caplog.text) == ("the schedule ends" in end)


def test_destroy_while_an_exception_is_handled_saves_nothing(tmp_path, monkeypatch):
    monkeypatch.delattr(sys, "last_value", raising=False)
    trainer, loader = start(tmp_path)
    train_epoch(trainer, loader, stop_at=2)
    with pytest.raises(ValueError, match="no data"):
        try:
            raise ValueError("no data")
        finally:
            trainer.destroy()
    assert storage.list_checkpoints(tmp_path) == []


SCRIPT = """
import os, signal, sys, torch, engine
config = {
    "train_batch_size": 4,
    "optimizer": {"type": "SGD", "params": {"lr": 0.01}},
    "engine": {"checkpoint": {"dir": sys.argv[1], "every": 20, "async": sys.argv[2] == "async"}},
}
trainer, *_ = engine.initialize(config=config, model=torch.nn.Linear(2, 1))
for step in range(8):
    trainer.backward(trainer(torch.ones(4, 2)).mean())
    trainer.step()
    if sys.argv[2] == "interrupt" and step == 4:
        os.kill(os.getpid(), signal.SIGINT)
    if sys.argv[2] == "raise" and step == 4:
        raise ValueError("five steps")
"""


@pytest.mark.parametrize(
    ("case", "status", "saved"),
    [
        ("sync", 0, [8]),
        pytest.param("async", 0, [8], marks=pytest.mark.slow),
        ("interrupt", 130, [6]),
        pytest.param("raise", 1, [], marks=pytest.mark.slow),
    ],
)
def test_script_that_exits_saves_its_last_steps_unless_it_fails(tmp_path, case, status, saved):
    command = [sys.executable, "-c", SCRIPT, tmp_path / "checkpoints", case]
    assert subprocess.run(command, capture_output=True, check=False).returncode == status
    found = storage.list_checkpoints(tmp_path / "checkpoints")
    assert [manifest.step for _, manifest in found] == saved


def test_second_ctrl_c_and_one_between_runs_interrupt_at_once(tmp_path):
    trainer, loader = start(tmp_path)
    try:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        train_epoch(trainer, loader)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        trainer.destroy()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "kind", "status", "last"),
    [
        ("torch", "loop", 1, "ValueError: rank 1 fails"),
        ("torch", "worker", 1, "ValueError: the data of rank 1 are damaged"),
        ("torch", "hook", 1, "ValueError: the hook of rank 1 fails"),
        ("torch", "interrupt", 130, "KeyboardInterrupt"),
        ("torch", "exit", 3, ""),
        ("deepspeed", "loop", 1, "ValueError: rank 1 fails"),
        ("deepspeed", "exit", 3, ""),
    ],
)
def test_failing_rank_ends_the_job_within_seconds(tmp_path, backend, kind, status, last):
    done = launch_failing_rank(tmp_path, kind, backend)
    assert done.returncode == status
    *output, message = [line for line in done.stderr.splitlines() if line != "[localhost:r1] "]
    reason = f"exited with status {status}{' (SIGINT)' if kind == 'interrupt' else ''}"
    assert message.endswith(f"first failure: rank 1 on localhost {reason}")
    assert not last or output[-1].endswith(last)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "deepspeed"])
def test_rank_that_ends_early_is_named_by_the_rank_that_waits_for_it(tmp_path, backend):
    done = launch_failing_rank(tmp_path, "end", backend)
    assert done.returncode == 1
    assert "[localhost:r0] error: Rank 1 had already exited when this rank failed." in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "deepspeed"])
def test_rank_that_hangs_is_named_by_the_rank_that_waits_for_it(tmp_path, backend):
    done = launch_failing_rank(tmp_path, "hang", backend, "--timeout", "5")
    assert done.returncode == 1
    assert "[localhost:r0] error: Rank 1 did not join the collective operation" in done.stderr


def launch_failing_rank(tmp_path, kind, backend, *options):
    """Launch two ranks of which rank 1 fails, and check that the job ends within 30 seconds."""
    command = [sys.executable, "-m", "engine.cli.main", "launch", "--nproc", "2"]
    done = subprocess.run(
        [*command, *options, FAILING_RANK, kind, backend],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert time.time() - float((tmp_path / "failed_at").read_text()) < 30
    return done


@pytest.mark.parametrize("limit", [3, None])
def test_run_with_only_nan_gradients_ends_at_max_skipped_steps(limit):
    trainer, _ = start(max_skipped_steps=limit)
    raises = pytest.raises(FloatingPointError, match=r"max_skipped_steps")
    for step in range(1, 40):
        trainer.backward(trainer(torch.full((4, 2), math.nan)).mean())
        if step == limit:
            with raises:
                trainer.step()
            assert trainer.skipped_steps == 3
            return
        assert not trainer.step()
    assert limit is None


def test_skipped_steps_that_are_not_consecutive_do_not_end_the_run():
    trainer, _ = start(max_skipped_steps=2)
    for step in range(10):
        value = math.nan if step % 2 else 1.0
        trainer.backward(trainer(torch.full((4, 2), value)).mean())
        assert trainer.step() == (step % 2 == 0)


def test_fp16_loss_of_fp16_outputs_does_not_overflow_at_the_initial_scale():
    torch.manual_seed(0)
    config = {
        "train_batch_size": 8,
        "fp16": {"enabled": True, "initial_scale_power": 16},
        "optimizer": {"type": "AdamW"},
    }
    trainer, *_ = engine.initialize(config=config, model=torch.nn.Linear(8, 10))
    targets = torch.arange(8)
    for _ in range(3):
        outputs = trainer(torch.randn(8, 8))
        loss = torch.nn.functional.cross_entropy(outputs, targets)
        assert (outputs.dtype, loss.dtype) == (torch.float16, torch.float16)
        assert loss > 2
        trainer.backward(loss)
        assert trainer.step()
    assert trainer.skipped_steps == 0


def test_two_engines_that_save_to_one_directory_raise(tmp_path):
    first, _ = start(tmp_path)
    second, _ = start(tmp_path)
    batch = torch.ones(BATCH, 2)
    for _ in range(2):
        first.backward(first(batch).mean())
        first.step()
    first.backward(first(batch).mean())
    with pytest.raises(MisuseError, match=r"engine\.checkpoint\.dir"):
        first.step()
    for _ in range(3):
        second.backward(second(batch).mean())
        second.step()
    assert [manifest.step for _, manifest in storage.list_checkpoints(tmp_path)] == [3]


def test_override_keeps_the_hyperparameters_of_this_run(tmp_path):
    def build(override, **params):
        section = {"dir": str(tmp_path), "every": 2, "override": override}
        config = {
            "train_batch_size": 4,
            "optimizer": {"type": "AdamW", "params": params},
            "engine": {"checkpoint": section},
        }
        return engine.initialize(config=config, model=torch.nn.Linear(2, 1))[:2]

    trainer, _ = build(False, lr=1e-3)
    for _ in range(2):
        trainer.backward(trainer(torch.ones(4, 2)).mean())
        trainer.step()
    changed = {"lr": 1e-5, "weight_decay": 0.2, "betas": [0.8, 0.9]}
    resumed, optimizer = build(True, **changed)
    assert resumed.global_steps == 2
    found = {name: optimizer.param_groups[0][name] for name in changed}
    assert found == changed | {"betas": (0.8, 0.9)}
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}


@pytest.mark.parametrize(("duration", "lr"), [("4000sp", 0.5), ("100ba", 0.5), (100, 0.5)])
def test_schedule_after_a_batch_size_change_continues_in_its_unit(tmp_path, duration, lr):
    def build(batch, override):
        config = {
            "train_batch_size": batch,
            "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
            "scheduler": {"type": "CosineAnnealingScheduler", "params": {"t_max": duration}},
            "engine": {"checkpoint": {"dir": str(tmp_path), "every": 50, "override": override}},
        }
        return engine.initialize(config=config, model=torch.nn.Linear(4, 1))[0]

    trainer = build(40, override=False)
    for _ in range(50):
        trainer.backward(trainer(torch.ones(40, 4)).mean())
        trainer.step()
    resumed = build(80, override=True)
    assert resumed.get_lr() == pytest.approx([lr])
    assert resumed.global_samples == 2000
