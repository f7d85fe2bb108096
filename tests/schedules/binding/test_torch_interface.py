"""The attributes of PyTorch's schedulers, with PyTorch's meaning."""

import copy
import pickle

import pytest
import torch

from schedules import attach
from tests.schedules.test_torch_scheduler import CYCLE, weights

OF_TORCH = torch.optim.lr_scheduler


def make(name, **params):
    optimizer = torch.optim.SGD(weights(), lr=1.0, momentum=0.9)
    return optimizer, attach(name, optimizer, **params)


def run(optimizer, binder, steps):
    for _ in range(steps):
        optimizer.step()
        binder.step()


def test_last_epoch_set_to_minus_1_restarts_the_schedule():
    optimizer, binder = make("OneCycle", **CYCLE)
    run(optimizer, binder, 5)
    binder.last_epoch = -1
    binder.step()
    assert (binder.get_last_lr(), binder.get_mom()) == ([0.1], [0.95])


def test_last_epoch_set_back_continues_from_there():
    optimizer, binder = make("WarmupStableDecay", warmup_steps=4, total_steps=12, decay_steps=4)
    run(optimizer, binder, 11)
    binder.last_epoch = 0
    binder.step()
    assert binder.get_last_lr() == [0.25]
    optimizer, binder = make("MultiStepLR", milestones=[4])
    run(optimizer, binder, 4)
    binder.last_epoch -= 2
    binder.step()
    assert (binder.last_epoch, binder.get_last_lr()) == (3, [1.0])


def test_last_epoch_below_minus_1_is_rejected():
    _, binder = make("MultiStepLR", milestones=[4])
    binder.last_epoch = -3
    with pytest.raises(ValueError, match="`last_epoch` must be at least -1 when .* called, got -3"):
        binder.step()


def test_last_epoch_of_a_feedback_schedule_is_rejected():
    optimizer, binder = make("AutoWU", total_epochs=20, steps_per_epoch=9)
    optimizer.step()
    binder.step(1.0)
    binder.last_epoch = 5
    with pytest.raises(
        ValueError, match=r"must be the number of steps taken \(1\), got 5\. AutoWU depends"
    ):
        binder.step(1.0)


def test_get_lr_is_the_lr_at_last_epoch():
    _, binder = make("LinearLR", start_factor=1.0, end_factor=0.0, total_iters=10)
    binder.last_epoch = 5
    assert binder.get_lr() == [0.5]
    assert binder.get_last_lr() == binder._last_lr == [1.0]


def test_base_lrs_assigned_scale_the_schedule():
    optimizer, binder = make("LinearLR", start_factor=1.0, end_factor=0.0, total_iters=10)
    run(optimizer, binder, 4)
    binder.base_lrs = [0.1]
    run(optimizer, binder, 1)
    assert binder.get_last_lr() == [0.05]
    with pytest.raises(TypeError, match="Assign a new list"):
        binder.base_lrs[0] = 1.0


def test_step_count_is_that_of_torch():
    optimizer, binder = make("ExponentialLR", gamma=0.5)
    theirs = torch.optim.lr_scheduler.ExponentialLR(torch.optim.SGD(weights(), lr=1.0), 0.5)
    assert binder._step_count == theirs._step_count == 1
    run(optimizer, binder, 2)
    run(theirs.optimizer, theirs, 2)
    assert binder._step_count == theirs._step_count == 3
    binder._step_count += 1  # as Accelerate does
    assert (binder._step_count, binder.last_epoch) == (4, 2)


def test_torchs_sequence_resumed_in_its_first_part_continues_that_part():
    def make():
        optimizer = torch.optim.SGD(weights(), lr=1.0)
        parts = [
            attach("LinearLR", optimizer, total_iters=4),
            attach("StepLR", optimizer, step_size=2),
        ]
        return optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones=[4])

    optimizer, sequence = make()
    run(optimizer, sequence, 2)
    resumed, other = make()
    resumed.load_state_dict(optimizer.state_dict())
    other.load_state_dict(sequence.state_dict())
    assert resumed.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] < 1
    for _ in range(6):
        run(optimizer, sequence, 1)
        run(resumed, other, 1)
        assert resumed.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def read_lrs_after_resume(make, order, cut, steps):
    """Return the learning rates after a resume, and those of the uninterrupted run."""
    optimizer, scheduler = make()
    run(optimizer, scheduler, cut)
    saved = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    saved = copy.deepcopy(saved)
    resumed, other = make()
    for name in order:
        (resumed if name == "optimizer" else other).load_state_dict(saved[name])
    lrs = []
    for _ in range(steps):
        lrs.append((resumed.param_groups[0]["lr"], optimizer.param_groups[0]["lr"]))
        run(optimizer, scheduler, 1)
        run(resumed, other, 1)
    return zip(*lrs, strict=True)


