"""The engine in one process: training, accumulation, skipped steps, resuming and the log."""

import copy
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import mse_loss
from torch.utils.data import TensorDataset

import engine
import schedules
from engine import ConfigError, MisuseError
from engine.training.setup_log import log_setup
from tests.testing.distributed import run_distributed_test
from tests.testing.regression import CONFIG, CYCLE, dataset, model, start, train

# With this scale, these small models never overflow.
FP16 = {"enabled": True, "initial_scale_power": 8}


def hyperparameters(seen):
    return [(lr, momentum) for _, lr, momentum in seen]


def test_initialize_with_onecycle_trains_by_the_trace():
    data = dataset()
    trainer, optimizer, loader, scheduler = engine.initialize(
        config=CONFIG, model=model(), training_data=data
    )
    assert trainer.optimizer is optimizer is scheduler.optimizer
    assert (trainer.train_batch_size(), trainer.train_micro_batch_size_per_gpu()) == (8, 8)
    assert len(loader) == 8
    seen = train(trainer, loader, 12)
    expected = schedules.trace(CYCLE, 12)
    assert [lr for _, (lr,), _ in seen] == expected["lr"][:, 0].tolist()
    assert [momentum for _, _, (momentum,) in seen] == expected["momentum"][:, 0].tolist()
    assert seen[-1][0] < seen[0][0]
    assert (trainer.global_steps, trainer.micro_steps, trainer.skipped_steps) == (12, 12, 0)


def test_engine_takes_the_same_steps_as_a_plain_torch_loop():
    trainer, loader = start(gradient_clipping=0.5)
    plain = model()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9)
    binder = schedules.attach(CYCLE, optimizer)
    for x, y in loader:
        mse_loss(plain(x), y).backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        binder.step()
        trainer.backward(mse_loss(trainer(x), y))
        trainer.step()
        assert trainer.get_global_grad_norm() == pytest.approx(float(norm), rel=1e-5)
    for ours, theirs in zip(trainer.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_accumulation_gives_the_same_losses_and_schedule(precision):
    enabled = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}, "fp16": {"fp16": FP16}}[precision]
    whole = train(*start(**enabled), 12)
    trainer, loader = start(train_micro_batch_size_per_gpu=2, **enabled)
    assert trainer.gradient_accumulation_steps() == 4
    parts = train(trainer, loader, 12)
    assert (trainer.global_steps, trainer.micro_steps) == (12, 48)
    assert hyperparameters(parts) == hyperparameters(whole)
    tolerance = {"fp32": 1e-5, "bf16": 0.05, "fp16": 0.01}[precision]
    assert [loss for loss, *_ in parts] == pytest.approx(
        [loss for loss, *_ in whole], rel=tolerance
    )


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_computes_in_16_bits_with_float32_weights(precision):
    trainer, loader = start(**{precision: FP16 if precision == "fp16" else {"enabled": True}})
    output = trainer(dataset(8).tensors[0])
    assert output.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert {p.dtype for p in trainer.parameters()} == {torch.float32}
    losses = [loss for loss, *_ in train(trainer, loader, 4)]
    reference = [loss for loss, *_ in train(*start(), 4)]
    assert losses == pytest.approx(reference, rel=0.05)
    assert losses != reference


@pytest.mark.parametrize(
    "changes",
    [
        {"fp16": FP16 | {"hysteresis": 1}},
        {"fp16": {"enabled": True, "loss_scale": 128}},
        {"bf16": {"enabled": True}},
        {},
        {"train_micro_batch_size_per_gpu": 2},
    ],
    ids=["fp16 dynamic", "fp16 static", "bf16", "fp32", "fp32 accumulated"],
)
def test_overflow_skips_the_step_and_does_not_advance_the_schedule(changes, caplog):
    trainer, loader = start(**changes)
    train(trainer, loader, 3)
    before = copy.deepcopy((trainer.module.state_dict(), trainer.optimizer.state_dict()))
    values, scale = (trainer.get_lr(), trainer.get_momentum()), trainer.cur_scale
    with caplog.at_level(logging.WARNING, "onecycle"):
        train(trainer, loader, 1, poison={3})
    assert "skipped step 4 because of non-finite gradients (1 skipped" in caplog.text
    assert not trainer.was_step_applied()
    assert (trainer.global_steps, trainer.skipped_steps) == (4, 1)
    assert (trainer.get_lr(), trainer.get_momentum()) == values
    after = (trainer.module.state_dict(), trainer.optimizer.state_dict())
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    halved = changes.get("fp16", {}).get("hysteresis") == 1
    assert trainer.cur_scale == (scale / 2 if halved else scale)
    train(trainer, loader, 1)
    assert trainer.was_step_applied()
    assert trainer.lr_scheduler.last_epoch == 4


