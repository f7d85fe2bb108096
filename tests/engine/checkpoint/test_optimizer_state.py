"""The optimizer's state in checkpoints on PyTorch: any optimizer, and parameters of any kind."""

import copy

import pytest
import torch
from torch.distributed.tensor import DTensor

import engine
from engine.checkpoint import storage
from engine.errors import CheckpointError
from tests.testing.distributed import run_distributed_test
from tests.testing.torch_optimizers import NOT_SHARDED, VARIANTS


def build_model(out=1):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, out))


def start(model=None, *, parameters=None, optimizer=None, block=None, **changes):
    """Return an engine with AdamW, the given `optimizer` block or the user's own optimizer."""
    config = {"train_batch_size": 4, "gradient_clipping": 0, "engine": {"backend": "torch"}}
    if optimizer is None:
        config["optimizer"] = block or {"type": "AdamW", "params": {"lr": 0.1}}
    return engine.initialize(
        model=model or build_model(),
        config=config | changes,
        optimizer=optimizer,
        model_parameters=parameters,
    )[0]


def train(trainer, steps):
    size = 4 // trainer.world_size
    for _ in range(steps):
        generator = torch.Generator().manual_seed(trainer.global_steps)
        batch = torch.randn(4, 4, generator=generator).split(size)[trainer.global_rank]
        trainer.backward((trainer(batch) - 1).pow(2).mean())
        assert trainer.step()


