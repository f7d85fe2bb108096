"""The engine on a fake backend: accumulation, skipped steps, schedules and checkpoints.

`test_initialization`, `test_feedback` and `backends/` test real backends.
"""

import pytest
import torch

from engine.errors import MisuseError
from engine.training.monitors import Monitors
from tests.testing.fake_backend import FakeBackend, build_engine

WARMUP = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.4, "warmup_num_steps": 4}}
WARMUP["params"] |= {"warmup_type": "linear"}
PLATEAU = {"type": "ReduceLROnPlateau", "params": {"patience": 0, "factor": 0.5}}
AUTOWU = {"type": "AutoWU", "params": {"steps_per_epoch": 10, "total_epochs": 20}}
X = torch.ones(2, 2)


def train(trainer, micro_batches, **arguments):
    """Train on a number of micro-batches, and return the result of `step` for each."""
    applied = []
    for _ in range(micro_batches):
        trainer.backward(trainer(X).mean())
        applied.append(trainer.step(**arguments))
    return applied


def test_step_accumulating_applies_at_the_boundary_only():
    backend = FakeBackend()
    trainer = build_engine(backend, gradient_accumulation_steps=3, scheduler=WARMUP)
    assert train(trainer, 6) == [False, False, True] * 2
    assert backend.arguments("is_last") == [False, False, True] * 2
    assert backend.arguments("backward") == [3] * 6
    assert backend.arguments("step") == [1, 1]
    assert (trainer.global_steps, trainer.micro_steps, trainer.global_samples) == (2, 6, 12)
    assert trainer.lr_scheduler.last_epoch == 2


def test_step_accumulating_equals_one_whole_batch():
    whole, parts = FakeBackend(), FakeBackend()
    train(build_engine(whole), 3)
    train(build_engine(parts, gradient_accumulation_steps=4), 12)
    torch.testing.assert_close(whole.model.state_dict(), parts.model.state_dict())


def test_backward_without_scaling_by_accumulation_does_not_divide():
    backend = FakeBackend()
    trainer = build_engine(backend, gradient_accumulation_steps=2)
    loss = trainer(X).mean()
    assert trainer.backward(loss, scale_wrt_gas=False) is loss
    assert backend.arguments("backward") == [1]


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda x: x, "got a tensor of shape (2,)"),
        (lambda x: x.sum().detach(), "got a tensor of shape () that does not"),
        (lambda x: 3.0, "got 3.0"),
    ],
)
@pytest.mark.parametrize("method", ["backward", "scale"])
def test_backward_and_scale_of_an_invalid_loss_raise(method, loss, message):
    trainer = build_engine()
    with pytest.raises(ValueError) as error:
        getattr(trainer, method)(loss(torch.ones(2, requires_grad=True)))
    assert message in str(error.value)


def test_step_skipped_changes_neither_the_schedule_nor_the_weights():
    backend = FakeBackend()
    trainer = build_engine(backend, scheduler=WARMUP)
    train(trainer, 2)
    before = backend.snapshot()
    backend.overflows_next = True
    assert train(trainer, 1) == [False]
    torch.testing.assert_close(backend.snapshot(), before, rtol=0, atol=0)
    assert not trainer.was_step_applied()
    assert (trainer.global_steps, trainer.skipped_steps) == (3, 1)
    assert trainer.lr_scheduler.last_epoch == 2
    assert train(trainer, 1) == [True]
    assert trainer.get_lr() == [pytest.approx(0.3)]


def test_custom_scheduler_is_stepped_after_applied_steps_only():
    backend = FakeBackend()
    trainer = build_engine(
        backend, lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    )
    train(trainer, 1)
    backend.overflows_next = True
    train(trainer, 1)
    assert trainer.get_lr() == [0.05]


def test_set_gradient_accumulation_boundary_overrides_the_count_of_micro_batches():
    backend = FakeBackend()
    trainer = build_engine(backend, gradient_accumulation_steps=2)
    trainer.set_gradient_accumulation_boundary(is_boundary=False)
    assert train(trainer, 3) == [False] * 3
    trainer.set_gradient_accumulation_boundary(is_boundary=True)
    assert train(trainer, 2) == [True] * 2
    assert backend.arguments("is_last") == [False] * 3 + [True] * 2