def test_overflowing_loss_scale_decreases_until_steps_are_applied():
    trainer, loader = start(fp16={"enabled": True, "initial_scale_power": 120, "hysteresis": 1})
    seen = train(trainer, loader, 130)
    assert 0 < trainer.skipped_steps < 130
    assert trainer.lr_scheduler.last_epoch == 130 - trainer.skipped_steps
    assert seen[-1][0] < seen[0][0]


@pytest.mark.parametrize("precision", [{}, {"fp16": {"enabled": True, "initial_scale_power": 30}}])
@pytest.mark.parametrize("stop_at", [1, 5, 9])
def test_engine_resumed_takes_the_same_steps(tmp_path, stop_at, precision):
    changes = {"optimizer": {"type": "AdamW"}, "train_micro_batch_size_per_gpu": 4} | precision
    whole, loader = start(**changes)
    batches = [batch for _ in range(3) for batch in loader]

    def train_steps(trainer, start, end):
        seen = []
        for x, y in batches[2 * start : 2 * end]:
            loss = mse_loss(trainer(x).float(), y)
            seen.append((loss.item(), trainer.get_lr(), trainer.get_momentum(), trainer.cur_scale))
            trainer.backward(loss)
            trainer.step()
        return seen

    expected = train_steps(whole, 0, 12)
    stopped, _ = start(**changes)
    train_steps(stopped, 0, stop_at)
    assert stopped.save_checkpoint(tmp_path, client_state={"note": stop_at}) is True

    resumed, _ = start(**changes)
    path, client_state = resumed.load_checkpoint(tmp_path)
    assert path == str(tmp_path / f"global_step{stop_at}")
    assert client_state == {"note": stop_at}
    assert resumed.global_steps == stop_at
    assert train_steps(resumed, stop_at, 12) == expected[2 * stop_at :]
    torch.testing.assert_close(
        resumed.module.state_dict(), whole.module.state_dict(), rtol=0, atol=0
    )


def test_load_checkpoint_of_parts_restores_only_those(tmp_path):
    trainer, loader = start()
    train(trainer, loader, 3)
    trainer.save_checkpoint(tmp_path, tag="mine")
    fresh, _ = start()
    fresh.load_checkpoint(tmp_path, load_module_only=True)
    torch.testing.assert_close(fresh.module.state_dict(), trainer.module.state_dict())
    assert (fresh.global_steps, fresh.get_lr()) == (0, [0.01])
    fresh.load_checkpoint(tmp_path, tag="mine", load_optimizer_states=False)
    assert fresh.get_lr() == trainer.get_lr() != [0.01]
    assert not fresh.optimizer.state


def test_load_checkpoint_without_a_complete_checkpoint_raises(tmp_path):
    trainer, _ = start()
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))):
        trainer.load_checkpoint(tmp_path)
    trainer.save_checkpoint(tmp_path, tag="one", save_latest=False)
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))):
        trainer.load_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="'two'.* one"):
        trainer.load_checkpoint(tmp_path, tag="two")


def test_load_checkpoint_with_a_different_schedule_raises(tmp_path):
    trainer, _ = start()
    trainer.save_checkpoint(tmp_path)
    other = copy.deepcopy(CYCLE)
    other["params"]["cycle_max_lr"] = 7.0
    with pytest.raises(ValueError, match=r"`scheduler.params.cycle_max_lr` .*0\.05.* 7\.0"):
        start(scheduler=other)[0].load_checkpoint(tmp_path)


def test_engine_in_one_process_creates_no_process_group():
    trainer, loader = start()
    train(trainer, loader, 1)
    assert not dist.is_initialized()
    assert type(trainer.module) is torch.nn.Sequential


