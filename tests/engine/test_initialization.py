"""The engine in one process: the loop, the arithmetic of a batch, skipped updates, resuming."""

import copy
import logging
import math
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import mse_loss
from torch.utils.data import TensorDataset

import engine
import schedules
from engine import ConfigError

CYCLE = {
    "type": "OneCycle",
    "params": {
        "cycle_min_lr": 0.01,
        "cycle_max_lr": 0.05,
        "cycle_first_step_size": 4,
        "cycle_min_mom": 0.8,
        "cycle_max_mom": 0.95,
    },
}
CONFIG = {
    "train_batch_size": 8,
    "optimizer": {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9}},
    "scheduler": CYCLE,
}

# A scale at which these small models never overflow by themselves.
FP16 = {"enabled": True, "initial_scale_power": 8}


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def dataset(samples=64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 4, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True))


def start(config=CONFIG, **changes):
    config = copy.deepcopy(config) | changes
    trainer, *_, loader, _ = engine.initialize(
        config=config, model=model(), training_data=dataset()
    )
    return trainer, loader


def train(trainer, loader, updates, poison=()):
    """Train for some updates and return (loss, lr, momentum) as each used them."""
    seen = []
    total = 0.0
    end = trainer.global_steps + updates
    while True:
        for x, y in loader:
            if trainer.global_steps == end:
                return seen
            used = (trainer.get_lr(), trainer.get_momentum())
            loss = mse_loss(trainer(x).float(), y)
            if trainer.global_steps in poison:
                loss = loss * math.inf
            trainer.backward(loss)
            total += loss.item() / trainer.gradient_accumulation_steps()
            last = trainer.is_gradient_accumulation_boundary()
            trainer.step()
            if last:
                seen.append((total, *used))
                total = 0.0


def hyperparameters(seen):
    return [(lr, momentum) for _, lr, momentum in seen]


def test_the_four_results_and_the_trace():
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


def test_it_updates_as_a_loop_by_hand_would():
    trainer, loader = start(gradient_clipping=0.5)
    by_hand = model()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.01, momentum=0.9)
    binder = schedules.attach(CYCLE, optimizer)
    for x, y in loader:
        mse_loss(by_hand(x), y).backward()
        norm = torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        binder.step()
        trainer.backward(mse_loss(trainer(x), y))
        trainer.step()
        assert trainer.get_global_grad_norm() == pytest.approx(float(norm), rel=1e-5)
    for ours, theirs in zip(trainer.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_accumulation_does_not_change_the_run(precision):
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
def test_mixed_precision_computes_in_it_and_keeps_float32_weights(precision):
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
def test_an_overflow_skips_the_update_and_leaves_the_schedule_where_it_was(changes, caplog):
    trainer, loader = start(**changes)
    train(trainer, loader, 3)
    before = copy.deepcopy((trainer.module.state_dict(), trainer.optimizer.state_dict()))
    values, scale = (trainer.get_lr(), trainer.get_momentum()), trainer.loss_scale
    with caplog.at_level(logging.WARNING, "onecycle"):
        train(trainer, loader, 1, poison={3})
    assert "update 4 skipped: its gradients are not finite (1 skipped so far)" in caplog.text
    assert not trainer.was_step_applied()
    assert (trainer.global_steps, trainer.skipped_steps) == (4, 1)
    assert (trainer.get_lr(), trainer.get_momentum()) == values
    after = (trainer.module.state_dict(), trainer.optimizer.state_dict())
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    halved = changes.get("fp16", {}).get("hysteresis") == 1
    assert trainer.loss_scale == (scale / 2 if halved else scale)
    train(trainer, loader, 1)
    assert trainer.was_step_applied()
    assert trainer.lr_scheduler.last_epoch == 4


def test_an_overflowing_scale_comes_down_until_updates_are_applied():
    trainer, loader = start(fp16={"enabled": True, "initial_scale_power": 120, "hysteresis": 1})
    seen = train(trainer, loader, 130)
    assert 0 < trainer.skipped_steps < 130
    assert trainer.lr_scheduler.last_epoch == 130 - trainer.skipped_steps
    assert seen[-1][0] < seen[0][0]


@pytest.mark.parametrize("precision", [{}, {"fp16": {"enabled": True, "initial_scale_power": 30}}])
@pytest.mark.parametrize("kill_at", [1, 5, 9])
def test_a_resumed_run_is_the_same_run(tmp_path, kill_at, precision):
    changes = {"optimizer": {"type": "AdamW"}, "train_micro_batch_size_per_gpu": 4} | precision
    whole, loader = start(**changes)
    batches = [batch for _ in range(3) for batch in loader]

    def updates(trainer, begin, end):
        seen = []
        for x, y in batches[2 * begin : 2 * end]:
            loss = mse_loss(trainer(x).float(), y)
            seen.append((loss.item(), trainer.get_lr(), trainer.get_momentum(), trainer.loss_scale))
            trainer.backward(loss)
            trainer.step()
        return seen

    expected = updates(whole, 0, 12)
    killed, _ = start(**changes)
    updates(killed, 0, kill_at)
    assert killed.save_checkpoint(tmp_path, client_state={"note": kill_at}) is True

    resumed, _ = start(**changes)
    path, client_state = resumed.load_checkpoint(tmp_path)
    assert path == str(tmp_path / f"global_step{kill_at}")
    assert client_state == {"note": kill_at}
    assert resumed.global_steps == kill_at
    assert updates(resumed, kill_at, 12) == expected[2 * kill_at :]
    torch.testing.assert_close(
        resumed.module.state_dict(), whole.module.state_dict(), rtol=0, atol=0
    )


def test_loading_parts_of_a_checkpoint(tmp_path):
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


def test_nothing_to_resume_from_is_an_error(tmp_path):
    trainer, _ = start()
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        trainer.load_checkpoint(tmp_path)
    trainer.save_checkpoint(tmp_path, tag="one", save_latest=False)
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        trainer.load_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="the checkpoint 'two'.*: one"):
        trainer.load_checkpoint(tmp_path, tag="two")


