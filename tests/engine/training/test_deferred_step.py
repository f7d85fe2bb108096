"""Deferred steps give the same run as steps that wait for the device."""

import atexit
import csv
import gc
import logging
import math
import pickle
import signal
import weakref

import pytest
import torch
from torch.nn.functional import cross_entropy

import engine
from engine.distributed.environment import SAVED_AND_ENDED
from tests.testing.distributed import run_distributed_test

CYCLE = {
    "type": "OneCycle",
    "params": {"cycle_min_lr": 1e-3, "cycle_max_lr": 1e-2, "cycle_first_step_size": 5},
}
SECOND_LR = 1e-3 + (1e-2 - 1e-3) / 5
PRECISIONS = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 10, "loss_scale_window": 2}},
    "static": {"fp16": {"enabled": True, "loss_scale": 128}},
}
POISONED = (0, 3, 4)


def start(*, deferred=True, **sections):
    config = {
        "train_batch_size": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "scheduler": CYCLE,
        "gradient_clipping": 0.5,
        **sections,
    }
    config["engine"] = {"backend": "torch", "deferred_step": deferred, **config.get("engine", {})}
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(2))
    model = torch.nn.Sequential(*layers, torch.nn.ReLU(), torch.nn.Linear(16, 4))
    return engine.initialize(config=config, model=model)[0]


def make_batch(trainer, step):
    generator = torch.Generator().manual_seed(100 * step + trainer.global_rank)
    size = trainer.train_micro_batch_size_per_gpu()
    x = 5 * torch.randn(size, 16, generator=generator)
    y = torch.randint(0, 4, (size,), generator=generator)
    return (x * math.nan if step in POISONED else x), y


def train_step(trainer, step):
    x, y = make_batch(trainer, step)
    for _ in range(trainer.gradient_accumulation_steps()):
        trainer.backward(cross_entropy(trainer(x).float(), y))
        result = trainer.step()
    return result


def copy_weights(trainer):
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in trainer.module.named_parameters()
    }


def train(steps=12, *, asks=(), **settings):
    """Train, and return the values of each step, read at its end if ``asks`` contains it.

    The last value is the state after the last step, with the weights.
    """
    trainer = start(**settings)
    results = []
    for step in range(steps):
        result = train_step(trainer, step)
        if step in asks:
            assert isinstance(result, bool) != settings.get("deferred", True)
            results.append((bool(result), *read_state(trainer)))
    state = read_state(trainer)
    weights = copy_weights(trainer)
    trainer.destroy()
    return results, state, weights


def read_state(trainer):
    return (
        trainer.get_lr(),
        trainer.get_momentum(),
        trainer.global_steps,
        trainer.skipped_steps,
        trainer.was_step_applied(),
        trainer.cur_scale,
        trainer.lr_scheduler.last_epoch,
        Norm(trainer.get_global_grad_norm()),
    )


class Norm(float):
    """A gradient norm that equals other norms up to rounding."""

    def __eq__(self, other):
        return float(self) == pytest.approx(float(other), rel=1e-5, nan_ok=True)

    __hash__ = None


def check_equal(**settings):
    steps = range(12)
    expected, expected_state, expected_weights = train(deferred=False, asks=steps, **settings)
    for asks in (steps, ()):
        results, state, weights = train(deferred=True, asks=asks, **settings)
        assert results == expected[: len(results)]
        assert state == expected_state
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected_weights[name], rtol=2e-6, atol=2e-7)
    assert [applied for applied, *_ in expected[:5]] == [False, True, True, False, False]


@pytest.mark.parametrize("clipping", [0.0, 0.5])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_deferred_run_equals_a_run_that_waits(precision, clipping):
    check_equal(gradient_clipping=clipping, **PRECISIONS[precision])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
def test_deferred_sgd_starts_its_momentum_after_a_skipped_first_step(momentum, nesterov):
    params = {"lr": 0.1, "momentum": momentum, "nesterov": nesterov and momentum > 0}
    schedule = {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}
    check_equal(optimizer={"type": "SGD", "params": params}, scheduler=schedule)


