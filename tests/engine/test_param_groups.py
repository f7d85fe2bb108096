"""Train with the param groups of a config, on every backend."""

import copy
import logging

import pytest
import torch

import engine
from tests.testing.distributed import run_distributed_test
from tests.testing.small_model import all_equal, build_model, copy_parameters, train_step

ENTRIES = [
    {"params": "^3\\.", "name": "head", "lr": 0.05, "betas": [0.5, 0.9]},
    {"params": "^0\\.weight", "weight_decay": 0.3},
]
OPTIMIZER = {
    "type": "AdamW",
    "params": {"lr": 0.01, "weight_decay": 0.1},
    "param_groups": ENTRIES,
    "no_decay": True,
}
EXPONENTIAL = {"type": "ExponentialLR", "params": {"gamma": 0.5}}
FALL = {
    "type": "Phases",
    "params": {"lr": [{"from": 0.1, "to": 0.05, "duration": 2}, {"duration": 1}]},
}


def build_config(optimizer=OPTIMIZER, **sections):
    return {
        "train_batch_size": 4,
        "gradient_clipping": 0,
        "optimizer": optimizer,
        "scheduler": EXPONENTIAL,
        "engine": {"backend": "torch"},
    } | sections


def with_schedule(block=FALL):
    """Return the optimizer with an own schedule of the head."""
    optimizer = copy.deepcopy(OPTIMIZER)
    optimizer["param_groups"][0]["scheduler"] = block
    return optimizer


def group_by_hand(model):
    named = dict(model.named_parameters())
    head = {"lr": 0.05, "betas": (0.5, 0.9)}
    others = [name for name in named if not name.startswith("3.") and name != "0.weight"]
    return [
        {"params": [named["3.weight"]], **head},
        {"params": [named["3.bias"]], **head, "weight_decay": 0.0},
        {"params": [named["0.weight"]], "weight_decay": 0.3},
        {"params": [named[name] for name in others if name.endswith("weight")]},
        {"params": [named[n] for n in others if n.endswith("bias")], "weight_decay": 0.0},
    ]


def train_by_hand(rates, steps=3):
    """Train with torch's AdamW and the learning rates of each group at each step."""
    model = build_model()
    optimizer = torch.optim.AdamW(group_by_hand(model), lr=0.01, weight_decay=0.1)
    for step in range(steps):
        for group, lr in zip(optimizer.param_groups, rates[step], strict=True):
            group["lr"] = lr
        loss = torch.stack(
            [model(torch.ones(2, 6) * (rank + 1)).pow(2).mean() for rank in range(2)]
        ).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


RELATIVE = [[lr * 0.5**step for lr in (0.05, 0.05, 0.01, 0.01, 0.01)] for step in range(4)]
HEAD = [0.1, 0.075, 0.05, 0.05]
OWN = [[HEAD[step]] * 2 + RELATIVE[step][2:] for step in range(4)]


def train(config, expected_rates, steps=3):
    """Train on this rank, and compare the learning rates."""
    trainer = engine.initialize(model=build_model(), config=config)[0]
    for step in range(steps):
        assert trainer.get_lr() == pytest.approx(expected_rates[step])
        assert train_step(trainer)
    return trainer


def train_and_compare(sections, optimizer, rates):
    config = build_config(optimizer, **sections)
    trainer = train(config, rates)
    if trainer.config.backend.name == "deepspeed":
        from deepspeed.utils import safe_get_full_fp32_param

        parameters = list(trainer.module.parameters())
        whole = [safe_get_full_fp32_param(each) for each in parameters]
        found = [p if full is None else full for full, p in zip(whole, parameters, strict=True)]
    else:
        found = copy_parameters(trainer)
    for mine, expected in zip(found, train_by_hand(rates), strict=True):
        torch.testing.assert_close(mine.detach(), expected, rtol=1e-5, atol=1e-6)


DEEPSPEED = {"engine": {"backend": "deepspeed"}}
BACKENDS = {
    "torch": {},
    "FSDP2": {"zero_optimization": {"stage": 3}},
    "DeepSpeed": DEEPSPEED,
    "ZeRO 2": {"zero_optimization": {"stage": 2}, **DEEPSPEED},
    "ZeRO 3": {"zero_optimization": {"stage": 3}, **DEEPSPEED},
}


@pytest.mark.parametrize("sections", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("own", [False, True], ids=["shared schedule", "own schedule"])
def test_groups_of_a_config_train_like_groups_built_by_hand(sections, own):
    optimizer, rates = (with_schedule(), OWN) if own else (OPTIMIZER, RELATIVE)
    run_distributed_test(train_and_compare, 2, sections, optimizer, rates)


def start(config, **arguments):
    return engine.initialize(model=build_model(), config=config, **arguments)[0]


def test_groups_of_given_parameters_train_only_these():
    model = build_model()
    trainer, optimizer, *_ = engine.initialize(
        model=model, config=build_config(), model_parameters=model.named_parameters()
    )
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1, 1, 2, 3]
    assert trainer.get_lr() == [0.05, 0.05, 0.01, 0.01, 0.01]