def test_another_schedule_is_not_resumed(tmp_path):
    trainer, _ = start()
    trainer.save_checkpoint(tmp_path)
    other = copy.deepcopy(CYCLE)
    other["params"]["cycle_max_lr"] = 7.0
    with pytest.raises(ValueError, match=r"`scheduler.params.cycle_max_lr` is 0.05 .* 7.0 now"):
        start(scheduler=other)[0].load_checkpoint(tmp_path)


def test_one_process_makes_no_process_group():
    trainer, loader = start()
    train(trainer, loader, 1)
    assert not dist.is_initialized()
    assert type(trainer.module) is torch.nn.Sequential


def test_an_optimizer_and_a_schedule_of_the_script(tmp_path):
    config = {"train_batch_size": 8}
    net = model()
    mine = torch.optim.SGD(net.parameters(), lr=0.5)
    trainer, optimizer, _, scheduler = engine.initialize(
        config=config,
        model=net,
        optimizer=mine,
        lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5),
    )
    assert optimizer is mine
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


def test_groups_with_learning_rates_of_their_own_are_not_flattened():
    net = model()
    groups = [
        {"params": net[0].parameters(), "lr": 0.1},
        {"params": net[2].parameters(), "lr": 0.01},
    ]
    with pytest.raises(ValueError, match="`cycle_min_lr` must be a list of 2 numbers"):
        engine.initialize(config=CONFIG, model=net, model_parameters=groups)
    warmup = CONFIG | {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 1}}}
    trainer, *_ = engine.initialize(config=warmup, model=net, model_parameters=groups)
    trainer.lr_scheduler.step()
    assert trainer.get_lr() == [0.1, 0.01]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": None}, "`config` must be a path or a dict, but is None instead."),
        ({"model": None}, "`model` must be a torch.nn.Module, but is None instead."),
        ({"config": {"train_batch_size": 8}}, 'Add "optimizer": {"type": "AdamW"'),
        (
            {"optimizer": torch.optim.SGD},
            "the optimizer must have one source, but is given twice: as `optimizer` of config",
        ),
        (
            {"lr_scheduler": torch.optim.lr_scheduler.StepLR},
            "the scheduler must have one source, but is given twice: as `scheduler` of config",
        ),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError) as error:
        engine.initialize(**({"config": CONFIG, "model": model()} | arguments))
    assert message in str(error.value)


