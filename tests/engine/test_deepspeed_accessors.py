"""The methods of DeepSpeed's engine, and DeepSpeed's scheduler classes, in this package."""

import subprocess
import sys

import pytest
import torch

import engine
import schedules
from engine.errors import MisuseError
from schedules import lr_schedules
from tests.testing.distributed import run_distributed_test


def start(make=lambda: torch.nn.Linear(2, 1), **changes):
    config = {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 2}},
    } | changes
    torch.manual_seed(0)
    trainer, *_ = engine.initialize(config=config, model=make())
    return trainer


X = torch.arange(8.0).view(4, 2)


def test_engine_accessors_return_the_values_of_the_config():
    trainer = start()
    assert (trainer.global_rank, trainer.local_rank, trainer.world_size) == (0, 0, 1)
    assert trainer.optimizer_name() == "SGD"
    assert trainer.scheduler_name() == "WarmupLR"
    assert (trainer.fp16_enabled(), trainer.bfloat16_enabled()) == (False, False)
    assert (trainer.gradient_clipping(), trainer.steps_per_print()) == (1.0, None)
    assert (trainer.zero_optimization(), trainer.zero_optimization_stage()) == (False, 0)
    assert trainer.basic_optimizer is trainer.optimizer
    assert trainer.in_features == 2  # an attribute of the model
    with pytest.raises(AttributeError, match="nonsense"):
        _ = trainer.nonsense


def test_names_that_only_deepspeed_has_raise_an_error_that_names_the_backend():
    trainer = start()
    with pytest.raises(AttributeError, match=r'Set "engine": \{"backend": "deepspeed"\}'):
        trainer.offload_states()
    with pytest.raises(AttributeError, match=r"Neither the training engine nor the model \(Lin"):
        _ = trainer.nonsense
    assert getattr(trainer, "tput_timer", None) is None


def test_settings_have_deepspeeds_names_and_values():
    trainer = start(fp16={"enabled": True, "loss_scale": 128, "initial_scale_power": 4})
    assert (trainer.loss_scale(), trainer.dynamic_loss_scale(), trainer.cur_scale) == (
        128,
        False,
        128,
    )
    assert (trainer.initial_dynamic_scale(), trainer.dump_state()) == (16, False)
    assert trainer.optimizer_params()["momentum"] == 0.9
    assert trainer.scheduler_params()["warmup_num_steps"] == 2
    assert trainer.get_batch_info() == (4, 2, 2)
    assert (trainer.get_type(), trainer.mp_world_size) == ([0.0], 1)
    assert trainer.zero_optimization_partition_weights() is False
    assert trainer.config["train_batch_size"] == 4
    assert ("fp16" in trainer.config, trainer.config.get("bf16")) == (True, None)
    assert start(fp16={"enabled": True}).loss_scale() == 0  # dynamic, as in DeepSpeed


def test_optimizer_has_deepspeeds_attributes_for_overflows():
    trainer = start(fp16={"enabled": True, "initial_scale_power": 4, "hysteresis": 1})
    optimizer = trainer.optimizer
    assert (optimizer.overflow, optimizer.cur_scale) == (False, 16.0)
    for factor in (1.0, float("inf")):
        trainer.backward(trainer(X[:2]).float().mean() * factor)
        trainer.step()
    assert (optimizer.overflow, optimizer.cur_scale, trainer.cur_scale) == (True, 8.0, 8.0)


def test_monitor_writes_events_of_the_script(tmp_path):
    trainer = start(csv_monitor={"enabled": True, "output_path": str(tmp_path), "job_name": "a"})
    assert trainer.monitor.enabled
    trainer.monitor.write_events([("Train/my_metric", torch.tensor(2.5), 40)])
    assert (tmp_path / "a" / "Train_my_metric.csv").read_text().split() == [
        "step,my_metric",
        "40,2.5",
    ]


def load_part_of_a_dataset():
    trainer = start(zero_optimization={"stage": 1}, engine={"backend": "torch"})
    dataset = torch.utils.data.TensorDataset(torch.arange(8))
    for_evaluation = trainer.deepspeed_io(dataset, route="eval")
    for_training = trainer.deepspeed_io(dataset, batch_size=4)
    trained = torch.cat([batch for (batch,) in for_training])
    return [batch.tolist() for (batch,) in for_evaluation], trained.tolist()


