"""`lr_range_test`: the curve is reproducible and the engine's state is restored."""

import collections
import copy
import hashlib
import io
import itertools
import math
import random

import numpy as np
import pytest
import torch

import engine
import schedules
from engine.range_test.recorder import Recorder
from engine.range_test.sweep import Sweep

PRECISIONS = {
    "fp32": {},
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 10}},
    "bf16": {"bf16": {"enabled": True}},
}


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.1)
        )
        self.head = torch.nn.Linear(8, 1)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.calls += 1
        return (self.head(self.body(x)).float() - x.sum(1, keepdim=True)).pow(2).mean()


def start(**sections):
    torch.manual_seed(0)
    config = {
        "train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 50}},
        **sections,
    }
    data = torch.utils.data.TensorDataset(torch.randn(40, 4))
    trainer, _, loader, _ = engine.initialize(config=config, model=Net(), training_data=data)
    return trainer, loader


def train(trainer, loader, micro_batches):
    for (x,), _ in zip(loader, range(micro_batches), strict=False):
        trainer.backward(trainer(x))
        trainer.step()


def digest(trainer, loader):
    """Return a hash of the state that a run continues from."""
    state = {
        "module": trainer.module.state_dict(),
        "calls": trainer.module.calls,
        "optimizer": trainer.optimizer.state_dict(),
        "schedule": trainer.lr_scheduler.state_dict(),
        "scale": trainer.cur_scale,
        "random": (random.getstate(), np.random.get_state(), torch.get_rng_state()),  # noqa: NPY002
        "counters": (trainer.global_steps, trainer.micro_steps, trainer.skipped_steps),
        "loader": loader.state_dict(),
        "training": trainer.training,
    }
    file = io.BytesIO()
    torch.save(copy.deepcopy(state), file)
    return hashlib.sha256(file.getvalue()).hexdigest()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("updates", [0, 2], ids=["fresh", "trained"])
def test_lr_range_test_restores_state_and_is_reproducible(precision, updates):
    trainer, loader = start(**PRECISIONS[precision])
    train(trainer, loader, 2 * updates)
    trainer.eval()
    batches = [(x,) for x in torch.randn(4, 4, 4)]
    before = digest(trainer, loader)
    first = engine.lr_range_test(trainer, batches, min_lr=1e-5, max_lr=100, steps=40)
    assert digest(trainer, loader) == before
    again = engine.lr_range_test(trainer, batches, min_lr=1e-5, max_lr=100, steps=40)
    assert digest(trainer, loader) == before
    assert first.runs == again.runs
    assert len(first.runs[0].lrs) > 20
    assert first.runs[0].lrs[0] == pytest.approx(1e-5)
    assert np.all(np.diff(first.runs[0].lrs) > 0)


def test_lr_range_test_refine_trains_short_cycles_and_restores_state():
    trainer, loader = start()
    train(trainer, loader, 4)
    batches = [(x,) for x in torch.randn(8, 64, 4)]
    before = digest(trainer, loader)
    highest = []

    def loss_fn(trainer, batch):
        highest.append(trainer.get_lr()[0])
        return trainer(*batch)

    report = engine.lr_range_test(
        trainer,
        batches,
        loss_fn=loss_fn,
        min_lr=1e-5,
        steps=200,
        refine=True,
        training_steps=20_000,
    )
    assert digest(trainer, loader) == before
    sweep_calls = len(report.runs[0].lrs) * 2  # micro-batches
    cycles = np.array(highest[sweep_calls:]).reshape(-1, 400).max(axis=1)
    assert sorted(cycles) == pytest.approx(list(report.refinement.losses))
    assert len(cycles) >= 5
    assert report.max_lr == pytest.approx(report.refinement.lowest * 0.01**0.32, rel=0.05)
    assert report.block()["params"]["cycle_max_lr"] == report.max_lr


def test_lr_range_test_exception_restores_state():
    trainer, loader = start()
    train(trainer, loader, 4)
    before = digest(trainer, loader)

    def loss_fn(trainer, batch):
        if trainer.micro_steps == 5:
            raise KeyError("raised by the script")
        return trainer(batch[0])

    with pytest.raises(KeyError):
        engine.lr_range_test(trainer, loader, loss_fn=loss_fn)
    assert digest(trainer, loader) == before


