"""One case of `test_sharding`, on every rank."""

import os
import sys
import tempfile
import time
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

warnings.simplefilter("ignore")

import engine  # noqa: E402
from engine import initialization  # noqa: E402
from engine.checkpoint import collectives, manager, state, storage  # noqa: E402
from engine.distributed.ranks import disconnect  # noqa: E402

LRS = [0.01, 0.2]
CYCLE = {
    "type": "OneCycle",
    "params": {
        "cycle_min_lr": LRS,
        "cycle_max_lr": [0.1, 0.5],
        "cycle_first_step_size": 4,
        "cycle_momentum": False,
    },
}
ONE_GROUP = {
    "type": "OneCycle",
    "params": {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1, "cycle_first_step_size": 4},
}


def net():
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(3))
    return torch.nn.Sequential(*layers, torch.nn.Linear(6, 1))


def config(**changes):
    return {
        "train_batch_size": 4,
        "zero_optimization": {"stage": 3},
        "optimizer": {"type": "AdamW", "params": {"weight_decay": 0.1}},
        "engine": {"backend": "torch"},
    } | changes


def groups_of(model):
    weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    return [
        {"params": weights, "lr": LRS[0]},
        {"params": biases, "lr": LRS[1], "weight_decay": 0.0, "betas": (0.8, 0.9)},
    ]


def shared_folder():
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    return folder[0]


def update(trainer):
    trainer.backward(trainer(torch.ones(2, 6) * (trainer.global_rank + 1)).pow(2).mean())
    return trainer.step()


def whole(trainer):
    return [p.full_tensor().detach().clone() for p in trainer.module.parameters()]


def groups():
    model = net()
    trainer, optimizer, *_ = engine.initialize(
        model=model, config=config(scheduler=CYCLE), model_parameters=groups_of(model)
    )
    assert trainer.get_lr() == LRS
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert update(trainer)
    assert trainer.get_lr() == [0.0325, 0.275]
    assert [group["betas"][1] for group in optimizer.param_groups] == [0.999, 0.9]


def client_optimizer():
    model = net()
    own = torch.optim.SGD(groups_of(model)[:1], lr=0.5, momentum=0.9)
    without = config()
    del without["optimizer"]
    trainer, optimizer, *_ = engine.initialize(model=model, config=without, optimizer=own)
    assert optimizer is own
    before = whole(trainer)
    assert update(trainer)
    changed = [not torch.equal(a, b) for a, b in zip(before, whole(trainer), strict=True)]
    assert any(changed)


def resume():
    folder = shared_folder()
    runs = []
    for stop in (2, None):
        trainer, *_ = engine.initialize(model=net(), config=config())
        if stop is None:
            trainer.load_checkpoint(folder)
        for _ in range(2 if stop else 3):
            update(trainer)
        if stop:
            trainer.save_checkpoint(folder)
            for _ in range(3):
                update(trainer)
        runs.append(whole(trainer))
    assert trainer.global_steps == 5
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert Path(folder, "latest").exists()


def reshard():
    """Save, or load and save again, on however many ranks there are; compare with what is whole."""
    folder = Path(sys.argv[2])
    first = not folder.exists()
    chosen = {"backend": "torch", "checkpoint": {"override": True}}
    trainer, optimizer, *_ = engine.initialize(
        model=net(), config=config(engine=chosen, train_batch_size=6)
    )
    dist.barrier() if dist.is_initialized() else None
    if first:
        trainer.backward(trainer(torch.ones(1, 6)).pow(2).mean())
        trainer.step()
    else:
        trainer.load_checkpoint(folder)
    state = [trainer.module.state_dict(), optimizer.state_dict()["state"]]
    tensors = [t for t in flat(state) if isinstance(t, torch.Tensor)]
    found = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors]
    if first:
        reference = [t.clone() for t in found]
        if trainer.global_rank == 0:
            torch.save(reference, folder.with_suffix(".pt"))
    else:
        reference = torch.load(folder.with_suffix(".pt"))
        assert len(reference) == len(found)
        assert all(torch.equal(a, b) for a, b in zip(reference, found, strict=True))
    trainer.save_checkpoint(folder)


def flat(value):
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return [value]
    return [each for below in value for each in flat(below)]


