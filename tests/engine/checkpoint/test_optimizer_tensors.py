"""Optimizer tensors that stay in place, as CUDA graphs and capturable optimizers require."""

import pytest
import torch
from torch import nn

import engine
from engine.checkpoint.optimizer_tensors import keep_tensors, move_state
from tests.engine.checkpoint.test_optimizer_state import build_model, start, train


def start_with_tensors(lr=0.25):
    model = build_model()
    lr = torch.tensor(lr)
    return start(model, optimizer=torch.optim.AdamW(model.parameters(), lr=lr, foreach=False)), lr


def list_state_tensors(trainer):
    return [
        trainer.optimizer.state[parameter][key]
        for parameter in trainer.module.parameters()
        for key in ("step", "exp_avg", "exp_avg_sq")
    ]


def test_load_checkpoint_fills_the_tensors_of_the_optimizer_in_place(tmp_path):
    trainer, lr = start_with_tensors()
    train(trainer, 2)
    trainer.save_checkpoint(tmp_path)
    saved = [tensor.clone() for tensor in list_state_tensors(trainer)]
    lr.fill_(0.5)
    train(trainer, 1)
    before = list_state_tensors(trainer)
    trainer.load_checkpoint(tmp_path)
    after = list_state_tensors(trainer)
    assert all(a is b for a, b in zip(before, after, strict=True))
    assert all(map(torch.equal, saved, after))
    assert trainer.optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == 0.25


def test_load_checkpoint_keeps_the_type_of_the_learning_rate(tmp_path):
    def save(trainer, tag):
        train(trainer, 1)
        trainer.optimizer.param_groups[0]["lr"] /= 2  # in place, if it is a tensor
        trainer.save_checkpoint(tmp_path, tag)
        trainer.optimizer.param_groups[0]["lr"] *= 2

    with_tensor, lr = start_with_tensors()
    model = build_model()
    with_number = start(model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.25))
    save(with_tensor, "tensor")
    save(with_number, "number")
    with_number.load_checkpoint(tmp_path, "tensor")
    group = with_number.optimizer.param_groups[0]
    assert (type(group["lr"]), group["lr"]) == (float, 0.125)
    with_tensor.load_checkpoint(tmp_path, "number")
    assert with_tensor.optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == 0.125


@pytest.mark.parametrize("saved", [False, True])
def test_load_checkpoint_keeps_capturable_of_the_run(tmp_path, saved):
    def start_with(*, capturable):
        model = build_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        optimizer.param_groups[0]["capturable"] = capturable  # its step needs a GPU
        return start(model, optimizer=optimizer)

    start_with(capturable=saved).save_checkpoint(tmp_path)
    trainer = start_with(capturable=not saved)
    trainer.load_checkpoint(tmp_path)
    assert trainer.optimizer.param_groups[0]["capturable"] is not saved


def test_keep_tensors_different_state_is_loaded_as_it_is():
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    loaded = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": None}
    loaded["param_groups"] = optimizer.state_dict()["param_groups"]
    with keep_tensors(optimizer):
        optimizer.load_state_dict(loaded)
    assert optimizer.state[weight]["momentum_buffer"].tolist() == [1, 1]
    other = torch.zeros(2, dtype=torch.float64)
    optimizer.state[weight]["momentum_buffer"] = other
    with keep_tensors(optimizer):
        optimizer.load_state_dict(loaded)
    assert optimizer.state[weight]["momentum_buffer"] is not other
    assert other.tolist() == [0, 0]


@pytest.mark.parametrize(("fused", "device"), [(True, "meta"), (None, "cpu")])
def test_move_state_moves_step_counts_of_fused_optimizers_only(fused, device):
    weight = nn.Parameter(torch.ones(2, device="meta"))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    optimizer.param_groups[0]["fused"] = fused
    optimizer.state[weight] = {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}
    move_state(optimizer)
    state = optimizer.state[weight]
    assert (state["step"].device.type, state["exp_avg"].device.type) == (device, "meta")


def test_loss_that_is_overwritten_after_backward_is_reported_correctly(tmp_path):
    """A CUDA graph writes the loss of each replay to the same memory."""
    memory = torch.zeros(())

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def forward(self, x):
            loss = self.layer(x).pow(2).mean()
            memory.copy_(loss.detach())
            loss.data = memory
            return loss

    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "csv_monitor": {"enabled": True, "output_path": str(tmp_path), "job_name": "run"},
    }
    trainer, *_ = engine.initialize(model=Net(), config=config)
    batches = [torch.ones(2, 2), 2 * torch.ones(2, 2)]
    with torch.no_grad():
        expected = sum(trainer.module.layer(x).pow(2).mean() for x in batches).item() / 2
    for x in batches:
        trainer.backward(trainer(x))
        trainer.step()
    trainer.destroy()
    (path,) = (tmp_path / "run").glob("*loss.csv")
    assert float(path.read_text().split(",")[-1]) == pytest.approx(expected, rel=1e-4)