def test_deepspeed_io_splits_a_dataset_across_ranks():
    (first, trained), (second, others) = run_distributed_test(load_part_of_a_dataset, 2)
    assert (first, second) == ([[0, 2], [4, 6]], [[1, 3], [5, 7]])
    assert sorted(trained + others) == list(range(8))
    assert trained != sorted(trained) or others != sorted(others)


def average_before_the_step():
    trainer = start(train_batch_size=8)
    for micro_batch in range(2):
        x = X[:2] * (trainer.global_rank + micro_batch)
        trainer(x).mean().backward()
        trainer.allreduce_gradients()  # only the last one of a step averages
        if micro_batch == 0:
            trainer.step()
    return trainer.module.weight.grad.tolist()


def test_allreduce_gradients_averages_before_the_step():
    first, second = run_distributed_test(average_before_the_step, 2)
    mean = X[:2].mean(0)
    assert first == second == [pytest.approx((mean * 2).tolist())]


def weights(trainer):
    return [p.detach().clone() for p in trainer.module.parameters()]


class Loss(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(2, 1)

    def forward(self, x):
        return self.net(x).pow(2).mean()


@pytest.mark.parametrize("way", ["scale", "loss.backward", "set_boundary", "train_batch"])
def test_step_with_each_way_to_run_a_batch_gives_equal_parameters(way):
    usual, other = start(Loss), start(Loss, steps_per_print=1)
    for _ in range(3):
        for half in X.split(2):
            usual.backward(usual(half))
            usual.step()
        if way == "train_batch":
            other.train_batch(iter(X.split(2)))
            continue
        for index, half in enumerate(X.split(2)):
            if way == "set_boundary":
                other.set_gradient_accumulation_boundary(index == 1)
            loss = other(half)
            if way == "scale":
                other.scale(loss).backward()
            elif way == "loss.backward":
                loss.backward()
            else:
                other.backward(loss)
            if way != "set_boundary" or index == 1:
                other.step()
    assert all(torch.equal(a, b) for a, b in zip(weights(usual), weights(other), strict=True))
    assert other.global_steps == 3
    assert other.global_samples == 12


def test_scale_of_a_tensor_that_is_not_scalar_raises():
    trainer = start()
    with pytest.raises(ValueError, match=r"`loss` must be .* shape \(2, 1\)"):
        trainer.scale(trainer(X[:2]))


def test_step_in_fp16_with_an_unscaled_loss_raises():
    trainer = start(fp16={"enabled": True})
    for half in X.split(2):
        trainer(half).float().pow(2).mean().backward()
        if trainer.is_gradient_accumulation_boundary():
            with pytest.raises(RuntimeError, match="fp16 requires a scaled loss"):
                trainer.step()
        else:
            trainer.step()


def test_eval_batch_keeps_the_parameters_and_the_training_mode():
    trainer = start(lambda: torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Flatten(0)))
    before = weights(trainer)
    with pytest.raises(ValueError, match=r"`data_iter` must yield 2 micro-batches per step, got 1"):
        trainer.eval_batch(iter([X[:1]]))
    assert trainer.training
    trainer.module[1].eval()
    loss = trainer.eval_batch(iter([X[:1], X[1:2]]))
    assert loss.numel() == 1
    assert [module.training for module in trainer.module] == [True, False]
    assert all(torch.equal(a, b) for a, b in zip(before, weights(trainer), strict=True))


def test_zero_grad_after_no_sync_clears_the_gradients():
    trainer = start()
    with trainer.no_sync():
        trainer.backward(trainer(X[:2]).mean())
    trainer.zero_grad()
    assert all(p.grad is None for p in trainer.module.parameters())