def behind():
    """Two ranks write in the background on a group of their own, training all the while."""
    folder = shared_folder()
    chosen = {"backend": "torch", "checkpoint": {"dir": folder, "every": 2, "async": True}}
    trainer, *_ = engine.initialize(model=net(), config=config(engine=chosen))
    for step in range(7):
        update(trainer)
        if step == 5:
            expected = whole(trainer)
    trainer.wait_for_checkpoint()
    dist.barrier()
    again, *_ = engine.initialize(model=net(), config=config(engine=chosen))
    assert again.global_steps == 6
    assert all(torch.equal(a, b) for a, b in zip(expected, whole(again), strict=True))


def deepspeed_resume():
    """DeepSpeed's files in the same envelope: whole, hashed, and the run goes on the same."""
    folder = shared_folder()
    plan = {"dir": folder, "every": 2, "keep": None}
    ends = []
    for tag in (None, "global_step2"):
        zero = {"zero_optimization": {"stage": 2}, "scheduler": ONE_GROUP}
        trainer, *_ = engine.initialize(
            model=net(),
            config=config(**zero, engine={"backend": "deepspeed", "checkpoint": plan}),
        )
        if tag is not None:
            trainer.load_checkpoint(folder, tag=tag)
            assert trainer.global_steps == 2
        while trainer.global_steps < 5:
            update(trainer)
        ends.append([p.detach().clone() for p in trainer.module.parameters()])
        ends.append([torch.tensor(trainer.get_lr())])
        plan = {"dir": folder, "resume": "never"}
    _, manifest = storage.find(Path(folder), "global_step4")
    assert (manifest.backend, manifest.world_size) == ("deepspeed", 2)
    assert all(torch.equal(a, b) for a, b in zip(ends[0], ends[2], strict=True))
    assert torch.equal(ends[1][0], ends[3][0])


def autocast_resume():
    """The scale of torch's scaler, by which DeepSpeed runs autocast without ZeRO, goes on too."""
    folder = shared_folder()
    autocast = {"enabled": True, "dtype": "float16"}
    settings = config(
        zero_optimization={"stage": 0}, torch_autocast=autocast, engine={"backend": "deepspeed"}
    )
    trainer, *_ = engine.initialize(model=net(), config=settings)
    x = torch.ones(2, 6)
    for factor in (float("inf"), 1.0):
        trainer.backward(trainer(x).float().pow(2).mean() * factor)
        trainer.step()
    scale = trainer.loss_scale
    trainer.save_checkpoint(folder)
    again, *_ = engine.initialize(model=net(), config=settings)
    assert again.loss_scale == 2 * scale
    again.load_checkpoint(folder)
    assert again.loss_scale == scale
    first, second = (
        engine.lr_range_test(
            again, [x], loss_of=lambda trainer, x: trainer(x).float().pow(2).mean(), steps=30
        )
        for _ in range(2)
    )
    assert first.runs == second.runs
    assert again.loss_scale == scale


def rank_0_only():
    collectives._PATIENCE = timedelta(seconds=3)
    trainer, *_ = engine.initialize(model=net(), config=config())
    if trainer.global_rank == 0:
        trainer.save_checkpoint(tempfile.mkdtemp())
    time.sleep(8)


def other_tags():
    trainer, *_ = engine.initialize(model=net(), config=config())
    trainer.save_checkpoint(tempfile.mkdtemp(), tag=f"tag{trainer.global_rank}")


def one_rank_fails():
    """A rank that cannot write a file of its own is no reason for the other to wait for ever."""
    trainer, *_ = engine.initialize(model=net(), config=config())
    folder = shared_folder()
    update(trainer)
    write = manager.write_values
    for name in ("random.1.pt", "values.pt"):

        def full(path, values, name=name):
            if path.name == name:
                raise OSError(28, "No space left on device")
            write(path, values)

        manager.write_values = state.write_values = full
        with pytest.raises((OSError, RuntimeError), match="No space left on device"):
            trainer.save_checkpoint(folder)
    manager.write_values = state.write_values = write
    update(trainer)
    trainer.save_checkpoint(folder)
    assert storage.find(Path(folder))[1].tag == "global_step2"


