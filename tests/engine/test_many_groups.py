"""Start, save and load with many param groups: the work grows linearly with their number."""

import sys

import pytest
import torch

import engine

FEW, MANY = 100, 400


class Scales(torch.nn.Module):
    def __init__(self, count):
        super().__init__()
        self.scales = torch.nn.ParameterList(torch.ones(1) for _ in range(count))

    def forward(self, x):
        return torch.cat(list(self.scales)).sum() * x.mean()


def start(count):
    model = Scales(count)
    groups = [{"params": [each], "lr": 0.1 + 0.1 * (k % 7)} for k, each in enumerate(model.scales)]
    config = {"train_batch_size": 4, "optimizer": {"type": "Adam", "params": {"lr": 0.1}}}
    config["scheduler"] = {"type": "CosineAnnealingLR", "params": {"T_max": 100}}
    return engine.initialize(config=config, model=model, model_parameters=groups)[0]


def count_lines(function):
    """Return how many lines of Python a function executes, which is the same on every machine."""
    lines = 0

    def trace(_frame, event, _argument):
        nonlocal lines
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return lines


def measure(count, directory):
    """Return the number of lines that are executed to start, to save and to load."""
    trainer, other = start(count), start(count)
    trainer.backward(trainer(torch.ones(4, 1)))
    trainer.step()
    lines = {
        "start": count_lines(lambda: start(count)),
        "save": count_lines(lambda: trainer.save_checkpoint(directory)),
        "load": count_lines(lambda: other.load_checkpoint(directory)),
    }
    assert torch.equal(other.module.scales[-1], trainer.module.scales[-1])
    states = [each.optimizer.state_dict()["state"][count - 1] for each in (trainer, other)]
    assert torch.equal(states[0]["exp_avg"], states[1]["exp_avg"])
    return lines


def test_start_save_and_load_execute_lines_in_proportion_to_the_groups(tmp_path):
    few, many = (measure(count, tmp_path / str(count)) for count in (FEW, MANY))
    for task, lines in few.items():
        assert many[task] <= MANY / FEW * lines, task


def test_parameter_in_two_groups_is_an_error():
    model = torch.nn.Linear(2, 1)
    groups = [{"params": [model.weight]}, {"params": [model.bias]}, {"params": [model.weight]}]
    config = {"train_batch_size": 4, "optimizer": {"type": "Adam", "params": {"lr": 0.1}}}
    with pytest.raises(ValueError, match="more than one parameter group"):
        engine.initialize(config=config, model=model, model_parameters=groups)