def test_initialize_with_custom_optimizer_and_scheduler_uses_them(tmp_path):
    config = {"train_batch_size": 8}
    net = model()
    custom = torch.optim.SGD(net.parameters(), lr=0.5)
    trainer, optimizer, _, scheduler = engine.initialize(
        config=config,
        model=net,
        optimizer=custom,
        lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5),
    )
    assert optimizer is custom
    x, y = dataset(8).tensors
    rates = []
    for _ in range(3):
        rates += trainer.get_lr()
        trainer.backward(mse_loss(trainer(x), y))
        trainer.step()
    assert rates == [0.5, 0.25, 0.125]
    trainer.save_checkpoint(tmp_path)
    trainer.load_checkpoint(tmp_path)
    assert scheduler.last_epoch == 3


def test_initialize_prefers_arguments_over_the_config_and_logs_it(caplog):
    net = model()
    custom = torch.optim.Adagrad(net.parameters(), lr=0.5)
    with caplog.at_level(logging.INFO, "onecycle"):
        trainer, optimizer, _, scheduler = engine.initialize(
            config=CONFIG,
            model=net,
            optimizer=custom,
            lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5),
        )
    assert optimizer is custom
    assert type(scheduler) is torch.optim.lr_scheduler.StepLR
    assert (trainer.optimizer_name(), trainer.scheduler_name()) == ("Adagrad", None)
    assert [record.getMessage() for record in caplog.records][:2] == [
        "the argument `optimizer` (Adagrad) replaces the config's `optimizer` (SGD)",
        "the argument `lr_scheduler` (<lambda>) replaces the config's `scheduler` (OneCycle)",
    ]
    trainer.backward(trainer(dataset(8).tensors[0]).mean())
    trainer.step()
    assert trainer.get_lr() == [0.25]


def initialize_deepspeed_with_both():
    net = model()
    custom = torch.optim.SGD(net.parameters(), lr=0.5)
    config = CONFIG | {"engine": {"backend": "deepspeed"}}
    trainer, *_ = engine.initialize(config=config, model=net, optimizer=custom)
    assert trainer.basic_optimizer is custom


def test_initialize_on_deepspeed_prefers_the_optimizer_argument():
    run_distributed_test(initialize_deepspeed_with_both, 1)


def test_param_groups_keep_their_learning_rates():
    net = model()
    groups = [
        {"params": net[0].parameters(), "lr": 0.1},
        {"params": net[2].parameters(), "lr": 0.01},
    ]
    with pytest.raises(ValueError, match=r"`cycle_min_lr` .* group 1: 0.01"):
        engine.initialize(config=CONFIG, model=net, model_parameters=groups)
    warmup = CONFIG | {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 1}}}
    trainer, *_ = engine.initialize(config=warmup, model=net, model_parameters=groups)
    trainer.lr_scheduler.step()
    assert trainer.get_lr() == [0.1, 0.01]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": None}, "`config` must be a path or a dict, got None"),
        ({"model": None}, "`model` must be a torch.nn.Module, got None"),
        (
            {"args": CONFIG, "model": None},
            "must be a parsed command line, got a value of type dict",
        ),
        ({"args": CONFIG, "config": None}, "`args`, the first argument, is a parsed command line"),
        ({"model": torch.nn.Linear}, "`model` must be a torch.nn.Module, got the class Linear"),
        (
            {"model": model().requires_grad_(False)},
            "`model` must have at least one parameter that requires gradients, got 0 of 4",
        ),
        (
            {"training_data": TensorDataset},
            "`training_data` must be a dataset or a data loader, got the class TensorDataset",
        ),
        (
            {"lr_scheduler": torch.optim.lr_scheduler.StepLR},
            "got the class StepLR: missing a required argument: 'step_size'. Pass `lambda",
        ),
        ({"optimizer": "AdamW"}, "got a value of type str. Pass one of these, or set `optimizer`"),
        *(
            ({"args": args}, f"`args`, the first argument, must be a parsed command line, got {of}")
            for args, of in [
                (model(), "a value of type Sequential"),
                (torch.nn.Linear, "the class Linear"),
                ("ds_config.json", "a value of type str"),
            ]
        ),
    ],
)
def test_initialize_with_invalid_arguments_raises(arguments, message):
    with pytest.raises(ValueError) as error:
        engine.initialize(**({"config": CONFIG, "model": model()} | arguments))
    assert message in str(error.value)