def test_durations_follow_the_loader_and_the_scale_schedule():
    run = {"max_duration": "4ep", "scale_schedule_ratio": 0.5}
    linear = {"type": "LinearWithWarmupScheduler", "params": {"t_warmup": "4ba", "t_max": "1dur"}}
    trainer, loader = start(scheduler=linear, engine=run)
    rates = [lr for _, (lr,), _ in train(trainer, loader, 18)]  # an epoch is 8 updates
    climb = [0.01 * k / 4 for k in range(4)]
    fall = [0.01 * (1 - k / 12) for k in range(12)]
    assert rates == pytest.approx([*climb, *fall, 0.0, 0.0])


def test_a_duration_in_epochs_needs_data():
    scheduler = {"type": "StepScheduler", "params": {"step_size": "1ep"}}
    with pytest.raises(ValueError, match="`step_size`: '1ep' needs the length of an epoch"):
        engine.initialize(config=CONFIG | {"scheduler": scheduler}, model=model())


def test_no_parameters_are_not_all_parameters():
    with pytest.raises(ValueError, match="empty parameter list"):
        engine.initialize(config=CONFIG, model=model(), model_parameters=[])


def test_an_empty_dataset_is_refused():
    with pytest.raises(ValueError, match="must hold at least 1 samples, but holds 0 instead"):
        engine.initialize(config=CONFIG, model=model(), training_data=dataset(0))


def test_a_wrong_config_is_refused_with_all_of_its_problems():
    with pytest.raises(ConfigError) as error:
        start(gradient_cliping=1, train_batch_size=-1)
    assert {p.rule for p in error.value.problems} == {"unknown-key", "out-of-range"}


def test_the_log_says_once_what_runs_and_then_what_each_update_used(caplog):
    with caplog.at_level(logging.INFO, "onecycle"):
        trainer, loader = start(steps_per_print=2)
        seen = train(trainer, loader, 4)
    first, *progress = [record.getMessage() for record in caplog.records]
    assert first == (
        "PyTorch, one process, cpu, fp32 (no key selects DeepSpeed); "
        "batch size 8 = 8 per rank x 1 accumulation step x 1 rank; "
        "SGD updates 49 parameters, gradients clipped at norm 1; "
        "OneCycle of config drives lr and momentum"
    )
    losses = [sum(loss for loss, *_ in seen[at : at + 2]) / 2 for at in (0, 2)]
    assert progress == [
        f"update {2 * at + 1}: loss {losses[at]:.4f}, "
        f"lr {seen[2 * at + 1][1][0]:.4g}, momentum {seen[2 * at + 1][2][0]:.4g}"
        for at in (0, 1)
    ]


def test_what_is_hardly_meant_is_logged_at_the_start(caplog):
    decay = {"type": "WarmupDecayLR", "params": {"total_num_steps": 50, "warmup_num_steps": 9}}
    decay["params"] |= {"warmup_max_lr": 0.01}
    with caplog.at_level(logging.WARNING, "onecycle"):
        start(scheduler=decay, engine={"max_duration": 1000})
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "The schedule ends at step 50 of 1000" in caplog.text


@pytest.mark.parametrize("level", ["NOTSET", pytest.param("ERROR", marks=pytest.mark.slow)])
def test_the_log_is_seen_though_the_script_has_configured_its_own(tmp_path, level):
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
    assert ("update 0: loss" in done.stderr) == (level == "NOTSET")


def test_config_by_the_command_line(tmp_path):
    import argparse
    import json

    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(CONFIG))
    args = argparse.Namespace(deepspeed_config=str(path))
    trainer, *_ = engine.initialize(args, model())
    assert trainer.config.name == str(path)