def test_groups_of_a_config_and_an_argument_with_groups_are_an_error():
    model = build_model()
    with pytest.raises(ValueError, match="`model_parameters` must be parameters, not param groups"):
        engine.initialize(model=model, config=build_config(), model_parameters=group_by_hand(model))


@pytest.mark.parametrize("factory", [False, True])
def test_groups_of_a_config_and_an_optimizer_argument_are_an_error(factory):
    model = build_model()
    given = torch.optim.SGD if factory else torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="`optimizer.param_groups` in config applies only to"):
        engine.initialize(model=model, config=build_config(), optimizer=given)


def test_lr_scheduler_argument_replaces_the_schedules_of_groups(caplog):
    with caplog.at_level(logging.INFO, "onecycle"):
        trainer = start(
            build_config(with_schedule()),
            lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.1),
        )
    assert "replaces the config's `scheduler` (ExponentialLR, Phases)" in caplog.text
    train_step(trainer)
    assert trainer.get_lr() == pytest.approx([0.005, 0.005, 0.001, 0.001, 0.001])


def test_own_schedule_without_a_shared_one_leaves_the_other_groups_alone():
    config = build_config(with_schedule())
    del config["scheduler"]
    trainer = start(config)
    train_step(trainer)
    assert trainer.get_lr() == pytest.approx([0.075, 0.075, 0.01, 0.01, 0.01])


def test_start_logs_which_parameters_are_in_which_group(caplog):
    with caplog.at_level(logging.INFO, "onecycle"):
        start(build_config(with_schedule()))
    lines = [m for m in caplog.messages if m.startswith("param group ")]
    assert len(lines) == 5
    values = "lr 0.05, weight_decay 0.1, betas (0.5, 0.9), Phases"
    assert " ".join(lines[0].split()) == (
        f"param group 0 head {values} 1 parameter, 6 elements: 3.weight"
    )
    assert "2 parameters, 72 elements: 1-2.weight" in lines[3]
    caplog.clear()
    with caplog.at_level(logging.INFO, "onecycle"):
        start(build_config({"type": "SGD", "params": {"lr": 0.1}}))
    assert "param group" not in caplog.text


def test_resume_with_groups_and_schedules_continues_exactly(tmp_path):
    config = build_config(with_schedule())
    trainer = start(config)
    for _ in range(2):
        train_step(trainer)
    trainer.save_checkpoint(tmp_path)
    resumed = start(config)
    resumed.load_checkpoint(tmp_path)
    for each in (trainer, resumed):
        train_step(each)
    assert trainer.get_lr() == resumed.get_lr()
    assert all_equal(copy_parameters(trainer), copy_parameters(resumed))


def test_resume_with_another_schedule_of_a_group_is_an_error(tmp_path):
    trainer = start(build_config(with_schedule()))
    train_step(trainer)
    trainer.save_checkpoint(tmp_path)
    other = start(build_config(with_schedule({"type": "StepLR", "params": {"step_size": 3}})))
    with pytest.raises(engine.CheckpointError, match="does not match"):
        other.load_checkpoint(tmp_path)


def test_no_decay_holds_if_a_schedule_sets_the_weight_decay():
    ramp = {"weight_decay": [{"from": 0.0, "to": 0.2, "duration": 2}]}
    optimizer = {"type": "AdamW", "params": {"lr": 0.1}, "no_decay": True}
    scheduler = {"type": "Phases", "params": ramp}
    trainer = start(build_config(optimizer, scheduler=scheduler))
    for expected in (0.0, 0.1, 0.2):
        decays = [group["weight_decay"] for group in trainer.optimizer.param_groups]
        assert decays == pytest.approx([expected, 0.0])
        train_step(trainer)


def test_layer_decay_with_a_schedule_of_multiples_keeps_the_ratios():
    optimizer = {"type": "SGD", "params": {"lr": 0.8, "momentum": 0.9}, "layer_decay": 0.5}
    cycle = {"cycle_min_lr": 0.5, "cycle_max_lr": 1, "relative": True, "cycle_first_step_size": 2}
    block = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(2))

    class Tower(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.head = block, torch.nn.Linear(6, 1)

        def forward(self, x):
            for layer in self.blocks:
                x = layer(x)
            return self.head(x)

    config = build_config(optimizer, scheduler={"type": "OneCycle", "params": cycle})
    trainer = engine.initialize(model=Tower(), config=config)[0]
    assert trainer.get_lr() == pytest.approx([0.1, 0.2, 0.4])
    train_step(trainer)
    train_step(trainer)
    assert trainer.get_lr() == pytest.approx([0.2, 0.4, 0.8])
    assert [group["momentum"] for group in trainer.optimizer.param_groups] == [0.8] * 3