@pytest.mark.filterwarnings("ignore:Other code")
@pytest.mark.parametrize("order", [("optimizer", "scheduler"), ("scheduler", "optimizer")])
@pytest.mark.parametrize("cut", [2, 4, 9])
def test_torchs_sequence_of_this_and_torchs_schedule_resumes(order, cut):
    def make():
        optimizer = torch.optim.SGD(weights(), lr=0.1)
        parts = [
            attach("WarmupLR", optimizer, warmup_num_steps=4),
            OF_TORCH.StepLR(optimizer, step_size=2),
        ]
        return optimizer, OF_TORCH.SequentialLR(optimizer, parts, milestones=[4])

    resumed, uninterrupted = read_lrs_after_resume(make, order, cut, steps=5)
    assert resumed == uninterrupted


def test_load_state_dict_of_an_earlier_version_sets_the_values():
    optimizer, binder = make("StepLR", step_size=1)
    run(optimizer, binder, 2)
    state = binder.state_dict()
    del state["is_written"]
    _, other = make("StepLR", step_size=1)
    other.load_state_dict(state)
    assert other.get_last_lr() == binder.get_last_lr() != [1.0]


def test_torchs_sequence_of_torchs_warmup_and_this_schedule_is_that_of_torch():
    def read_lrs(make_main):
        optimizer = torch.optim.SGD(weights(), lr=0.1)
        warmup = OF_TORCH.LinearLR(optimizer, start_factor=0.1, total_iters=4)
        parts = [warmup, make_main(optimizer)]
        sequence = OF_TORCH.SequentialLR(optimizer, parts, milestones=[4])
        lrs = []
        for _ in range(8):
            run(optimizer, sequence, 1)
            lrs.append(optimizer.param_groups[0]["lr"])
        return lrs

    ours = read_lrs(lambda optimizer: attach("StepLR", optimizer, step_size=2))
    theirs = read_lrs(lambda optimizer: OF_TORCH.StepLR(optimizer, step_size=2))
    assert ours == pytest.approx(theirs)


OURS = {
    "linear": lambda optimizer: attach("LinearLR", optimizer, start_factor=0.5, total_iters=4),
    "exponential": lambda optimizer: attach("ExponentialLR", optimizer, gamma=0.9),
}
THEIRS = {
    "linear": lambda optimizer: OF_TORCH.LinearLR(optimizer, start_factor=0.5, total_iters=4),
    "exponential": lambda optimizer: OF_TORCH.ExponentialLR(optimizer, gamma=0.9),
}


@pytest.mark.parametrize("order", [("linear", "exponential"), ("exponential", "linear")])
@pytest.mark.parametrize("kinds", [(OURS, OURS), (OURS, THEIRS), (THEIRS, OURS)])
def test_torchs_chain_with_this_schedule_raises_and_names_ours(kinds, order):
    optimizer = torch.optim.SGD(weights(), lr=0.1)
    parts = [kind[name](optimizer) for kind, name in zip(kinds, order, strict=True)]
    chain = OF_TORCH.ChainedScheduler(parts)
    with pytest.raises(ValueError, match=r"Use `schedules\.ChainedScheduler`"):
        run(optimizer, chain, 1)


def test_torchs_chain_with_this_schedule_in_torchs_sequence_raises():
    optimizer = torch.optim.SGD(weights(), lr=0.1)
    chain = OF_TORCH.ChainedScheduler([kind(optimizer) for kind in OURS.values()])
    with pytest.raises(ValueError, match=r"Use `schedules\.ChainedScheduler`"):
        OF_TORCH.SequentialLR(optimizer, [chain, OURS["linear"](optimizer)], milestones=[5])


def test_torchs_chain_of_one_schedule_is_that_schedule():
    optimizers = [torch.optim.SGD(weights(), lr=0.1) for _ in range(2)]
    chain = OF_TORCH.ChainedScheduler([OURS["linear"](optimizers[0])])
    alone = OURS["linear"](optimizers[1])
    for _ in range(6):
        run(optimizers[0], chain, 1)
        run(optimizers[1], alone, 1)
        assert chain.get_last_lr() == alone.get_last_lr()