def one_rank_fails_behind():
    """What rank 0 fails with while training goes on is told to both by the next save."""
    folder = shared_folder()
    chosen = {"backend": "torch", "checkpoint": {"dir": folder, "async": True}}
    trainer, *_ = engine.initialize(model=net(), config=config(engine=chosen))
    commit = storage.commit

    def full(*_):
        raise OSError(28, "No space left on device")

    storage.commit = full
    trainer.save_checkpoint(folder)
    with pytest.raises((OSError, RuntimeError), match="No space left on device"):
        trainer.save_checkpoint(folder)
    storage.commit = commit
    trainer.save_checkpoint(folder)
    trainer.wait_for_checkpoint()
    dist.barrier()
    assert storage.find(Path(folder))


def without_frozen():
    """DeepSpeed loads a checkpoint that has no frozen parameters, and leaves those it has."""
    folder = shared_folder()
    trained = None
    for again in (False, True):
        torch.manual_seed(int(again))
        model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 1))
        model[0].requires_grad_(requires_grad=False)
        settings = {"zero_optimization": {"stage": 1}, "engine": {"backend": "deepspeed"}}
        trainer, *_ = engine.initialize(model=model, config=config(**settings))
        own = trainer.module[0].weight.clone()
        if trained is not None:
            trainer.load_checkpoint(folder)
            assert torch.equal(trainer.module[1].weight, trained)
            assert torch.equal(trainer.module[0].weight, own)
            continue
        update(trainer)
        trainer.save_checkpoint(folder, exclude_frozen_parameters=True)
        trained = trainer.module[1].weight.detach().clone()


def own_backward():
    """On DeepSpeed, which divides by the micro-batches in hooks of its own."""
    ends = []
    for way in ("engine", "scale", "own"):
        chosen = {"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 2}
        trainer, *_ = engine.initialize(
            model=net(), config=config(**chosen, engine={"backend": "deepspeed"}, steps_per_print=1)
        )
        for step in range(4):
            torch.manual_seed(10 * step + trainer.global_rank)
            loss = trainer(torch.randn(1, 6)).pow(2).mean()
            if way == "engine":
                trainer.backward(loss)
            else:
                (trainer.scale(loss) if way == "scale" else loss).backward()
            trainer.step()
        assert trainer.global_steps == 2
        ends.append([p.detach().clone() for p in trainer.module.parameters()])
    for other in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ends[0], other, strict=True))


def recompute():
    """A block that is computed again comes to the same update, divided or not."""
    results = []
    for section in ({}, {"activation_checkpointing": {"cpu_checkpointing": True}}):
        chosen = {"backend": "torch", "wrap": ["Linear"]}
        trainer, *_ = engine.initialize(model=net(), config=config(**section, engine=chosen))
        update(trainer)
        results.append(whole(trainer))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def strangers():
    engine.initialize(
        model=net(), config=config(), model_parameters=[torch.nn.Parameter(torch.ones(3))]
    )


def nothing_to_wrap():
    chosen = {"backend": "torch", "wrap": ["Nonsense"]}
    engine.initialize(model=net(), config=config(engine=chosen))


def other_config():
    dist.init_process_group("gloo")
    lr = 0.001 * (dist.get_rank() + 1)
    optimizer = {"type": "AdamW", "params": {"lr": lr}}
    engine.initialize(model=net(), config=config(optimizer=optimizer))


def timeout():
    """What `onecycle launch --timeout` says is how long a collective may take."""
    os.environ["ONECYCLE_TIMEOUT"] = "7"
    engine.initialize(model=net(), config=config())
    options = dist.group.WORLD._get_backend(torch.device("cpu")).options
    assert options._timeout == timedelta(seconds=7), options._timeout


def unused():
    """A part of the model that only some passes use, which DDP has to be told to expect."""

    class Branches(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(6, 1), torch.nn.Linear(6, 1)

        def forward(self, x):
            self.turn = not getattr(self, "turn", False)
            return (self.first if self.turn else self.second)(x)

    section = {"backend": "torch", "find_unused_parameters": True}
    settings = config(zero_optimization={"stage": 0}, engine=section)
    trainer, *_ = engine.initialize(model=Branches(), config=settings)
    before = [p.detach().clone() for p in trainer.parameters()]
    assert [update(trainer) for _ in range(4)] == [True] * 4
    assert not any(map(torch.equal, before, trainer.parameters()))


def wrong_config():
    engine.initialize(model=net(), config=config(train_batch_size=-1))


def wrong_config_of_one():
    initialization._AFTER_RANK_0 = 1.0
    size = -1 if os.environ["RANK"] == "1" else 4
    engine.initialize(model=net(), config=config(train_batch_size=size))


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]]()
    disconnect()
