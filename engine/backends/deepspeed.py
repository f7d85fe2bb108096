"""Backend that trains with DeepSpeed's engine."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from engine.backends.base import DTYPES, Backend, compute_norm, get_gradient
from engine.backends.build_locks import log_build_locks
from engine.backends.deepspeed_checkpoint import (
    check_sharding,
    collect_extra_entries,
    keep_implementation,
    read_scaler,
    refuse_pickled_code,
    report_damage_on_all_ranks,
    set_format,
)
from engine.backends.deepspeed_config import build_deepspeed_config
from engine.backends.deepspeed_import import import_for_config
from engine.backends.deepspeed_layout import Layout
from engine.backends.deepspeed_optimizer import prepare_optimizer, update_muon_momentum
from engine.backends.deepspeed_order import BackwardOrder
from engine.backends.deepspeed_structure import check_structure, read_weights
from engine.checkpoint.deepspeed_files import DeepSpeedFiles, SavedTensor
from engine.checkpoint.plain_values import report_damage, write_values
from engine.config import Config
from engine.config.batch_sizes import BatchSizes
from engine.config.wording import count_noun
from engine.distributed.ranks import Ranks, set_group_timeouts
from engine.training.data import repeat_batches
from engine.training.optimizers import NoOptimizer, OptimizerFactory
from engine.training.precision import cast_layer_inputs

__all__ = ["DeepSpeedBackend"]

_SCALER = "grad_scaler.pt"


class DeepSpeedBackend(Backend):
    """Backend that trains with DeepSpeed's engine, including ZeRO and offloading.

    DeepSpeed must compile its own optimizers before their first use. The backend therefore uses
    PyTorch's implementation of the config's optimizer, unless the config requires DeepSpeed's.

    Args:
        model: the user's module.
        optimizer: the user's optimizer, or a function that takes the parameters and returns an
            optimizer; if None, the config's optimizer is used.
        config: a validated config.
        ranks: rank, world size and device of this process. Even a single process needs an
            initialized process group.
        parameters: tensors or param groups to train; if None, all parameters that require
            gradients.
        mpu: model-parallel unit for ``deepspeed.initialize``.
        mesh_param: shape of the device mesh for ``deepspeed.initialize``.

    Raises:
        ImportError: DeepSpeed is not installed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | OptimizerFactory | None,
        config: Config,
        ranks: Ranks,
        *,
        parameters: list[Any] | None = None,
        mpu: Any = None,
        mesh_param: Any = None,
    ) -> None:
        deepspeed = import_for_config()
        optimizer, parameters, trained = prepare_optimizer(model, optimizer, config, parameters)
        num_parameters = _count_elements(trained)
        layout = Layout(model, trained)
        # DeepSpeed reads the local rank from the environment. Set it in case no launcher did.
        os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))
        if ranks.local_rank == 0:
            log_build_locks()
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            model_parameters=parameters,
            config=build_deepspeed_config(config, builds_optimizer=optimizer is None),
            mpu=mpu,
            mesh_param=mesh_param,
        )
        set_group_timeouts()
        self._trains = optimizer is not None or config.optimizer is not None
        self._is_managed = config.raw.get("managed_gradient_accumulation", True)
        # ZenFlow itself decides when it applies the accumulated gradients.
        self._has_zenflow = getattr(self.engine, "zenflow", False)
        self._sets_boundary = self._is_managed and not self._has_zenflow
        super().__init__(
            self.engine.module,
            self.engine.optimizer if self._trains else NoOptimizer(),
            ranks,
            num_parameters=num_parameters,
            basic_optimizer=self.engine.basic_optimizer if self._trains else None,
        )
        self._config = config
        self._order = BackwardOrder(self.engine, config.zero_stage)
        is_split = self.engine.pipeline_parallelism or self.engine.autotp_size() > 1
        self._has_rank_local_weights = mpu is not None or self.engine.has_moe_layers or is_split
        self._layout = None if self._has_rank_local_weights else layout
        if self.engine.pipeline_parallelism:
            self._guard_pipeline()
        self._input_casts: list[Any] = []
        dtype = DTYPES.get(config.precision)
        if dtype is not None and config.model.cast_inputs:
            # DeepSpeed's weights have 16 bits. Cast the layers' inputs too, so that scripts do not
            # have to; autocast does the same.
            self._input_casts += cast_layer_inputs(self.model, dtype)

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self._move_inputs(args, kwargs)
        return self.engine(*args, **kwargs)

    @override
    def prepare_backward(self, *, is_last: bool) -> None:
        if self._trains and self._sets_boundary:
            self.engine.set_gradient_accumulation_boundary(is_last)

    def _start_backward(self, *, is_last: bool) -> None:
        """Check that a backward pass is supported, and prepare DeepSpeed for the pass.

        If DeepSpeed manages gradient accumulation, ``is_last`` marks the last pass of a step.
        """
        self._order.check(is_last=is_last and self._is_managed)
        if self._sets_boundary:
            self.engine.set_gradient_accumulation_boundary(is_last)

    @override
    def backward(
        self, loss: Tensor, accumulation: int, *, is_last: bool, retain_graph: bool = False
    ) -> None:
        self._start_backward(is_last=is_last)
        interval = self.engine.gradient_accumulation_steps()
        # With ZenFlow, this is `update_interval`, or 0 if ZenFlow chooses the interval.
        scaled = accumulation == interval or (self._has_zenflow and interval > 0)
        loss = loss if scaled else loss / accumulation
        with self._order.explain_errors():
            self.engine.backward(loss, retain_graph=retain_graph, scale_wrt_gas=scaled)

    @override
    def scale(self, loss: Tensor, accumulation: int, *, is_last: bool) -> Tensor:
        self._start_backward(is_last=is_last)
        del accumulation  # DeepSpeed's backward hooks divide the gradients by this number
        scaled: Tensor = self.engine.scale(loss)
        return scaled

    @override
    def step(self, *, divide_by: int = 1) -> bool:
        # Without ZeRO, DeepSpeed rejects a direct `loss.backward()`. With ZeRO, DeepSpeed's hooks
        # have already divided the gradients.
        del divide_by
        self._order.start_step()
        # Under torch_autocast without ZeRO, DeepSpeed counts a step as applied even if torch's
        # scaler skips it. The scaler lowers its scale after each skipped step, so compare scales.
        scaler = self.engine.torch_autocast_z0_gradscaler
        before = scaler.get_scale() if scaler else 0.0
        checks_overflow = scaler is not None or hasattr(self.engine.optimizer, "overflow")
        if not checks_overflow and not self._are_gradients_finite():
            self._skip_step()
            return False
        if self._sets_boundary:
            self.engine.set_gradient_accumulation_boundary(is_boundary=True)
        update_muon_momentum(self.engine.optimizer)
        # Between two updates of all weights, ZenFlow updates only those with important gradients.
        is_partial = self._has_zenflow and not self.engine.is_gradient_accumulation_boundary()
        self.engine.step()
        applied: bool = self.engine.was_step_applied() or is_partial
        if scaler and scaler.get_scale() < before:
            applied = False
            self.engine.skipped_steps += 1
        self._read_norm()
        return applied

    def _read_norm(self) -> None:
        norm = self.engine.get_global_grad_norm()
        if norm is not None:
            self.grad_norm = float(norm)

    @override
    def run_pipeline(
        self, batches: Iterator[Any] | None, *, trains: bool
    ) -> tuple[Tensor, bool] | None:
        if not self.engine.pipeline_parallelism:
            return None
        reads_data = self.engine.is_first_stage() or self.engine.is_last_stage()
        if batches is None and reads_data and self.engine.data_iterator is None:
            repeat_batches(None)  # raises an error that states how to pass data
        if not trains:
            return self.engine.eval_batch(batches), False
        loss = self.engine.train_batch(batches)
        self._read_norm()
        return loss, self.engine.was_step_applied()

    def _are_gradients_finite(self) -> bool:
        """Return whether the gradients of all ranks are finite.

        Without ZeRO, DeepSpeed does not check this. If all ranks have the same gradients, this
        method also stores the gradient norm in ``grad_norm``.
        """
        parameters = (p for g in self.optimizer.param_groups for p in g["params"])
        norm = compute_norm([get_gradient(p) for p in parameters if p.grad is not None])
        if self._is_managed and not self._has_rank_local_weights:
            self.grad_norm = norm
            return math.isfinite(norm)
        return self.mean(float(not math.isfinite(norm))) == 0

    def _guard_pipeline(self) -> None:
        """Make the pipeline skip optimizer steps whose gradients are not finite."""
        take_step = self.engine._take_model_step  # noqa: SLF001  # private in DeepSpeed

        def take_finite_step(*args: Any) -> None:
            if hasattr(self.engine.optimizer, "overflow") or self._are_gradients_finite():
                take_step(*args)
            else:
                self._skip_step()
                self.engine._step_applied = False  # noqa: SLF001  # private in DeepSpeed

        self.engine._take_model_step = take_finite_step  # noqa: SLF001  # private in DeepSpeed

    def _skip_step(self) -> None:
        self.engine.zero_grad()
        self.engine.micro_steps += 1
        self.engine.global_steps += 1
        self.engine.skipped_steps += 1
        self.engine.global_samples += self.engine.train_batch_size()

    @override
    def set_batch_sizes(self, batch: BatchSizes) -> None:
        self.engine.set_train_micro_batch_size(batch.micro)
        self.engine.set_train_batch_size(batch.train)

    @override
    def has_gradients(self) -> bool:
        if self.optimizer is self.basic_optimizer:
            return super().has_gradients()
        # DeepSpeed moves the gradients to its own buffers. ZeRO's optimizer fills this dict in the
        # last backward pass of a step, and its `step` fails without it.
        averaged = getattr(self.optimizer, "averaged_gradients", None)
        is_kept = self._config.zero_stage in {1, 2} and not self._config.cpu_offload
        if averaged is None or not is_kept or not self._is_managed:
            return True
        return any(gradients is not None for gradients in averaged.values())

    @override
    def zero_grad(self) -> None:
        self._order.start_step()
        self.engine.zero_grad()

    @property
    @override
    def loss_scale(self) -> float:
        if scaler := self.engine.torch_autocast_z0_gradscaler:
            return float(scaler.get_scale())
        scale = getattr(self.optimizer, "cur_scale", None) or getattr(
            self.optimizer, "loss_scale", None
        )
        return float(scale) if scale and self._config.precision == "fp16" else 1.0

    @override
    def save(self, checkpoint_dir: Path, *, frozen: bool = True) -> None:
        trusts = self._config.checkpoint.trust_pickle
        self.engine.save_checkpoint(
            str(checkpoint_dir.parent),
            tag=checkpoint_dir.name,
            client_state=collect_extra_entries(self.engine, checkpoint_dir, trusts=trusts),
            save_latest=False,
            exclude_frozen_parameters=not frozen,
        )
        if self._layout is not None and self.ranks.rank == 0:
            self._layout.write(checkpoint_dir, frozen=frozen)
        scaler = self.engine.torch_autocast_z0_gradscaler
        if scaler and self.ranks.rank == 0:
            write_values(
                checkpoint_dir / _SCALER, scaler.state_dict()
            )  # DeepSpeed does not save it

    @override
    def save_async(
        self,
        checkpoint_dir: Path,
        group: dist.ProcessGroup | None,
        buffers: dict[str, Any],
        *,
        frozen: bool = True,
    ) -> Future[None]:
        del checkpoint_dir, group, buffers, frozen
        raise ValueError(
            "`engine.checkpoint.async` is not supported by the DeepSpeed backend. Set it to false, "
            "and configure DeepSpeed's asynchronous writer in the `checkpoint` section instead."
        )

    @override
    def load(
        self, checkpoint_dir: Path, *, optimizer: bool, strict: bool, frozen: bool = True
    ) -> None:
        strict &= frozen
        optimizer &= self.engine.basic_optimizer is not None
        # At stage 3, all ranks must read their weights together, so no check may fail before the
        # read.
        checks_files = optimizer and self._layout is not None
        own = read_weights(self.engine) if checks_files else {}
        with report_damage_on_all_ranks(checkpoint_dir, self.ranks):
            trusts = self._config.checkpoint.trust_pickle
            files = DeepSpeedFiles(checkpoint_dir, trusts=trusts)
            scaler = self.engine.torch_autocast_z0_gradscaler if optimizer else None
            saved_scaler = read_scaler(checkpoint_dir / _SCALER, scaler)
            if self._layout is not None:
                self._layout.check(files, optimizer=optimizer, strict=strict)
            if checks_files:
                check_sharding(files, self._config.zero_stage, self.engine.seq_dp_world_size)
                if not files.is_universal:
                    check_structure(self.engine, checkpoint_dir, own, strict=strict, trusts=trusts)
        with report_damage(checkpoint_dir):
            self._load(files, optimizer=optimizer, strict=strict)
        if scaler is not None and saved_scaler is not None:
            scaler.load_state_dict(saved_scaler)

    def _load(self, files: DeepSpeedFiles, *, optimizer: bool, strict: bool) -> None:
        with contextlib.ExitStack() as stack:
            if not self._config.checkpoint.trust_pickle:
                stack.enter_context(refuse_pickled_code())
            stack.enter_context(set_format(self.engine, files))
            if optimizer or self._layout is None or files.is_universal:
                stack.enter_context(keep_implementation(self.basic_optimizer))
                self.engine.load_checkpoint(
                    str(files.directory.parent),
                    tag=files.directory.name,
                    load_module_strict=strict,
                    load_optimizer_states=optimizer,
                    load_lr_scheduler_states=False,
                )
            else:
                self._load_only_weights(files, strict=strict)

    def _load_only_weights(self, files: DeepSpeedFiles, *, strict: bool) -> None:
        """Load the weights and the step counters of a checkpoint, but not the optimizer's state.

        This method does not call DeepSpeed's ``load_checkpoint``. At ZeRO stage 3,
        ``load_checkpoint`` would ignore this checkpoint and load the weights of the checkpoint that
        the file ``latest`` names.
        """
        with report_damage_on_all_ranks(files.directory, self.ranks):
            found = files.find_weights()
            weights = {k: v.read() if isinstance(v, SavedTensor) else v for k, v in found.items()}
            counters = files.read_run_state(self.engine.train_batch_size())["counters"]
        self._load_weights(weights, strict, None)
        for name, count in counters.items():
            setattr(self.engine, name, count)

    def _load_weights(
        self, weights: Mapping[str, Any], strict: bool, load_fn: Callable[..., Any] | None
    ) -> None:
        from deepspeed.utils import safe_set_full_fp32_param

        self.engine.load_module_state_dict(
            {"module": weights}, strict=strict, custom_load_fn=load_fn, fetch_z3_params=True
        )
        # Without a refresh, the next step would overwrite the weights with the optimizer's old
        # copies.
        if hasattr(self.optimizer, "refresh_fp32_params"):
            self.optimizer.refresh_fp32_params()
        elif self._config.zero_stage == 3 and self._trains:
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad and name in weights:
                    whole = weights[name].to(parameter.device, torch.float32)
                    safe_set_full_fp32_param(parameter, whole)
        # DeepSpeed keeps small parameters whole after it has loaded a checkpoint.
        if small := getattr(self.engine.optimizer, "persistent_parameters", None):
            small[0].all_gather(small)

    @override
    def snapshot(self, reuse: Any = None) -> Any:
        # Only DeepSpeed can save its state, so the snapshot is a temporary checkpoint.
        directory = [tempfile.mkdtemp(prefix="onecycle-") if self.ranks.rank == 0 else ""]
        dist.broadcast_object_list(directory, group=self.ranks.control_group)
        checkpoint_dir = Path(directory[0], "snapshot")
        self.save(checkpoint_dir)
        dist.barrier()  # every rank reads the files that rank 0 wrote
        return checkpoint_dir, self.grad_norm

    @override
    def restore(self, snapshot: Any, *, only_check: bool = False) -> None:
        assert not only_check, "only the PyTorch backend saves snapshots in checkpoints"
        checkpoint_dir, self.grad_norm = snapshot
        self.load(checkpoint_dir, optimizer=True, strict=True)
        dist.barrier()
        if self.ranks.rank == 0:
            shutil.rmtree(checkpoint_dir.parent)

    @override
    def describe(self) -> tuple[str, str]:
        count = count_noun(self.ranks.world_size, "rank")
        how = f"DeepSpeed, ZeRO stage {self._config.zero_stage}, {count}"
        return how, self._config.precision

    @override
    def get_attribute(self, name: str) -> Any:
        is_replaced = name == "load_module_state_dict"
        return self._load_weights if is_replaced else getattr(self.engine, name)

    @override
    def destroy(self) -> None:
        self._order.release()
        for handle in self._input_casts:
            handle.remove()
        self.engine.destroy()


def _count_elements(groups: list[Any]) -> int:
    """Return the total number of elements in the parameters of the param groups.

    Call this function before DeepSpeed flattens and shards the parameters.
    """
    members = (each["params"] if isinstance(each, dict) else [each] for each in groups)
    # Parameters that zero.Init has already sharded store their full size in `ds_numel`.
    return sum(getattr(p, "ds_numel", p.numel()) for params in members for p in params)