def test_fused_sgd_that_skips_its_first_step_has_uninitialized_momentum():
    # If PyTorch initializes these buffers one day, `_start_momenta` may only start late ones.
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, fused=True)
    optimizer.found_inf = torch.tensor(1.0)
    weight.grad = torch.ones(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty_like", lambda each: torch.full_like(each, 7.0))
        optimizer.step()
    assert optimizer.state[weight]["momentum_buffer"].tolist() == [7.0] * 3


def test_deferred_steps_with_gradient_accumulation_equal_steps_that_wait():
    check_equal(train_micro_batch_size_per_gpu=4, **PRECISIONS["fp16"])


def check_equal_on_rank(settings):
    logging.disable()
    check_equal(**settings)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_deferred_run_on_two_ranks_equals_a_run_that_waits(stage, precision):
    settings = {"zero_optimization": {"stage": stage}, **PRECISIONS[precision]}
    run_distributed_test(check_equal_on_rank, 2, settings)


def test_deferred_float16_loss_limits_the_scale_as_a_step_that_waits_does():
    def run(deferred):
        section = {"enabled": True, "initial_scale_power": 14, "loss_scale_window": 1}
        trainer = start(deferred=deferred, fp16=section)
        scales = []
        for step in range(12):
            x, y = make_batch(trainer, step)
            trainer.backward(cross_entropy(trainer(x).float(), y).half())
            trainer.step()
            scales.append(trainer.cur_scale if step == 11 or not deferred else None)
        return scales[-1], trainer.skipped_steps, copy_weights(trainer)

    scale, skipped, weights = run(deferred=True)
    expected_scale, expected_skipped, expected_weights = run(deferred=False)
    assert (scale, skipped) == (expected_scale, expected_skipped)
    assert scale >= 2**15, "the scale never reached the limit"
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected_weights[name], rtol=2e-6, atol=2e-7)


def test_deferred_step_advances_the_schedule_when_it_is_asked_and_not_before():
    def read_after_step(read):
        trainer = start(deferred=True)
        train_step(trainer, 1)
        assert trainer.optimizer.param_groups[0]["lr"] == 1e-3, "nothing has asked yet"
        value = read(trainer)
        lr = trainer.optimizer.param_groups[0]["lr"]
        return value, lr

    for read in (
        lambda trainer: trainer.get_lr(),
        lambda trainer: trainer.get_momentum(),
        lambda trainer: trainer.get_mom(),
        lambda trainer: trainer.was_step_applied(),
        lambda trainer: trainer.skipped_steps,
        lambda trainer: trainer.cur_scale,
        lambda trainer: trainer.get_global_grad_norm(),
        lambda trainer: trainer.lr_scheduler.get_last_lr(),
        lambda trainer: trainer.lr_scheduler.state_dict(),
        lambda trainer: repr(trainer.lr_scheduler),
        lambda trainer: trainer.report(loss=1.0),
        lambda trainer: trainer.set_train_batch_size(16),
        lambda trainer: trainer.destroy(),
    ):
        assert read_after_step(read)[1] == pytest.approx(SECOND_LR)
    for read in (lambda trainer: trainer.global_steps, lambda trainer: trainer.global_samples):
        value, lr = read_after_step(read)
        assert value in {1, 8}
        assert lr == 1e-3, "counters that do not depend on the outcome do not wait"


def test_deferred_run_is_over_at_the_same_step_as_a_run_that_waits():
    # Before its outcome is known, step 3 looks like the third applied step.
    for limits in ({"max_duration": "7ba"}, {"steps_this_run": 3}):
        trainer = start(engine=limits)
        steps = 0
        while not trainer.run_is_over:
            train_step(trainer, steps)
            steps += 1
        assert steps == (7 if "max_duration" in limits else 3 + len(POISONED))


def test_deferred_run_that_diverges_raises_one_step_late():
    trainer = start(engine={"max_skipped_steps": 2})
    for _ in range(2):
        train_step(trainer, 3)
    with pytest.raises(FloatingPointError, match="step 2, loss nan"):
        train_step(trainer, 3)


@pytest.mark.parametrize("is_asked", [False, True])
def test_deferred_fp16_run_that_overflows_at_the_minimum_scale_raises(is_asked):
    fp16 = {"enabled": True, "initial_scale_power": 0, "min_loss_scale": 1, "hysteresis": 1}
    trainer = start(fp16=fp16)
    train_step(trainer, 3)
    with pytest.raises(FloatingPointError, match="minimum loss scale"):
        trainer.get_lr() if is_asked else train_step(trainer, 3)


def test_deferred_step_notices_a_scheduler_that_the_script_steps():
    trainer = start()
    train_step(trainer, 1)
    trainer.lr_scheduler.step()
    trainer.backward(trainer(torch.ones(8, 16)).sum())
    with pytest.raises(RuntimeError, match=r"scheduler\.step"):
        trainer.step()


