"""Test the profile of a forward pass against operations that are counted by hand."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from engine.training.flops_profile import format_profile, profile_modules

SETTINGS = {
    "detailed": False,
    "module_depth": -1,
    "output_file": None,
    "profile_step": 1,
    "recompute_fwd_factor": 0.0,
    "top_modules": 1,
}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(8, 16)
        self.narrow = nn.Linear(16, 8)

    def forward(self, x):
        return x + self.narrow(torch.relu(self.wide(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 1, bias=False)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(self.head.weight * x)


def profile(model, x):
    with profile_modules(model, torch.device("cpu")) as profiles:
        model(x)
    return {each.name: each for each in profiles}


def test_profile_counts_parameters_and_operations_of_each_module():
    found = profile(Model(), torch.ones(4, 8))
    per_linear = 2 * 4 * 8 * 16  # a multiply-add counts as 2
    assert {name: each.flops for name, each in found.items()} == {
        "": 4 * per_linear + 2 * 4 * 8,
        "blocks": 4 * per_linear,
        "blocks.0": 2 * per_linear,
        "blocks.0.wide": per_linear,
        "blocks.0.narrow": per_linear,
        "blocks.1": 2 * per_linear,
        "blocks.1.wide": per_linear,
        "blocks.1.narrow": per_linear,
        "head": 2 * 4 * 8,
    }
    assert (found[""].params, found["blocks.0"].params, found["head"].params) == (568, 280, 8)
    assert 0 < found["blocks.0.wide"].seconds < found["blocks.0"].seconds
    assert found["blocks.0"].seconds + found["blocks.1"].seconds < found[""].seconds


def test_profile_of_a_module_that_is_called_twice_counts_both_calls():
    layer = nn.Linear(8, 8)
    found = profile(nn.Sequential(layer, nn.ReLU(), layer), torch.ones(4, 8))
    assert found["0"].flops == found[""].flops == 2 * (2 * 4 * 8 * 8)


def test_profile_leaves_no_hooks_and_no_counting_for_the_backward_pass():
    model = Model()
    with profile_modules(model, torch.device("cpu")) as profiles:
        loss = checkpoint(model, torch.ones(4, 8), use_reentrant=False).sum()
    before = [each.flops for each in profiles]
    loss.backward()
    assert [each.flops for each in profiles] == before
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())


def test_profile_of_a_compiled_model_covers_its_modules():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
    model.compile(backend="eager")
    assert profile(model, torch.ones(4, 8))["0"].flops == 2 * 4 * 8 * 16


@pytest.mark.parametrize(
    ("changes", "wanted", "unwanted"),
    [
        ({}, ["568", "forward pass   4.16 kFLOPs", "backward pass  8.32 kFLOPs"], ["(blocks)"]),
        ({"recompute_fwd_factor": 1.0}, ["backward pass  12.5 kFLOPs (3 x forward)"], []),
        ({"detailed": True}, ["(blocks) ModuleList", "      (wide) Linear: 144 (25.4%)"], []),
        ({}, ["at depth 3", "at depth 1\n  params   ModuleList 560\n"], ["at depth 4", "ReLU"]),
        ({"module_depth": 1}, ["at depth 1"], ["at depth 2"]),
        ({"top_modules": 2}, ["top 2 classes", "ModuleList 560, Linear 8\n"], []),
    ],
)
def test_report_respects_the_settings(changes, wanted, unwanted):
    profiles = list(profile(Model(), torch.ones(4, 8)).values())
    report = "\n".join(format_profile(profiles, {**SETTINGS, **changes}))
    assert [text for text in wanted if text not in report] == []
    assert [text for text in unwanted if text in report] == []