def test_lr_range_test_does_not_affect_later_training():
    trainer, loader = start()
    other, other_loader = start()
    for each, batches in ((trainer, loader), (other, other_loader)):
        torch.manual_seed(1)
        train(each, batches, 4)
    engine.lr_range_test(trainer, loader, steps=30)
    for each, batches in ((trainer, loader), (other, other_loader)):
        torch.manual_seed(1)
        train(each, batches, 6)
    assert trainer.get_lr() == other.get_lr()
    for mine, theirs in zip(trainer.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_lr_range_test_momentum_decreases():
    trainer, loader = start()
    report = engine.lr_range_test(trainer, loader, steps=30, momentum=(0.95, 0.85))
    momenta = report.runs[0].momenta
    assert momenta[0] == 0.95
    assert np.all(np.diff(momenta) < 0)


def test_lr_range_test_writes_no_checkpoint(tmp_path):
    trainer, loader = start(engine={"checkpoint": {"dir": str(tmp_path / "c"), "every": 1}})
    engine.lr_range_test(trainer, loader, steps=25)
    assert not (tmp_path / "c").exists()


def test_lr_range_test_accepts_mappings_as_batches():
    trainer, _ = start()
    batch = collections.UserDict(x=torch.randn(4, 4))  # like the output of a tokenizer
    report = engine.lr_range_test(trainer, [batch], steps=10)
    assert len(report.runs[0].lrs) == 10


@pytest.mark.parametrize("steps", [2, 20, 250, 333])
def test_sweep_staircase_ends_on_highest_stair(steps):
    sweep = Sweep(1e-6, 10.0, steps, "staircase")
    lrs = schedules.trace(schedules.from_config(sweep.scheduler), steps)["lr"]
    assert (lrs[0], lrs[-1]) == (pytest.approx(1e-6), pytest.approx(10.0))
    assert len(np.unique(lrs)) == min(steps, 20)


def test_lr_range_test_invalid_arguments_are_rejected():
    with pytest.raises(ValueError, match="`shape` must be .* got `staircase`"):
        Sweep(shape="staircase", momentum=(0.95, 0.85))
    trainer, loader = start()
    with pytest.raises(ValueError, match="`min_lr` < `max_lr`, got 1 and 0.1"):
        engine.lr_range_test(trainer, loader, min_lr=1, max_lr=0.1)
    with pytest.raises(ValueError, match="`training_steps` has no effect without `refine`"):
        engine.lr_range_test(trainer, loader, training_steps=100)
    with pytest.raises(ValueError, match="`training_steps` must be >= 1, got 0"):
        engine.lr_range_test(trainer, loader, refine=True, training_steps=0)
    with pytest.raises(ValueError, match="`batches` must yield at least one micro-batch"):
        engine.lr_range_test(trainer, [])
    train(trainer, loader, 1)
    with pytest.raises(ValueError, match="must not start in the middle of a batch"):
        engine.lr_range_test(trainer, loader)


def test_lr_range_test_keeps_eval_mode_of_submodules():
    trainer, loader = start()
    norm = trainer.module.body[1]
    norm.eval()
    engine.lr_range_test(trainer, loader, steps=25)
    assert trainer.training
    assert not norm.training


def test_lr_range_test_gradients_never_finite_gives_a_reason():
    class Broken(torch.nn.Linear):
        def forward(self, x):
            return (super().forward(x) * 0).sqrt().mean()  # the gradient is 0 * inf = NaN

    torch.manual_seed(0)
    config = {"train_batch_size": 4, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    trainer, *_ = engine.initialize(config=config, model=Broken(4, 1))
    report = engine.lr_range_test(trainer, torch.randn(3, 4, 4))
    assert report.suggestion.reason == "at least 20 losses are required, got 0"


def test_lr_range_test_manual_boundary_is_ignored_and_restored():
    trainer, loader = start()
    trainer.set_gradient_accumulation_boundary(is_boundary=False)
    report = engine.lr_range_test(trainer, loader, max_lr=0.1, steps=25)
    assert len(report.runs[0].lrs) == 25
    assert not trainer.is_gradient_accumulation_boundary()
    train(trainer, loader, 2)
    assert trainer.global_steps == 0, "the manual boundary is still set"
    trainer.set_gradient_accumulation_boundary(is_boundary=True)
    train(trainer, loader, 1)
    assert trainer.global_steps == 1


def test_lr_range_test_during_accumulation_is_rejected():
    trainer, loader = start(gradient_accumulation_steps=1)
    trainer.set_gradient_accumulation_boundary(is_boundary=False)
    train(trainer, loader, 1)
    gradients = [p.grad.clone() for p in trainer.parameters()]
    with pytest.raises(ValueError, match="must not start in the middle of a batch"):
        engine.lr_range_test(trainer, loader)
    kept = [p.grad for p in trainer.parameters()]
    assert all(map(torch.equal, gradients, kept))


def test_lr_range_test_keeps_pending_metric_for_next_step():
    plateau = {"type": "ReduceLROnPlateau", "params": {"patience": 0, "factor": 0.5}}
    trainer, loader = start(scheduler=plateau)
    batches = iter(loader)
    for metric in (1.0, None, 1.0):  # a metric passed before the boundary is kept until the step
        trainer.backward(trainer(*next(batches)))
        trainer.step(metric=metric)
        if trainer.micro_steps == 2:
            trainer.set_gradient_accumulation_boundary(is_boundary=True)
            engine.lr_range_test(trainer, [torch.randn(4, 4)], steps=5)
    assert trainer.get_lr() == [0.005]


def test_load_checkpoint_in_a_trial_run_is_undone(tmp_path):
    trainer, loader = start()
    train(trainer, loader, 4)
    trainer.save_checkpoint(tmp_path)
    train(trainer, loader, 2)
    before = digest(trainer, loader)

    def loss_fn(trainer, batch):
        if trainer.micro_steps == 0:
            trainer.load_checkpoint(tmp_path, load_module_only=True)
        return trainer(*batch)

    engine.lr_range_test(trainer, loader, loss_fn=loss_fn, steps=5)
    assert digest(trainer, loader) == before


def test_lr_range_test_after_backward_without_step_is_rejected():
    trainer, loader = start()
    (x,) = next(iter(loader))
    trainer.backward(trainer(x))
    with pytest.raises(ValueError, match="must not start in the middle of a batch"):
        engine.lr_range_test(trainer, loader)


def test_record_without_a_step_limit_has_a_limited_size_and_covers_all_steps():
    recorder, steps = Recorder(None, math.inf), 100_000
    for step in range(steps):
        recorder.record(float(step), 0.9, 1.0, applied=True)
    run = recorder.run
    assert 10_000 < len(run.lrs) <= 20_000
    assert len(run.lrs) == len(run.losses) == len(run.momenta)
    gaps = {after - before for before, after in itertools.pairwise(run.lrs)}
    assert (run.lrs[0], gaps) == (0.0, {8.0})
    assert run.lrs[-1] >= steps - 8


@pytest.mark.parametrize(
    "arguments",
    [{}, {"shape": "staircase"}, {"shape": "linear", "momentum": (0.95, 0.5)}, {"refine": True}],
    ids=lambda arguments: "-".join(arguments) or "default",
)
def test_lr_range_test_keeps_the_ratios_of_different_groups(arguments):
    torch.manual_seed(0)
    body, head, frozen = (torch.nn.Linear(4, n) for n in (4, 1, 1))
    groups = [
        {"params": layer.parameters(), "lr": lr}
        for layer, lr in ((body, 0.01), (head, 0.001), (frozen, 0.0))
    ]
    model = torch.nn.ModuleList([body, head, frozen])
    optimizer = torch.optim.AdamW(groups)
    config = {"train_batch_size": 8}
    trainer, *_ = engine.initialize(config=config, model=model, optimizer=optimizer)
    seen = []

    def loss_fn(trainer, x):
        seen.append(trainer.get_lr())
        return (head(body(x)) + frozen(x) - x.sum(1, keepdim=True)).pow(2).mean()

    batches = torch.randn(8, 8, 4)
    arguments = {"min_lr": 1e-4, "max_lr": 1.0, "steps": 150, **arguments}
    report = engine.lr_range_test(trainer, batches, loss_fn=loss_fn, **arguments)
    assert len(seen) >= 30
    assert seen[0][0] == pytest.approx(1e-4)
    for first, second, third in seen:
        assert (second, third) == (pytest.approx(first / 10), 0.0)
    assert trainer.get_lr() == [0.01, 0.001, 0.0]
    if "shape" in arguments:  # too few different learning rates for a suggestion
        return
    bounds = report.block()["params"]["cycle_max_lr"]
    assert bounds == [report.max_lr, pytest.approx(report.max_lr / 10), 0.0]


def test_lr_range_test_with_a_first_group_of_lr_0_is_rejected():
    layers = [torch.nn.Linear(2, 2) for _ in range(2)]
    groups = [{"params": each.parameters(), "lr": k} for k, each in enumerate(layers)]
    optimizer = torch.optim.AdamW(groups)
    model = torch.nn.Sequential(*layers)
    trainer, *_ = engine.initialize(
        config={"train_batch_size": 8}, model=model, optimizer=optimizer
    )
    with pytest.raises(ValueError, match="the first param group must be > 0, got 0"):
        engine.lr_range_test(trainer, torch.randn(2, 8, 2))