def read_monitors(directory):
    rows = {}
    for path in directory.rglob("*.csv"):
        with path.open() as file:
            rows[path.stem] = [tuple(map(float, row)) for row in list(csv.reader(file))[1:]]
    rows.pop("Train_Samples_samples_per_second")
    return rows


def run_with_monitors(directory, deferred, precision):
    section = {"enabled": True, "output_path": str(directory)}
    trainer = start(
        deferred=deferred,
        csv_monitor=section,
        steps_per_print=3,
        train_micro_batch_size_per_gpu=2,
        **PRECISIONS[precision],
    )
    for step in range(9):
        train_step(trainer, step)
    trainer.destroy()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_deferred_run_writes_the_same_monitors_and_log(precision, ranks, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for deferred in (False, True):
        directory = tmp_path / str(deferred)
        if ranks == 1:
            run_with_monitors(directory, deferred, precision)
        else:
            run_distributed_test(run_with_monitors, 2, directory, deferred, precision)
    expected, found = read_monitors(tmp_path / "False"), read_monitors(tmp_path / "True")
    assert len(expected["Train_Samples_lr"]) == 9
    assert found.keys() == expected.keys()
    for name, rows in expected.items():
        found_rows = torch.tensor(found[name], dtype=torch.float64)
        expected_rows = torch.tensor(rows, dtype=torch.float64)
        torch.testing.assert_close(found_rows, expected_rows, rtol=1e-5, atol=1e-6, equal_nan=True)
    if ranks == 1:
        lines = [each.message for each in caplog.records if each.message.startswith("step ")]
        assert lines[: len(lines) // 2] == lines[len(lines) // 2 :]
        assert len(lines) == 2 * 3


def ask_on_rank_0(stage):
    trainer = start(zero_optimization={"stage": stage}, steps_per_print=1)
    for step in range(8):
        result = train_step(trainer, step)
        if trainer.global_rank == 0:
            assert bool(result) == (step not in POISONED)
            trainer.get_lr()
    return trainer.get_lr(), trainer.skipped_steps


@pytest.mark.parametrize("stage", [0, 3])
def test_deferred_outcome_can_be_read_on_one_rank(stage):
    first, second = run_distributed_test(ask_on_rank_0, 2, stage)
    assert first == second
    assert first[1] == len(POISONED)


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_deferred_run_resumes_from_its_checkpoint(is_async, precision, tmp_path):
    settings = PRECISIONS[precision]
    _, expected_state, expected_weights = train(10, **settings)
    # The checkpoint is due after a skipped step, whose outcome is not known yet.
    section = {"checkpoint": {"dir": str(tmp_path), "every": 5, "async": is_async}}
    train(5, engine=section, **settings)
    trainer = start(engine=section, **settings)
    assert (trainer.global_steps, trainer.skipped_steps) == (5, 3)
    for step in range(5, 10):
        train_step(trainer, step)
    assert read_state(trainer) == expected_state
    for name, weight in copy_weights(trainer).items():
        assert torch.equal(weight, expected_weights[name])
    trainer.destroy()


def test_load_checkpoint_replaces_a_step_whose_outcome_is_unknown(tmp_path):
    # Without hysteresis, the next scale depends on each outcome.
    fp16 = {"enabled": True, "initial_scale_power": 10, "hysteresis": 1}
    trainer = start(fp16=fp16)
    train_step(trainer, 1)
    trainer.save_checkpoint(tmp_path)
    saved = read_state(trainer)
    train_step(trainer, 2)
    expected = read_state(trainer)
    train_step(trainer, 3)
    trainer.load_checkpoint(tmp_path)
    assert read_state(trainer)[:-1] == saved[:-1]
    train_step(trainer, 2)
    assert read_state(trainer) == expected


def test_lr_range_test_after_a_deferred_step_restores_the_learning_rate():
    trainer = start()
    train_step(trainer, 1)
    batches = [make_batch(trainer, 1)]
    engine.lr_range_test(
        trainer,
        batches,
        loss_fn=lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
        steps=20,
    )
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(SECOND_LR)
    train_step(trainer, 2)
    assert trainer.skipped_steps == 0


@pytest.mark.filterwarnings("ignore:AutoWU's warmup")
@pytest.mark.parametrize(
    "scheduler",
    [
        {
            "type": "AutoWU",
            "params": {
                "steps_per_epoch": 1,
                "total_epochs": 12,
                "test": "robust",
                "rollback": False,
            },
        },
        {"type": "ReduceLROnPlateau", "params": {"patience": 0}},
    ],
)
def test_deferred_feedback_schedule_receives_the_same_values(scheduler):
    def run(deferred):
        trainer = start(deferred=deferred, scheduler=scheduler)
        lrs = []
        for step in range(12):
            x, y = make_batch(trainer, step)
            trainer.backward(cross_entropy(trainer(x), y))
            trainer.step(metric=float(step % 5) if step % 2 else None)
            lrs.append(trainer.get_lr()[0])
        return lrs

    lrs = run(deferred=True)
    assert lrs == pytest.approx(run(deferred=False), rel=1e-6)
    assert len(set(lrs)) > 1


@pytest.mark.filterwarnings("ignore:AutoWU's warmup")
@pytest.mark.parametrize(
    ("changes", "is_deferred"),
    [
        ({}, True),
        ({"optimizer": {"type": "SGD", "params": {"lr": 0.1}}, "scheduler": None}, True),
        ({"optimizer": {"type": "RMSprop", "params": {"lr": 0.1}}, "scheduler": None}, False),
        ({"wall_clock_breakdown": True}, False),
        ({"scheduler": {"type": "LRRangeTest"}}, False),
        ({"engine": {"deferred_step": None}}, False),
        (
            {
                "scheduler": {
                    "type": "AutoWU",
                    "params": {
                        "steps_per_epoch": 1,
                        "total_epochs": 12,
                        "test": "robust",
                        "rollback": True,
                    },
                }
            },
            False,
        ),
    ],
)
def test_step_is_deferred_only_if_the_device_can_skip_it(changes, is_deferred):
    settings = {"scheduler": CYCLE, **changes}
    settings = {name: value for name, value in settings.items() if value is not None}
    trainer = start(**settings)
    assert isinstance(train_step(trainer, 1), bool) != is_deferred


def test_step_of_a_custom_optimizer_or_scheduler_waits():
    for build in (
        {"optimizer": lambda params: torch.optim.AdamW(params, fused=True)},
        {"lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1)},
    ):
        config = {"train_batch_size": 8, "engine": {"deferred_step": True}}
        if "optimizer" not in build:
            config["optimizer"] = {"type": "AdamW"}
        trainer, *_ = engine.initialize(config=config, model=torch.nn.Linear(16, 4), **build)
        assert train_step(trainer, 1) is True


def test_step_result_is_like_a_bool():
    trainer = start()
    applied, skipped = train_step(trainer, 1), train_step(trainer, 3)
    assert applied
    assert not skipped
    assert (applied == True, skipped == False, applied != skipped) == (True, True, True)  # noqa: E712
    assert (repr(applied), f"{skipped}", sum([bool(applied)])) == ("True", "False", 1)
    assert {applied: "applied", skipped: "skipped"}[True] == "applied"
    assert pickle.loads(pickle.dumps([applied, skipped])) == [True, False]


def test_deferred_engine_and_its_scheduler_are_freed_and_pickled():
    trainer = start()
    train_step(trainer, 1)
    scheduler = trainer.lr_scheduler
    assert pickle.loads(pickle.dumps(scheduler)).before_use is None
    reference = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert reference() is None
    assert scheduler.get_last_lr()[0] > 0


def receive_signal_on_rank_1(directory):
    trainer = start(engine={"checkpoint": {"dir": directory}})
    for step in range(6):
        if (trainer.global_rank, step) == (1, 2):
            signal.raise_signal(signal.SIGTERM)
        try:
            train_step(trainer, step)
        except SystemExit as error:
            return step, error.code, trainer.global_steps, trainer.skipped_steps
    return None


def test_deferred_run_saves_and_exits_one_step_after_a_signal(tmp_path):
    results = run_distributed_test(receive_signal_on_rank_1, 2, str(tmp_path))
    # The step during which the signal arrived is 2; step 3 is skipped.
    assert results == [(3, SAVED_AND_ENDED, 4, 2)] * 2
    assert (tmp_path / "global_step4").is_dir()


def train_and_exit(directory, deferred):
    section = {"enabled": True, "output_path": str(directory)}
    trainer = start(deferred=deferred, csv_monitor=section)
    for step in range(3):
        train_step(trainer, step)
    atexit._run_exitfuncs()  # as at the end of a script, which does not call `destroy`
    return len(read_monitors(directory)["Train_Samples_lr"])


def test_deferred_run_writes_its_last_step_when_the_process_exits(tmp_path):
    assert run_distributed_test(train_and_exit, 1, tmp_path, True) == [3]