def test_schedule_durations_use_the_epoch_length_and_the_scale_ratio():
    run = {"max_duration": "4ep", "scale_schedule_ratio": 0.5}
    linear = {"type": "LinearWithWarmupScheduler", "params": {"t_warmup": "4ba", "t_max": "1dur"}}
    trainer, loader = start(scheduler=linear, engine=run)
    rates = [lr for _, (lr,), _ in train(trainer, loader, 15)]  # an epoch has 8 steps
    climb = [0.01 * k / 4 for k in range(4)]
    fall = [0.01 * (1 - k / 12) for k in range(11)]
    assert rates == pytest.approx([*climb, *fall])
    assert (trainer.epoch, trainer.run_is_over) == (1, False)


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_loader_with_max_duration_ends_with_the_run(ratio):
    run = {"max_duration": "2ep", "scale_schedule_ratio": ratio}
    trainer, loader = start(engine=run, scheduler={"type": "ConstantScheduler", "params": {}})
    for _ in range(4):
        for x, y in loader:
            trainer.backward(mse_loss(trainer(x), y))
            trainer.step()
    assert trainer.global_steps == 16 * ratio  # an epoch has 8 steps
    assert trainer.run_is_over
    with pytest.raises(MisuseError, match="run_is_over"):
        while True:
            list(loader)


def test_initialize_with_epoch_duration_but_no_data_raises():
    scheduler = {"type": "StepScheduler", "params": {"step_size": "1ep"}}
    with pytest.raises(ValueError, match="`step_size`.*'1ep'"):
        engine.initialize(config=CONFIG | {"scheduler": scheduler}, model=model())


def test_initialize_with_empty_model_parameters_raises():
    with pytest.raises(ValueError, match="empty parameter list"):
        engine.initialize(config=CONFIG, model=model(), model_parameters=[])


def test_initialize_with_empty_dataset_raises():
    with pytest.raises(ValueError, match=r"`len\(training_data\)` must be >= 1, got 0"):
        engine.initialize(config=CONFIG, model=model(), training_data=dataset(0))


def test_initialize_with_invalid_config_reports_every_problem():
    with pytest.raises(ConfigError) as error:
        start(gradient_cliping=1, train_batch_size=-1)
    assert {p.rule for p in error.value.problems} == {"unknown-key", "out-of-range"}


def test_log_describes_the_run_once_and_then_each_printed_step(caplog):
    with caplog.at_level(logging.INFO, "onecycle"):
        trainer, loader = start(steps_per_print=2)
        seen = train(trainer, loader, 4)
    setup, progress = (
        (records := [record.getMessage() for record in caplog.records])[:8],
        records[8:],
    )
    assert setup == [
        f"backend      PyTorch, one process ({trainer.config.backend.reason})",
        "device       cpu",
        "precision    fp32",
        "batch        8 = 8 per rank x 1 accumulation step x 1 rank",
        "optimizer    SGD, gradients clipped to norm 1 (default)",
        "schedule     OneCycle from config sets lr and momentum",
        "parameters   49",
        "checkpoints  not saved automatically (`engine.checkpoint.dir` is not set)",
    ]
    losses = [sum(loss for loss, *_ in seen[at : at + 2]) / 2 for at in (0, 2)]
    assert progress == [
        f"step {2 * at + 2}: mean loss {losses[at]:.4f}, "
        f"lr {seen[2 * at + 1][1][0]:.4g}, momentum {seen[2 * at + 1][2][0]:.4g}"
        for at in (0, 1)
    ]


def test_setup_log_wraps_long_lines_and_keeps_them_aligned(caplog):
    keys = {"zero_optimization": {"stage": 3}, "communication_data_type": "bf16"}
    keys |= {"managed_gradient_accumulation": False, "zero_allow_untested_optimizer": True}
    config = engine.load_config(CONFIG | keys)
    names = {"backend": "DeepSpeed, ZeRO stage 3, 64 ranks", "device": "cuda:0"}
    names |= {"precision": "fp32", "optimizer": "SGD"}
    with caplog.at_level(logging.INFO, "onecycle"):
        log_setup(config, **names, num_parameters=10**9, scheduler=None)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[1].startswith(13 * " " + "communication")
    assert lines[2] == "device       cuda:0"
    assert max(map(len, lines)) < 100