def test_step_after_a_direct_loss_backward_divides_by_the_accumulation():
    backend = FakeBackend()
    trainer = build_engine(backend, gradient_accumulation_steps=2)
    for _ in range(2):
        trainer(X).mean().backward()
        trainer.step()
    for _ in range(2):
        trainer.scale(trainer(X).mean()).backward()
        trainer.step()
    assert backend.arguments("step") == [2, 1]


def test_step_after_an_unscaled_backward_under_a_loss_scale_raises():
    trainer = build_engine(FakeBackend(loss_scale=256.0))
    trainer(X).mean().backward()
    with pytest.raises(RuntimeError, match="fp16 requires a scaled loss"):
        trainer.step()


def test_feedback_schedule_receives_the_mean_over_ranks_and_micro_batches():
    backend = FakeBackend(others=(1.0, 3.0))
    trainer = build_engine(backend, gradient_accumulation_steps=2, scheduler=AUTOWU)
    losses = []
    for _ in range(2):
        loss = trainer(X * len(losses)).mean()
        losses.append(loss.item())
        trainer.backward(loss)
        trainer.step()
    expected = (sum(losses) / 2 + 1.0 + 3.0) / 3
    assert list(trainer.lr_scheduler.state.losses) == [pytest.approx(expected)]


def test_metric_is_averaged_over_ranks_and_kept_through_a_skipped_step():
    backend = FakeBackend(others=(5.0,))
    trainer = build_engine(backend, scheduler=PLATEAU)
    train(trainer, 1, metric=1.0)
    backend.overflows_next = True
    train(trainer, 1, metric=2.0)
    assert trainer.get_lr() == [0.1]
    train(trainer, 2)
    assert trainer.get_lr() == [0.05]
    train(trainer, 1, metric=0.0)  # (0 + 5) / 2 is the best so far
    assert trainer.get_lr() == [0.05]


def test_no_sync_suspends_synchronization_and_steps():
    backend = FakeBackend()
    trainer = build_engine(backend)
    with trainer.no_sync():
        trainer.backward(trainer(X).mean())
        with pytest.raises(MisuseError, match="inside `no_sync"):
            trainer.step()
        with pytest.raises(MisuseError, match="nested"), trainer.no_sync():
            pass
    train(trainer, 1)
    assert backend.arguments("is_last") == [False, True]
    sharded = build_engine(zero_optimization={"stage": 2})
    with pytest.raises(MisuseError, match="stage 2 or 3"), sharded.no_sync():
        pass


def test_step_past_the_steps_of_this_run_raises():
    trainer = build_engine(engine={"steps_this_run": 2})
    train(trainer, 2)
    assert trainer.run_is_over
    with pytest.raises(RuntimeError, match=r"2 steps, as set by `engine.steps_this_run`"):
        train(trainer, 1)


def test_checkpoint_is_saved_when_due_and_restores_the_run(tmp_path):
    sections = {
        "scheduler": WARMUP,
        "gradient_accumulation_steps": 2,
        "engine": {"checkpoint": {"dir": str(tmp_path), "every": 2}},
    }
    first = FakeBackend()
    train(build_engine(first, **sections), 9)
    saved = [path.name for path in tmp_path.glob("global_step*")]
    assert sorted(saved) == ["global_step2", "global_step4"]
    second = FakeBackend()
    trainer = build_engine(second, **sections)
    trainer.load_checkpoint(tmp_path)
    assert (trainer.global_steps, trainer.lr_scheduler.last_epoch) == (4, 4)
    torch.testing.assert_close(second.snapshot(), first.snapshot(), rtol=0, atol=0)


def test_monitors_receive_the_values_of_each_step():
    events = []

    class Monitor:
        def write_events(self, written):
            events.append({event.name.rpartition("/")[2]: event for event in written})

    backend = FakeBackend(others=(2.0,))
    trainer = build_engine(
        backend, monitors=Monitors([Monitor()]), scheduler=WARMUP, csv_monitor={"enabled": True}
    )
    loss = trainer(X).mean()
    trainer.backward(loss)
    trainer.step()
    backend.overflows_next = True
    train(trainer, 1)
    assert [step["lr"].value for step in events] == [0.0, pytest.approx(0.1)]
    assert [step["skipped_steps"].value for step in events] == [0, 1]
    assert [step["lr"].samples for step in events] == [4, 8]
    assert events[0]["train_loss"].value == pytest.approx((loss.item() + 2.0) / 2)


def test_engine_returns_attributes_of_the_model():
    trainer = build_engine()
    assert trainer.in_features == 2
    with pytest.raises(AttributeError, match="nonsense"):
        _ = trainer.nonsense
