"""What an engine does about checkpoints: when to save, what of, and what to go on from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from engine.checkpoint import saving, storage
from engine.checkpoint.fingerprint import Identity
from engine.deepspeed_names import DeepSpeedNames
from engine.distributed import environment, signals
from engine.training.data import RunLoader
from engine.training.progress import Counters

__all__ = ["Checkpoints"]

log = logging.getLogger("onecycle")


class Checkpoints(DeepSpeedNames):
    """The part of an engine that saves and restores it, by DeepSpeed's names."""

    lr_scheduler: LRScheduler | None
    training_dataloader: DataLoader[Any] | None
    _identity: Identity
    _done: Counters
    _rehearses: bool
    _rollback: saving.Rollback | None
    _behind: saving.Behind | None
    _signals: signals.Signals | None
    _updates_before: int  # those of earlier runs, when a checkpoint was loaded

    @property
    def _updates(self) -> int:
        return self._done.update + 1

    @property
    def global_steps(self) -> int:
        """Whole batches so far, updates that were skipped included."""
        return self._done.global_steps

    def save_if_due(self) -> None:
        """Save as ``engine.checkpoint`` says, and before the process is told to end."""
        wanted = self.config.checkpoint
        if wanted.dir is None:
            return
        ends = self._signals is not None and self._signals.came_to_any(self._backend.ranks)
        due = wanted.every is not None and self._done.global_steps % wanted.every == 0
        if not (due or ends):
            return
        self.save_checkpoint(wanted.dir)
        if ends:
            self.wait_for_checkpoint()
            log.warning("saved at update %d and ended, as a signal asked for", self._updates)
            raise SystemExit(environment.SAVED_AND_ENDED)

    def resume(self) -> bool:
        """Go on from the newest checkpoint as ``engine.checkpoint.resume`` says; `initialize` does.

        Returns:
            Whether there was one.

        Raises:
            FileNotFoundError: there is none, and there must be; or there are damaged ones alone.
        """
        wanted = self.config.checkpoint
        if wanted.dir is not None and self._signals is None:
            self._signals = signals.Signals()
        if wanted.dir is None or wanted.resume == "never":
            return False
        # Of damaged checkpoints alone a run must not begin anew in silence, and write over them.
        if wanted.resume == "auto" and not storage.is_begun(Path(wanted.dir)):
            return False
        path, _ = self.load_checkpoint(wanted.dir)
        if self._backend.ranks.rank == 0:
            log.info("goes on from %s, update %d", path, self._updates)
        return True

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write everything that the run needs to go on; every rank calls it.

        Args:
            save_dir: the folder of all checkpoints of the run; made if it is absent.
            tag: name of this one; by default ``global_step`` and the count of batches.
            client_state: plain values and tensors of your own, which `load_checkpoint` returns.
            save_latest: whether `load_checkpoint` without a tag is to find this one.
            exclude_frozen_parameters: leave out parameters that need no gradients, as those of a
                model that is being adapted; loading it leaves them as they are.

        Raises:
            OSError: there is no space, or the folder cannot be written; it keeps what it held.
            RuntimeError: a rank did not come within seconds, or has failed.
            ValueError: the ranks give it different tags, or ``client_state`` holds objects.
        """
        if self._rehearses:
            log.info("no checkpoint is written in a range test")
            return True
        folder, tag = Path(save_dir), tag or f"global_step{self.global_steps}"
        state = {
            "lr_scheduler": self.lr_scheduler.state_dict() if self.lr_scheduler else None,
            "counters": asdict(self._done),
            "batch": asdict(self.config.batch),
            "loader": self._loader_state(),
            "client_state": dict(client_state or {}),
        }
        saving.save(
            self._backend,
            self.config,
            self._identity,
            folder,
            tag,
            self._updates,
            state,
            save_latest=save_latest,
            frozen=not exclude_frozen_parameters,
            behind=self._behind,
            rollback=self._rollback,
        )
        return True

    def wait_for_checkpoint(self) -> None:
        """Wait until no checkpoint is being written (``engine.checkpoint.async``).

        Every rank calls it.

        Raises:
            Exception: what writing the last one failed with, on any rank.
        """
        if self._behind is not None:
            with saving.together(self._backend.ranks.world_size):
                self._behind.wait()

    def _loader_state(self) -> dict[str, int] | None:
        loader = self.training_dataloader
        return loader.state_dict() if isinstance(loader, RunLoader) else None

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
    ) -> tuple[str, dict[str, Any]]:
        """Restore model, optimizer, loss scale, schedule and counters; every rank calls it.

        Args:
            load_dir: the folder that was given to `save_checkpoint`.
            tag: which one; by default the latest.
            load_module_strict: whether the model must have exactly the saved parameters.
            load_optimizer_states: whether to restore the optimizer and the loss scale.
            load_lr_scheduler_states: whether to restore the schedule.
            load_module_only: whether to restore the model alone.

        Returns:
            The checkpoint's path and its ``client_state``.

        Raises:
            FileNotFoundError: there is none, so that nothing begins anew in silence.
            CheckpointError: it is not whole, or of another run: another schedule, optimizer, batch,
                precision or number of ranks. Nothing was changed then.
        """
        self.wait_for_checkpoint()
        if load_module_only:
            load_optimizer_states = load_lr_scheduler_states = False
        override = self.config.checkpoint.override
        path, state = saving.load(
            self._backend,
            self._identity,
            Path(load_dir),
            tag,
            optimizer=load_optimizer_states,
            strict=load_module_strict,
            override=override,
        )
        if not load_module_only:
            self._go_on(Counters(**state["counters"]), state["loader"], state.get("batch"))
        if load_lr_scheduler_states and self.lr_scheduler is not None:
            saved = state["lr_scheduler"]
            if saved is None or override:
                saved = self._joined(saved or {}, self.lr_scheduler.state_dict())
            self.lr_scheduler.load_state_dict(saved)
            if self._rollback is not None:
                self._rollback.load(path)
        return str(path), state["client_state"]

    def _go_on(
        self,
        done: Counters,
        position: dict[str, int] | None,
        saved: Mapping[str, int] | None,
    ) -> None:
        """Take counters and place in the data, also of a run whose batches are cut otherwise."""
        batch = self.config.batch
        saved = saved or asdict(batch)
        if saved["accumulation"] != batch.accumulation:
            done.micro_steps = done.global_steps * batch.accumulation
        self._done = done
        self._updates_before = self._updates
        loader = self.training_dataloader
        if not isinstance(loader, RunLoader) or position is None:
            return
        if (saved["accumulation"], saved["train"]) != (batch.accumulation, batch.train):
            samples = position["given"] // saved["accumulation"] * saved["train"]
            position = position | {"given": samples // batch.train * batch.accumulation}
        loader.load_state_dict(position)

    def _joined(self, saved: Mapping[str, Any], own: dict[str, Any]) -> dict[str, Any]:
        """Return a state for this run's schedule, which need not be the one that was saved.

        The count of updates is all that another schedule goes on from; the same one, if it listens,
        also has its memory.
        """
        joined = own | {"step": self._updates}
        if "state" in own:
            if all(saved.get(name) == own[name] for name in ("type", "params")):
                joined["state"] = saved["state"]
            else:
                log.warning("%s listens to the loss, and begins anew", own["type"])
                joined["step"] = own["step"]
        return joined