def test_micro_steps_set_by_the_script_determine_the_next_step():
    trainer = start()
    trainer.micro_steps = 7  # of two micro-batches per step
    trainer.global_steps = 10
    assert trainer.is_gradient_accumulation_boundary()
    trainer.backward(trainer(X[:2]).mean())
    assert trainer.step()
    assert (trainer.micro_steps, trainer.global_steps) == (8, 11)
    assert not trainer.is_gradient_accumulation_boundary()
    trainer.backward(trainer(X[:2]).mean())
    assert not trainer.step()


def test_no_sync_at_zero_stage_2_raises():
    trainer = start(zero_optimization={"stage": 2}, engine={"backend": "torch"})
    with pytest.raises(MisuseError, match="ZeRO stage 2 or 3"), trainer.no_sync():
        pass


def test_no_sync_nested_raises_and_can_be_entered_again():
    trainer = start()
    raises = pytest.raises(MisuseError, match="must not be nested")
    with trainer.no_sync(), raises, trainer.no_sync():
        pass
    with trainer.no_sync():  # the outer context has ended, despite the error
        pass


def test_step_inside_no_sync_raises():
    trainer = start()
    trainer.backward(trainer(X[:2]).mean())
    with trainer.no_sync(), pytest.raises(MisuseError, match=r"inside `no_sync\(\)`"):
        trainer.step()
    assert trainer.micro_steps == 0
    trainer.step()
    assert trainer.micro_steps == 1


def test_lr_scheduler_assigned_to_the_engine_is_stepped():
    trainer = start()
    trainer.lr_scheduler = torch.optim.lr_scheduler.StepLR(trainer.optimizer, 1, gamma=0.5)
    lr = trainer.get_lr()[0]
    for half in X.split(2):
        trainer.backward(trainer(half).mean())
        trainer.step()
    assert trainer.get_lr() == [lr / 2]


def test_initialize_with_the_optimizer_of_a_different_model_raises():
    foreign = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="does not train any parameter of `model`"):
        engine.initialize(
            config={"train_batch_size": 1}, model=torch.nn.Linear(1, 1), optimizer=foreign
        )


def test_deepspeed_scheduler_classes_accept_positional_arguments():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
    cycle = lr_schedules.OneCycle(optimizer, 0.1, 0.5, 0.0, 2, cycle_min_mom=0.7)
    assert cycle.schedule.cycle_first_step_size == 2
    assert cycle.get_lr() == [0.1]
    decay = lr_schedules.WarmupDecayLR(optimizer, 10, 0.0, 0.2, 4, "linear")
    assert (decay.schedule.total_num_steps, decay.schedule.warmup_num_steps) == (10, 4)
    with pytest.raises(TypeError, match="multiple values for one argument"):
        lr_schedules.OneCycle(optimizer, 0.1, cycle_min_lr=0.1)


SCRIPT = """
import warnings; warnings.simplefilter("ignore")
import os; os.environ["LOCAL_RANK"] = "0"
import torch, torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
import deepspeed, engine
assert "PolynomialWithWarmupScheduler" in engine.register_with_deepspeed()
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
model = torch.nn.Linear(2, 1)
trainer, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config={
    "train_batch_size": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.5, "torch_adam": True}},
    "scheduler": {"type": "CosineAnnealingWithWarmupScheduler",
                  "params": {"t_warmup": 2, "t_max": 6}},
})
lrs = []
for _ in range(4):
    lrs.append(trainer.optimizer.param_groups[0]["lr"])
    trainer.backward(trainer(torch.ones(2, 2)).mean())
    trainer.step()
assert lrs[:3] == [0.0, 0.25, 0.5] and 0.4 < lrs[3] < 0.5, lrs
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_register_with_deepspeed_makes_schedules_available_to_deepspeed():
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]


def test_feedback_scheduler_assigned_to_the_engine_receives_the_loss():
    trainer = start()
    autowu = schedules.attach("AutoWU", trainer.optimizer, steps_per_epoch=5, total_epochs=20)
    trainer.lr_scheduler = autowu
    losses = [trainer(half).mean() for half in X.split(2)]
    for loss in losses:
        trainer.backward(loss)
        trainer.step()
    assert list(autowu.state.losses) == [pytest.approx(torch.stack(losses).mean().item())]
