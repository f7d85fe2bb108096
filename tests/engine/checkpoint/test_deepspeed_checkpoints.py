"""Checkpoints that DeepSpeed wrote are loaded, and DeepSpeed's tools read ours."""

import collections
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR, StepLR

from engine.backends.deepspeed_import import import_deepspeed
from engine.errors import CheckpointError
from tests.testing.deepspeed_runs import (
    ADAMW,
    SGD,
    Net,
    build_config,
    start_deepspeed,
    start_onecycle,
    train,
)
from tests.testing.distributed import run_distributed_test

ONE_CYCLE = {
    "type": "OneCycle",
    "params": {"cycle_min_lr": 0.001, "cycle_max_lr": 0.01, "cycle_first_step_size": 4},
}


def decay(optimizer):
    return LambdaLR(optimizer, lambda step: 1 / (step + 1))


def copy_weights(trainer):
    """Return copies of the whole parameters and buffers, by name."""
    weights = dict(trainer.module.named_parameters())
    with import_deepspeed().zero.GatheredParameters(list(weights.values())):
        return {
            name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
            for name, value in trainer.module.state_dict().items()
        }


def read_float32_weights(directory):
    """Return the float32 weights of a ZeRO checkpoint as DeepSpeed's own tool reads them."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return get_fp32_state_dict_from_zero_checkpoint(directory)


def continue_on_both_backends(directory, cases):
    """Return the losses of plain DeepSpeed and of both backends after the same checkpoint."""
    from deepspeed.accelerator import get_accelerator

    records = {}
    for stage, precision, optimizer in cases:
        name = f"{stage} {precision} {optimizer['type']}"
        config, saved = build_config(stage, precision, optimizer), directory / name
        if precision == "fp16":
            type(get_accelerator()).is_fp16_supported = lambda _: True  # slow, but correct
            scaling = {"initial_scale_power": 8, "loss_scale_window": 2, "hysteresis": 1}
            config = config | {"fp16": {"enabled": True, **scaling}}
        plain = start_deepspeed(config, lr_scheduler=decay)
        train(plain, 0, 3)
        plain.save_checkpoint(saved, client_state={"mine": {"epoch": 3}})
        records[name] = {"plain": train(plain, 3, 6)}
        scale = getattr(plain.optimizer, "loss_scale", None) or getattr(
            plain.optimizer, "cur_scale", 1
        )
        plain.destroy()
        for backend in ("deepspeed", "torch"):
            trainer = start_onecycle(config, backend, lr_scheduler=decay)
            train(trainer, 7, 8)  # another state than that of the checkpoint
            _, client_state = trainer.load_checkpoint(saved)
            assert client_state == {"mine": {"epoch": 3}}
            if stage > 0 and backend == "torch":
                weights, wanted = copy_weights(trainer), read_float32_weights(saved)
                assert len(wanted) >= 5  # without frozen parameters at stage 1
                assert all(torch.equal(weights[key], value) for key, value in wanted.items())
            records[name][backend] = train(trainer, 3, 6)
            assert trainer._backend.loss_scale == scale
            assert (trainer.global_steps, trainer.global_samples) == (6, 24)
            trainer.destroy()
    return records


ALL = [(s, p, o) for s in range(4) for p in ("fp32", "bf16") for o in (ADAMW, SGD)]
ALL += [(stage, "fp16", ADAMW) for stage in range(4)]


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [
        (1, [(2, "bf16", ADAMW)]),
        pytest.param(1, ALL, marks=pytest.mark.slow),
        pytest.param(2, ALL, marks=pytest.mark.slow),
    ],
)
def test_checkpoint_of_deepspeed_continues_with_the_same_losses(ranks, cases, tmp_path):
    for records in run_distributed_test(continue_on_both_backends, ranks, tmp_path, cases):
        for name, record in records.items():
            assert record["deepspeed"] == record["plain"], name
            # In 16 bits, PyTorch computes in autocast, and DeepSpeed with 16-bit weights.
            tolerance = 1e-6 if "fp32" in name else 0.03
            assert record["torch"] == pytest.approx(record["plain"], rel=tolerance), name


def continue_after_fused_adam(stage, directory):
    """Load a checkpoint with the states of FusedAdam, which counts steps in integers."""
    config = build_config(stage)
    plain = start_deepspeed(config)
    train(plain, 0, 3)
    plain.save_checkpoint(directory)
    wanted = train(plain, 3, 6)
    name = "*optim_states.pt" if stage else "*model_states.pt"
    (path,) = directory.rglob(name)
    content = torch.load(path, weights_only=False)
    keys = {0: ["optimizer"], 1: ["optimizer_state_dict", "base_optimizer_state"]}
    saved = content
    for key in keys.get(stage, ["optimizer_state_dict", "optimizer_state_dict"]):
        saved = saved[key]
    for state in saved["state"].values():
        state["step"] = int(state["step"])
    for group in saved["param_groups"]:
        for setting in group.keys() - {"lr", "betas", "eps", "weight_decay", "params"}:
            del group[setting]
        group |= {"bias_correction": True, "step": 3}
    torch.save(content, path)
    for backend in ("deepspeed", "torch"):
        trainer = start_onecycle(config, backend)
        fused = [group["fused"] for group in trainer.optimizer.param_groups]
        trainer.load_checkpoint(directory)
        assert train(trainer, 3, 6) == pytest.approx(wanted, rel=1e-6)
        assert [group["fused"] for group in trainer.optimizer.param_groups] == fused
        assert "bias_correction" not in trainer.optimizer.param_groups[0]


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_checkpoint_with_states_of_fused_adam_continues(stage, tmp_path):
    run_distributed_test(continue_after_fused_adam, 1, stage, tmp_path)


def save_with_deepspeed(stage, directory):
    plain = start_deepspeed(build_config(stage))
    train(plain, 0, 2)
    plain.save_checkpoint(directory)
    weights = copy_weights(plain)
    plain.save_checkpoint(directory, tag="again")
    return weights


def fail_to_load(stage, directory, weights):
    """Load what two ranks saved on a single one: an error on DeepSpeed, weights on PyTorch."""
    trainer = start_onecycle(build_config(stage), "deepspeed")
    before = copy_weights(trainer)
    with pytest.raises(CheckpointError, match="saved by 2 ranks, not 1.*`ds_to_universal`"):
        trainer.load_checkpoint(directory)
    other = start_onecycle(build_config(0), "deepspeed")
    with pytest.raises(
        CheckpointError, match=f"saved at ZeRO stage {1 if stage < 3 else 3}, not 0"
    ):
        other.load_checkpoint(directory)
    wider = Net()
    wider.body = torch.nn.Linear(4, 5)
    with pytest.raises(CheckpointError, match="`body.weight` has shape"):
        start_onecycle(build_config(stage), "torch", wider).load_checkpoint(directory)
    assert all(torch.equal(value, before[key]) for key, value in copy_weights(trainer).items())
    assert trainer.global_steps == 0
    on_torch = start_onecycle(build_config(stage), "torch")
    on_torch.load_checkpoint(directory)
    trainer.load_checkpoint(directory, load_module_only=True)
    other.load_checkpoint(directory, load_module_only=True)
    for loaded in (on_torch, trainer, other):
        assert all(torch.equal(value, weights[key]) for key, value in copy_weights(loaded).items())
    assert (on_torch.global_steps, trainer.global_steps) == (2, 0)


@pytest.mark.parametrize("stage", [2, 3])
def test_failed_load_of_another_sharding_changes_nothing(stage, tmp_path):
    weights = run_distributed_test(save_with_deepspeed, 2, stage, tmp_path)[0]
    run_distributed_test(fail_to_load, 1, stage, tmp_path, weights)


class Bomb:
    def __reduce__(self):
        return os.makedirs, ("exploded", 0o700, True)


def load_pickled_code(directory):
    os.chdir(directory)
    plain = start_deepspeed(build_config(1))
    plain.save_checkpoint(directory, tag="x", client_state={"mine": Bomb()})
    for backend in ("deepspeed", "torch"):
        with pytest.raises(CheckpointError, match=r"`os\.makedirs`.*trust_pickle"):
            start_onecycle(build_config(1), backend).load_checkpoint(directory, tag="x")
    assert not (directory / "exploded").exists()
    trainer = start_onecycle(build_config(1), "torch", checkpoint={"trust_pickle": True})
    trainer.load_checkpoint(directory, tag="x")
    assert (directory / "exploded").exists()


def test_checkpoint_of_deepspeed_with_code_in_it_is_refused(tmp_path):
    run_distributed_test(load_pickled_code, 1, tmp_path)


def switch_in_one_directory(directory):
    """Switch from DeepSpeed to onecycle and back; the checkpoint written last is loaded."""
    config = build_config(1, scheduler=ONE_CYCLE)
    plain = start_deepspeed(build_config(1))
    train(plain, 0, 3)
    plain.save_checkpoint(directory)
    trainer = start_onecycle(config, "torch", checkpoint={"dir": str(directory), "every": 1})
    assert trainer.global_steps == 3
    assert trainer.get_lr()[0] == pytest.approx(0.001 + 0.009 * 3 / 4)
    train(trainer, 3, 4)
    resumed = start_onecycle(config, "torch", checkpoint={"dir": str(directory)})
    assert resumed.global_steps == 4
    train(plain, 3, 8)
    plain.save_checkpoint(directory)
    again = start_onecycle(config, "torch")
    path, _ = again.load_checkpoint(directory)
    assert (path, again.global_steps) == (str(directory / "global_step8"), 8)


def test_resume_after_a_switch_loads_the_checkpoint_that_was_written_last(tmp_path):
    run_distributed_test(switch_in_one_directory, 1, tmp_path)


def load_small_sub_groups(directory):
    """At stage 3, the files contain groups of `sub_group_size` elements, not param groups."""
    zero = {"stage": 3, "sub_group_size": 10}
    config = build_config() | {"zero_optimization": zero}
    plain = start_deepspeed(config)
    train(plain, 0, 3)
    plain.save_checkpoint(directory)
    wanted = train(plain, 3, 6)
    for backend in ("deepspeed", "torch"):
        trainer = start_onecycle(config, backend)
        trainer.load_checkpoint(directory)
        assert train(trainer, 3, 6) == pytest.approx(wanted, rel=1e-6)
    model = Net()
    groups = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    other = start_onecycle(config, "deepspeed", model, groups=groups)
    before = copy_weights(other)
    with pytest.raises(CheckpointError, match="the number of param groups is 2 in the checkpoint"):
        other.load_checkpoint(directory)
    assert all(torch.equal(value, before[name]) for name, value in copy_weights(other).items())


def test_checkpoint_with_small_sub_groups_continues(tmp_path):
    run_distributed_test(load_small_sub_groups, 1, tmp_path)


def resume_automatically_from_universal(directory):
    section = {"dir": str(directory), "resume": "auto"}
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        start_onecycle(build_config(1), "deepspeed", checkpoint=section)


def test_resume_auto_does_not_ignore_a_universal_checkpoint(tmp_path):
    (tmp_path / "latest_universal").write_text("global_step4_universal")
    run_distributed_test(resume_automatically_from_universal, 1, tmp_path)


def refuse_nvme(directory):
    plain = start_deepspeed(build_config(1))
    plain.save_checkpoint(directory, tag="x")
    (directory / "x" / "offloaded_tensors").mkdir()
    with pytest.raises(CheckpointError, match="offloaded to NVMe. Load it with the DeepSpeed"):
        start_onecycle(build_config(1), "torch").load_checkpoint(directory)


def test_checkpoint_with_states_on_nvme_is_refused_on_torch(tmp_path):
    run_distributed_test(refuse_nvme, 1, tmp_path)


def switch_backends(directory):
    config = build_config(1, scheduler=ONE_CYCLE)
    first = start_onecycle(config, "deepspeed")
    train(first, 0, 3)
    first.save_checkpoint(directory, client_state={"epoch": 3})
    second = start_onecycle(config, "torch")
    assert second.load_checkpoint(directory)[1] == {"epoch": 3}
    assert train(second, 3, 6) == pytest.approx(train(first, 3, 6), rel=1e-6)
    rmsprop = config | {"optimizer": {"type": "RMSprop", "params": {"lr": 0.01}}}
    other = start_onecycle(rmsprop, "torch", checkpoint={"override": True})
    other.load_checkpoint(directory)
    assert not other.optimizer.state
    assert other.global_steps == 3


def test_checkpoint_of_the_deepspeed_backend_continues_on_torch(tmp_path):
    run_distributed_test(switch_backends, 1, tmp_path)


def halve_every_second_step(optimizer):
    return StepLR(optimizer, 2, 0.5)


def load_without_files_of_onecycle(stage, directory):
    """Load the files of DeepSpeed only, as `ds_to_universal` copies them."""
    client_state = {"epoch": 3, "queue": collections.deque([1], 2), "optimizer": "mine", 1: 2}
    ours = start_onecycle(build_config(stage), "deepspeed", lr_scheduler=halve_every_second_step)
    train(ours, 0, 3)
    ours.save_checkpoint(directory, tag="x", client_state=client_state)
    wanted, lr = train(ours, 3, 6), ours.get_lr()
    for name in ("manifest.json", "engine.pt", "layout.json"):
        (directory / "x" / name).unlink()
    plain = start_deepspeed(build_config(stage), lr_scheduler=halve_every_second_step)
    _, loaded = plain.load_checkpoint(str(directory), tag="x")
    assert (loaded["epoch"], loaded["queue"], loaded[1]) == (3, collections.deque([1], 2), 2)
    assert train(plain, 3, 6) == wanted
    for backend in ("deepspeed", "torch"):
        trainer = start_onecycle(build_config(stage), backend, lr_scheduler=halve_every_second_step)
        _, loaded = trainer.load_checkpoint(directory, tag="x")
        assert loaded == client_state
        assert loaded["queue"].maxlen == 2
        assert train(trainer, 3, 6) == pytest.approx(wanted, rel=1e-6)
        assert trainer.get_lr() == lr


@pytest.mark.parametrize("stage", [0, 3])
def test_deepspeed_files_of_ours_contain_client_state_and_scheduler(stage, tmp_path):
    run_distributed_test(load_without_files_of_onecycle, 1, stage, tmp_path)


def return_to_deepspeed(directory):
    config = build_config(1, scheduler=ONE_CYCLE)
    ours = start_onecycle(config, "deepspeed")
    train(ours, 0, 3)
    ours.save_checkpoint(directory)
    plain = start_deepspeed(config)
    plain.load_checkpoint(str(directory))
    assert plain.lr_scheduler.last_batch_iteration == 2
    assert train(plain, 3, 5) == pytest.approx(train(ours, 3, 5), rel=1e-6)
    assert plain.get_lr() == pytest.approx(ours.get_lr())


def test_deepspeed_continues_the_schedule_of_a_checkpoint_of_ours(tmp_path):
    run_distributed_test(return_to_deepspeed, 1, tmp_path)


def load_only_weights_of_an_older_tag(directory):
    trainer = start_onecycle(build_config(3), "deepspeed")
    train(trainer, 0, 1)
    trainer.save_checkpoint(directory, tag="old")
    old = copy_weights(trainer)
    train(trainer, 1, 3)
    trainer.save_checkpoint(directory)
    fresh = start_onecycle(build_config(3), "deepspeed")
    fresh.load_checkpoint(directory, tag="old", load_module_only=True)
    assert all(parameter.numel() for parameter in fresh.module.parameters())  # small ones are whole
    assert all(torch.equal(value, old[name]) for name, value in copy_weights(fresh).items())


def test_weights_of_an_older_tag_at_stage_3_are_not_those_of_the_newest(tmp_path):
    run_distributed_test(load_only_weights_of_an_older_tag, 1, tmp_path)


def build_universal_config(stage):
    zero = {"stage": stage, "sub_group_size": 4}  # so small that stage 3 splits the param groups
    return build_config(stage, "bf16", scheduler=ONE_CYCLE, zero_optimization=zero)


def save_and_convert(stage, directory):
    """Save on DeepSpeed, run DeepSpeed's tools on the checkpoint, and continue."""
    config = build_universal_config(stage)
    trainer = start_onecycle(config, "deepspeed")
    train(trainer, 0, 4)
    trainer.save_checkpoint(directory, client_state={"epoch": 4})
    if dist.get_rank() == 0:
        source = directory / "global_step4"
        tool = ["-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(source)]
        run_tool([*tool, "--output_folder", f"{source}_universal"])
        run_tool([str(directory / "zero_to_fp32.py"), str(directory), str(directory / "whole")])
        whole = torch.load(directory / "whole" / "pytorch_model.bin", weights_only=True)
        assert whole.keys() == Net().state_dict().keys()
        output = directory / "whole.safetensors"
        run_tool(["-m", "onecycle", "checkpoint", "export", str(directory), "-o", str(output)])
        exported = load_file(output)
        assert exported.keys() == whole.keys()
        assert all(torch.equal(exported[key].float(), whole[key].float()) for key in whole)
        assert all(value.dtype == torch.float32 for value in whole.values())
    dist.barrier()
    return train(trainer, 4, 6)


def run_tool(arguments):
    environment = {k: v for k, v in os.environ.items() if k not in {"RANK", "WORLD_SIZE"}}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def load_universal(stage, directory):
    config = build_universal_config(stage)
    tag = "global_step4_universal"
    with pytest.raises(CheckpointError, match="`checkpoint.load_universal` to true"):
        start_onecycle(config, "deepspeed").load_checkpoint(directory, tag)
    with pytest.raises(CheckpointError, match="universal checkpoint. Load it with the DeepSpeed"):
        start_onecycle(config, "torch").load_checkpoint(directory, tag)
    universal = config | {"checkpoint": {"load_universal": True}}
    trainer = start_onecycle(universal, "deepspeed")
    path, client_state = trainer.load_checkpoint(directory)
    assert (path, trainer.global_steps) == (str(directory / tag), 4)
    assert client_state == {"epoch": 4}
    assert trainer.get_lr()[0] == 0.01
    losses = train(trainer, 4, 6)
    trainer.save_checkpoint(directory)
    resumed = start_onecycle(universal, "deepspeed")
    resumed.load_checkpoint(directory)
    assert resumed.global_steps == 6
    os.chdir(directory)
    for file in (directory / tag / "zero").rglob("fp32.pt"):
        torch.save(Bomb(), file)
    with pytest.raises(CheckpointError, match=r"`os\.makedirs`.*trust_pickle"):
        start_onecycle(universal, "deepspeed").load_checkpoint(directory, tag)
    assert not (directory / "exploded").exists()
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_universal_checkpoint_of_ours_continues_on_another_number_of_ranks(stage, tmp_path):
    saved = run_distributed_test(save_and_convert, 2, stage, tmp_path)
    loaded = run_distributed_test(load_universal, 1, stage, tmp_path)
    mean = [sum(losses) / 2 for losses in zip(*saved, strict=True)]
    assert loaded[0] == pytest.approx(mean, rel=0.01)
