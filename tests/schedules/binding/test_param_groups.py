"""Param groups with different keys, with tensors, and with values that others change."""

import pytest
import torch

from schedules import attach
from tests.schedules.test_torch_scheduler import CYCLE, weights


class Mixed(torch.optim.Optimizer):
    """Optimizer with a momentum in one group and betas in another, such as Muon with Adam."""

    def __init__(self):
        groups = [
            {"params": weights(), "lr": 0.02, "momentum": 0.95},
            {"params": weights(), "lr": 0.0003, "betas": [0.9, 0.95]},
        ]
        super().__init__(groups, {})

    def step(self, closure=None):
        pass


def step_twice(optimizer, binder):
    for _ in range(2):
        optimizer.step()
        binder.step()


def test_binder_sets_the_momentum_of_groups_with_different_keys():
    optimizer = Mixed()
    bounds = {"cycle_min_lr": [0.1, 0.2], "cycle_max_lr": [0.5, 0.6]}
    momenta = {"cycle_min_mom": [0.8, 0.7], "cycle_max_mom": [0.95, 0.85]}
    binder = attach("OneCycle", optimizer, **CYCLE | bounds | momenta)
    assert binder.get_mom() == [0.95, (0.85, 0.95)]
    for expected in (0.9, 0.85, 0.8):
        optimizer.step()
        binder.step()
        assert optimizer.param_groups[0]["momentum"] == pytest.approx(expected)
    assert optimizer.param_groups[1]["betas"] == pytest.approx((0.7, 0.95))


def test_get_mom_is_0_for_a_group_without_momentum():
    groups = [{"params": weights()}, {"params": weights()}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    binder = attach("OneCycle", optimizer, **CYCLE)
    del optimizer.param_groups[1]["momentum"]
    assert binder.get_mom() == [0.95, 0.0]


@pytest.mark.parametrize("cycle_max_lr", [0.5, [0.5, 0.6]], ids=["shared", "per group"])
@pytest.mark.parametrize("betas", [(0.7, 0.5), [0.7, 0.5], (0.7, torch.tensor(0.5))])
@pytest.mark.parametrize("changed", [0, 1])
def test_binder_keeps_a_beta_that_is_changed_between_steps(cycle_max_lr, betas, changed):
    optimizer = torch.optim.AdamW([{"params": weights()}, {"params": weights()}], lr=0.1)
    binder = attach("OneCycle", optimizer, **CYCLE | {"cycle_max_lr": cycle_max_lr})
    step_twice(optimizer, binder)
    optimizer.param_groups[changed]["betas"] = betas
    with pytest.warns(UserWarning, match=rf"`betas\[0\]` of param group {changed} to 0.7"):
        binder.step()
    groups = optimizer.param_groups
    assert [group["betas"][0] for group in groups] == [0.8, 0.8]
    assert groups[changed]["betas"][1] == 0.5
    assert groups[1 - changed]["betas"][1] == 0.999
    step_twice(optimizer, binder)
    assert groups[changed]["betas"][1] == 0.5


def test_binder_gives_groups_that_share_a_tensor_lr_their_own_values():
    groups = [{"params": weights()}, {"params": weights()}]
    optimizer = torch.optim.AdamW(groups, lr=torch.tensor(1.0), foreach=False)
    params = {"cycle_min_lr": [0.5, 0.25], "cycle_max_lr": [1.5, 1.25]}
    binder = attach("OneCycle", optimizer, **CYCLE | params)
    assert binder.get_last_lr() == [0.5, 0.25]
    for _ in range(3):
        binder.step()
    assert binder.get_last_lr() == [1.5, 1.25]


def test_binder_keeps_a_shared_tensor_lr_if_the_curve_is_shared():
    groups = [{"params": weights()}, {"params": weights()}]
    rate = torch.tensor(1.0)
    optimizer = torch.optim.AdamW(groups, lr=rate, foreach=False)
    attach("ExponentialLR", optimizer, gamma=0.5).step()
    assert [group["lr"] is rate for group in optimizer.param_groups] == [True, True]
    assert rate.item() == 0.5


def test_binder_writes_tensor_betas_in_place():
    betas = (torch.tensor(0.5), torch.tensor(0.75))
    optimizer = torch.optim.Adam(weights(), lr=torch.tensor(1.0), betas=betas, foreach=False)
    binder = attach("OneCycle", optimizer, **CYCLE | {"cycle_max_mom": 0.875, "cycle_min_mom": 0.5})
    assert optimizer.param_groups[0]["betas"][0] is betas[0]
    assert betas[0].item() == 0.875
    for _ in range(3):
        binder.step()
    assert [beta.item() for beta in betas] == [0.5, 0.75]


def test_binder_keeps_the_tensor_lr_of_a_loaded_optimizer():
    def make(lr):
        optimizer = torch.optim.AdamW(weights(), lr=lr, foreach=False)
        return optimizer, attach("LinearLR", optimizer, start_factor=1.0, end_factor=0.0)

    optimizer, binder = make(torch.tensor(1e-3))
    step_twice(optimizer, binder)
    resumed, other = make(1e-3)
    other.load_state_dict(binder.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    for expected in (4e-4, 2e-4):
        resumed.step()
        other.step()
        assert isinstance(resumed.param_groups[0]["lr"], torch.Tensor)
        assert resumed.param_groups[0]["lr"].item() == pytest.approx(expected)


def test_attach_an_optimizer_without_a_learning_rate_is_rejected():
    optimizer = torch.optim.SGD(weights(), lr=0.1)
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(ValueError, match="`lr` of each param group must be a number, got None"):
        attach("CosineAnnealingLR", optimizer, T_max=5)