@pytest.mark.parametrize(
    ("every", "interval"),
    [
        (1000, "every 1,000 steps, in run"),
        (1e3, "every 1,000 steps, in run"),
        (" 1ep ", "every 1ep, in run"),
        (None, "only after a signal, in run (`engine.checkpoint.every` is not set)"),
    ],
)
def test_setup_log_says_how_often_checkpoints_are_saved(caplog, every, interval):
    config = engine.load_config(CONFIG | {"engine": {"checkpoint": {"dir": "run", "every": every}}})
    names = {"backend": "PyTorch", "device": "cpu", "precision": "fp32", "optimizer": "SGD"}
    with caplog.at_level(logging.INFO, "onecycle"):
        log_setup(config, **names, num_parameters=8, scheduler=None)
    assert f"checkpoints  {interval}" in caplog.messages


def test_initialize_logs_the_keys_without_effect(caplog):
    with caplog.at_level(logging.INFO, "onecycle"):
        start(prescale_gradients=False, zero_optimization={"stage": 0, "overlap_comm": True})
    assert "no effect    prescale_gradients, zero_optimization.overlap_comm" in caplog.messages


def test_initialize_logs_the_warnings_of_the_config(caplog):
    decay = {"type": "WarmupDecayLR", "params": {"total_num_steps": 50, "warmup_num_steps": 9}}
    decay["params"] |= {"warmup_max_lr": 0.01}
    with caplog.at_level(logging.WARNING, "onecycle"):
        start(scheduler=decay, engine={"max_duration": 1000})
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "50 of 1,000" in caplog.text


@pytest.mark.parametrize("level", ["NOTSET", pytest.param("ERROR", marks=pytest.mark.slow)])
def test_log_is_shown_unless_the_script_sets_its_level(tmp_path, level):
    script = f"""
import logging, torch, engine
logging.basicConfig()
logging.getLogger("onecycle").setLevel(logging.{level})
config = {{"train_batch_size": 1, "optimizer": {{"type": "SGD"}}, "steps_per_print": 1}}
trainer, *_ = engine.initialize(model=torch.nn.Linear(2, 1), config=config)
trainer.backward(trainer(torch.ones(1, 2)).mean())
trainer.step()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    assert ("step 1: mean loss" in done.stderr) == (level == "NOTSET")


def test_initialize_with_args_reads_their_deepspeed_config(tmp_path):
    import argparse
    import json

    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(CONFIG))
    args = argparse.Namespace(deepspeed_config=str(path))
    trainer, *_ = engine.initialize(args, model())
    assert trainer.config.name == str(path)


def test_initialize_with_args_in_a_dict_uses_the_config():
    trainer, *_ = engine.initialize({"local_rank": 0}, model(), config=CONFIG)
    assert trainer.train_batch_size() == CONFIG["train_batch_size"]


def test_model_on_the_meta_device_is_an_error():
    with torch.device("meta"):
        model = torch.nn.Linear(2, 1)
    config = {"train_batch_size": 1, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    with pytest.raises(ValueError, match="`weight` must not be on the meta device"):
        engine.initialize(config=config, model=model)


@pytest.mark.parametrize(
    ("half", "text"),
    [
        (1000, "The schedule ends at step 2,000, but the run ends at step 60"),
        ("10ep", "config: The run ends after 50% of the schedule"),
        (10, "The schedule ends at step 20 of 60. The learning rate then stays at 0."),
        ("2ep", "config: The schedule ends after 40% of the run. The learning rate then stays"),
        (30, None),
        ("5ep", None),
    ],
)
def test_schedule_that_does_not_end_with_a_run_in_epochs_is_reported_once(caplog, half, text):
    cycle = {"cycle_min_lr": 0, "cycle_max_lr": 0.2, "cycle_first_step_size": half}
    config = {
        "train_batch_size": 4,
        "optimizer": {"type": "SGD"},
        "scheduler": {"type": "OneCycle", "params": cycle},
        "engine": {"max_duration": "10ep"},
    }
    data = TensorDataset(torch.ones(24, 2))
    engine.initialize(config=config, model=torch.nn.Linear(2, 1), training_data=data)
    assert caplog.text.count("Specify durations as fractions") == bool(text)
    assert (text or "") in caplog.text


@pytest.mark.parametrize("data", ["data/train", Path("data")])
def test_path_as_training_data_is_rejected(data):
    with pytest.raises(ValueError, match="`training_data` must be a dataset or a data loader"):
        engine.initialize(
            config={"train_batch_size": 4}, model=torch.nn.Linear(2, 1), training_data=data
        )