def test_our_chain_multiplies_as_torchs_chain_of_torchs_schedulers():
    optimizer, other = (torch.optim.SGD(weights(), lr=0.1) for _ in range(2))
    parts = [
        {"type": "LinearLR", "params": {"start_factor": 0.5, "total_iters": 4}},
        {"type": "ExponentialLR", "params": {"gamma": 0.9}},
    ]
    ours = attach({"type": "ChainedScheduler", "params": {"schedulers": parts}}, optimizer)
    theirs = OF_TORCH.ChainedScheduler([make_part(other) for make_part in THEIRS.values()])
    for _ in range(8):
        assert ours.get_last_lr() == pytest.approx(theirs.get_last_lr())
        run(optimizer, ours, 1)
        run(other, theirs, 1)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_torchs_sequence_copied_in_its_first_part_continues(copied):
    optimizer = torch.optim.SGD(weights(), lr=1.0)
    parts = [
        attach("LinearLR", optimizer, total_iters=4),
        attach("StepLR", optimizer, step_size=2),
    ]
    sequence = OF_TORCH.SequentialLR(optimizer, parts, milestones=[4])
    run(optimizer, sequence, 2)
    assert parts[1].get_lr() == parts[1].get_last_lr()
    other = copied(sequence)
    for _ in range(6):
        run(optimizer, sequence, 1)
        run(other.optimizer, other, 1)
        assert other.optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("appended", [0.5, 0.25])
def test_base_lrs_appended_is_the_initial_lr_of_an_added_group(appended):
    optimizer, binder = make("ExponentialLR", gamma=0.5)
    run(optimizer, binder, 1)
    optimizer.add_param_group({"params": weights(), "lr": 0.5})
    binder.base_lrs.append(appended)
    run(optimizer, binder, 1)
    assert binder.get_last_lr() == [0.25, appended / 4]
    assert binder.base_lrs == [1.0, appended]


def test_first_step_from_a_last_epoch_that_the_script_set_does_not_warn():
    optimizer, binder = make("StepLR", step_size=2)
    binder.last_epoch = 5
    run(optimizer, binder, 1)
    assert binder.get_last_lr() == [pytest.approx(1e-3)]


def make_autowu():
    optimizer, binder = make("AutoWU", total_epochs=20, steps_per_epoch=9)
    optimizer.step()
    return binder


def test_record_loss_uses_the_mean_since_the_last_step():
    recorded, passed = make_autowu(), make_autowu()
    for losses in ((1.0,), (2.0, torch.tensor(3.0)), (0.5, 0.75)):
        for loss in losses:
            recorded.record_loss(loss)
        recorded.step()
        passed.step(sum(losses) / len(losses))
    assert recorded.state_dict() == passed.state_dict()
    with pytest.raises(ValueError, match="AutoWU requires the loss .*record_loss"):
        recorded.step()


def test_record_loss_and_a_loss_in_step_is_an_error():
    binder = make_autowu()
    binder.record_loss(1.0)
    with pytest.raises(ValueError, match=r"must be omitted after record_loss\(\), got 2"):
        binder.step(2.0)
    with pytest.raises(ValueError, match="must be a single number, got a tensor of shape"):
        binder.record_loss(torch.ones(2))


def test_record_loss_is_discarded_when_a_state_is_loaded():
    binder = make_autowu()
    binder.record_loss(1.0)
    binder.load_state_dict(binder.state_dict())
    with pytest.raises(ValueError, match="requires the loss"):
        binder.step()


def test_record_loss_of_a_schedule_that_does_not_depend_on_the_loss_has_no_effect():
    optimizer, binder = make("ReduceLROnPlateau", patience=0)
    for _ in range(3):
        optimizer.step()
        binder.record_loss(1.0)
        binder.step()
    assert (binder.get_last_lr(), binder.best) == ([1.0], float("inf"))


def test_get_lr_within_a_step_of_ignite_also_sets_the_momentum():
    """Ignite's LRScheduler does not call `step`."""
    optimizer, binder = make("OneCycle", **CYCLE)
    expected, other = make("OneCycle", **CYCLE)
    run(expected, other, 2)
    binder.last_epoch = 2
    assert optimizer.param_groups[0]["momentum"] == 0.95
    binder._get_lr_called_within_step = True
    assert binder.get_lr() == other.get_last_lr()
    assert binder.get_mom() == other.get_mom() != [0.95]


def test_get_lr_of_a_feedback_schedule_at_a_step_that_other_code_has_set_is_an_error():
    """In ignite's LRScheduler, its learning rate would never change."""
    binder = make_autowu()
    binder.last_epoch += 1
    with pytest.raises(
        ValueError, match=r"must be the number of steps taken \(0\), got 1\. AutoWU depends"
    ):
        binder.get_lr()