def gather(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def copy_weights(trainer):
    return [gather(p).detach().clone() for p in trainer.module.parameters()]


def get_state(trainer, name):
    return trainer.optimizer.state[dict(trainer.module.named_parameters())[name]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_save_and_load_before_the_first_step_change_nothing(variant, tmp_path):
    weights, states = [], []
    for actions in ("", "save", "save and load"):
        trainer = start(block=VARIANTS[variant])
        state = copy.deepcopy(trainer.optimizer.state_dict())
        if "save" in actions:
            trainer.save_checkpoint(tmp_path)
        if "load" in actions:
            trainer.load_checkpoint(tmp_path)
        torch.testing.assert_close(trainer.optimizer.state_dict(), state, rtol=0, atol=0)
        train(trainer, 3)
        weights.append(copy_weights(trainer))
        states.append(trainer.optimizer.state_dict())
    for other in (1, 2):
        torch.testing.assert_close(weights[other], weights[0], rtol=0, atol=0)
        torch.testing.assert_close(states[other], states[0], rtol=0, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_load_checkpoint_continues_with_the_same_steps(variant, tmp_path):
    trainer, resumed = (start(block=VARIANTS[variant]) for _ in range(2))
    train(trainer, 3)
    trainer.save_checkpoint(tmp_path)
    resumed.load_checkpoint(tmp_path)
    torch.testing.assert_close(
        resumed.optimizer.state_dict(), trainer.optimizer.state_dict(), rtol=0, atol=0
    )
    train(trainer, 3)
    train(resumed, 3)
    torch.testing.assert_close(copy_weights(resumed), copy_weights(trainer), rtol=0, atol=0)


def split_groups(model):
    return [{"params": model[0].parameters(), "lr": 0.2}, {"params": model[2].parameters()}]


@pytest.mark.parametrize("kind", ["model", "groups", "damaged"])
def test_load_checkpoint_that_fails_changes_neither_state_nor_weights(kind, tmp_path):
    saved = start()
    train(saved, 2)
    saved.save_checkpoint(tmp_path)
    model = build_model(out=2 if kind == "model" else 1)
    fresh = start(model, parameters=split_groups(model) if kind == "groups" else None)
    if kind == "damaged":
        [(checkpoint_dir, _)] = storage.list_checkpoints(tmp_path)
        shard = next(checkpoint_dir.glob("shard.*.safetensors"))
        shard.write_bytes(shard.read_bytes()[:-8])
    weights, groups = copy_weights(fresh), copy.deepcopy(fresh.optimizer.state_dict())
    with pytest.raises((CheckpointError, FileNotFoundError)):
        fresh.load_checkpoint(tmp_path)
    assert not fresh.optimizer.state
    assert fresh.optimizer.state_dict() == groups
    torch.testing.assert_close(copy_weights(fresh), weights, rtol=0, atol=0)


@pytest.mark.parametrize("is_saved_split", [True, False])
def test_load_checkpoint_with_a_different_number_of_groups_raises(is_saved_split, tmp_path):
    saved, fresh = build_model(), build_model()
    trainer = start(saved, parameters=split_groups(saved) if is_saved_split else None)
    train(trainer, 1)
    trainer.save_checkpoint(tmp_path)
    other = start(fresh, parameters=None if is_saved_split else split_groups(fresh))
    with pytest.raises(CheckpointError, match="param.groups"):
        other.load_checkpoint(tmp_path)
    other.load_checkpoint(tmp_path, load_optimizer_states=False)
    assert not other.optimizer.state
    torch.testing.assert_close(copy_weights(other), copy_weights(trainer), rtol=0, atol=0)


def test_load_checkpoint_restores_each_groups_settings(tmp_path):
    saved, fresh = build_model(), build_model()
    trainer, resumed = (start(each, parameters=split_groups(each)) for each in (saved, fresh))
    train(trainer, 1)
    for group, lr in zip(trainer.optimizer.param_groups, (0.3, 0.4), strict=True):
        group["lr"], group["betas"], group["note"] = lr, (0.5, lr), {"inner": [lr, {"x": 1}]}
    trainer.save_checkpoint(tmp_path)
    resumed.load_checkpoint(tmp_path)
    for group, lr in zip(resumed.optimizer.param_groups, (0.3, 0.4), strict=True):
        assert (group["lr"], group["betas"]) == (lr, (0.5, lr))
        assert group["note"] == {"inner": [lr, {"x": 1}]}


def test_load_checkpoint_with_parameters_in_another_order_restores_each_state(tmp_path):
    saved, fresh = build_model(), build_model()
    trainer = start(saved, parameters=saved.parameters())
    resumed = start(fresh, parameters=reversed(list(fresh.parameters())))
    train(trainer, 2)
    trainer.save_checkpoint(tmp_path)
    resumed.load_checkpoint(tmp_path)
    for name, _ in saved.named_parameters():
        torch.testing.assert_close(get_state(resumed, name), get_state(trainer, name))


class Branches(torch.nn.Module):
    """Two layers, of which only the first one is used."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.used, self.unused = torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)

    def forward(self, x):
        return self.used(x)


def test_parameter_without_a_gradient_has_no_state_in_a_checkpoint(tmp_path):
    trainer, resumed = start(Branches()), start(Branches())
    train(trainer, 2)
    trainer.save_checkpoint(tmp_path)
    assert get_state(trainer, "unused.weight") == {}
    resumed.load_checkpoint(tmp_path)
    assert get_state(resumed, "unused.weight") == {}
    assert get_state(resumed, "used.weight")["step"] == 2
    train(resumed, 1)
    train(trainer, 1)
    torch.testing.assert_close(copy_weights(resumed), copy_weights(trainer), rtol=0, atol=0)


def test_parameter_outside_the_model_keeps_its_value_and_state_in_a_checkpoint(tmp_path):
    def build():
        model, weight = build_model(), torch.nn.Parameter(torch.ones(2))
        return start(model, parameters=[weight, *model.parameters()]), weight

    (trainer, weight), (resumed, other) = build(), build()
    for _ in range(3):
        trainer.backward((trainer(torch.ones(4, 4)) * weight).pow(2).sum())
        trainer.step()
    trainer.save_checkpoint(tmp_path)
    resumed.load_checkpoint(tmp_path)
    states = resumed.optimizer.state[other], trainer.optimizer.state[weight]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert states[0]["step"] == 3
    torch.testing.assert_close(other, weight, rtol=0, atol=0)
    assert not torch.equal(other, torch.ones(2))


@pytest.mark.parametrize("is_saved_frozen", [True, False])
def test_state_of_a_layer_unfrozen_later_is_restored_at_once(is_saved_frozen, tmp_path):
    def build():
        model = build_model()
        model[0].requires_grad_(False)
        return start(model, parameters=model.parameters())

    trainer, resumed = build(), build()
    train(trainer, 1)
    trainer.module[0].requires_grad_(True)
    train(trainer, 4)
    trainer.module[0].requires_grad_(not is_saved_frozen)
    trainer.save_checkpoint(tmp_path)
    resumed.load_checkpoint(tmp_path)
    for each in (trainer, resumed):
        each.module[0].requires_grad_(True)
        assert get_state(each, "0.weight")["step"] == 4
        assert get_state(each, "2.weight")["step"] == 5
        train(each, 2)
    torch.testing.assert_close(copy_weights(resumed), copy_weights(trainer), rtol=0, atol=0)


class Remembering(torch.optim.Optimizer):
    """An optimizer whose state has lists and dicts, in which order matters."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["history"] = []
                    state["sums"] = {"plain": {"all": torch.zeros_like(parameter)}, "count": 0}
                    state["mixed"] = [1, torch.zeros_like(parameter), {"last": [2.5, None]}]
                    state["pair"] = (torch.ones(2), 3)
                state["history"].append(parameter.grad.clone())
                state["sums"]["plain"]["all"] += parameter.grad
                state["sums"]["count"] += 1
                state["mixed"][1] += parameter.grad
                parameter.sub_(state["mixed"][1], alpha=group["lr"])


def resume_nested_state(directory, stage, steps):
    trainers = []
    for _ in range(2):
        model = build_model()
        own = Remembering(model.parameters())
        trainers.append(start(model, optimizer=own, zero_optimization={"stage": stage}))
    trainer, resumed = trainers
    train(trainer, steps)
    trainer.save_checkpoint(directory)
    resumed.load_checkpoint(directory)
    for name, _ in trainer.module.named_parameters():
        torch.testing.assert_close(
            get_state(resumed, name), get_state(trainer, name), rtol=0, atol=0
        )
    assert len(get_state(resumed, "0.weight")["history"]) == steps
    train(trainer, 1)
    train(resumed, 1)
    torch.testing.assert_close(copy_weights(resumed), copy_weights(trainer), rtol=0, atol=0)


@pytest.mark.parametrize("steps", [1, 12])
def test_nested_state_of_a_custom_optimizer_is_restored(tmp_path, steps):
    resume_nested_state(tmp_path, 0, steps)


def test_nested_state_of_a_custom_optimizer_is_restored_on_fsdp(tmp_path):
    run_distributed_test(resume_nested_state, 2, tmp_path, 2, 12)


def train_all_variants(directory, stage, is_loaded):
    """Train each variant for three steps and save, or load; return the weights two steps later."""
    weights = {}
    override = {"backend": "torch", "checkpoint": {"override": True}}  # the world size changes
    for variant in sorted(VARIANTS.keys() - (NOT_SHARDED if stage else set())):
        block = VARIANTS[variant]
        trainer = start(block=block, engine=override, zero_optimization={"stage": stage})
        if is_loaded:
            trainer.load_checkpoint(directory / variant)
        else:
            train(trainer, 3)
            trainer.save_checkpoint(directory / variant)
        train(trainer, 2)
        weights[variant] = copy_weights(trainer)
    return weights


@pytest.mark.parametrize("stage", [2, *(pytest.param(s, marks=pytest.mark.slow) for s in (0, 3))])
def test_state_saved_on_two_ranks_is_restored_on_one(stage, tmp_path):
    expected = run_distributed_test(train_all_variants, 2, tmp_path, stage, False)[0]
    resumed = train_all_variants(tmp_path, stage, True)
    torch.testing.assert_close(resumed, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_state_saved_on_one_rank_is_restored_on_two(tmp_path):
    expected = train_all_variants(tmp_path, 2, False)
    resumed = run_distributed_test(train_all_variants, 2, tmp_path, 2, True)[0]
    torch.testing.assert_close(resumed, expected, rtol=1e-5, atol=1e-6)
