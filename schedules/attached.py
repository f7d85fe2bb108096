"""What every schedule at work on an optimizer has, whether it listens to the loss or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from schedules.core.durations import Horizon
from schedules.core.schedule import Base, Schedule
from schedules.param_groups import Slot, momenta_of, slots_of

__all__ = ["AttachedSchedule"]


class AttachedSchedule(LRScheduler):
    """A schedule and an optimizer; torch's scheduler by its type and its methods."""

    schedule: Schedule[Any]
    optimizer: Optimizer
    _horizon: Horizon | None
    _slots: dict[str, tuple[Slot, ...]]
    _base: Base

    def get_last_lr(self) -> list[float | Tensor]:
        """Return the learning rate of each group: the one that the next update uses."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def get_lr(self) -> list[float | Tensor]:
        """Return the same as `get_last_lr`, the name that DeepSpeed's scripts use."""
        return self.get_last_lr()

    def get_mom(self) -> list[float] | list[tuple[float, ...]] | None:
        """Return the momentum (of Adam's family all betas) of each group; None if not driven."""
        return momenta_of(self.optimizer) if "momentum" in self._slots else None

    def read_base(self) -> Base:
        """Return the values that the groups were built with."""
        # A group remembers its base values as torch's schedulers do, in `initial_…`: a binder that
        # is built after the optimizer was restored finds the original ones, not the last ones.
        groups = self.optimizer.param_groups
        slots = {"lr": slots_of("lr", self.optimizer)} | self._slots
        return {
            name: tuple(
                float(group.get(f"initial_{name}", slot.read(group)))
                for slot, group in zip(of_groups, groups, strict=True)
            )
            for name, of_groups in slots.items()
        }

    def remember_base(self) -> None:
        """Keep them in the groups, as torch's schedulers do."""
        self.base_lrs = list(self._base["lr"])
        self._groups = len(self.base_lrs)
        for name, values in self._base.items():
            for group, value in zip(self.optimizer.param_groups, values, strict=True):
                group[f"initial_{name}"] = value

    @property
    def identity(self) -> dict[str, Any]:
        """The type and parameters of the schedule in this run, durations in updates.

        A state belongs to them: "1dur" of another run is another schedule.
        """
        schedule, horizon = self.schedule, self._horizon or Horizon()
        params: dict[str, Any] = {}
        if schedule.clock_is_step and horizon.scale_ratio != 1:
            params["scale_schedule_ratio"] = horizon.scale_ratio
            horizon = replace(horizon, scale_ratio=1.0)
        params |= schedule.resolve(horizon).params()
        return {"type": schedule.type_name, "params": params}

    def refuse_another_run(self, state: Mapping[str, Any]) -> None:
        """Prove that a saved state is of this schedule and of as many groups.

        Raises:
            ValueError: it is not.
        """
        own, saved = ({"type": each["type"], **each["params"]} for each in (self.identity, state))
        changed = [
            f"`{name}` was {saved.get(name, 'absent')} and is {own.get(name, 'absent')}"
            for name in dict.fromkeys([*saved, *own])
            if saved.get(name) != own.get(name)
        ]
        if changed:
            raise ValueError(
                f"the schedule must be the one that was saved, but {', '.join(changed)}. Put back "
                "what was saved, or begin the new schedule without loading the old one's state."
            )
        groups = len(self.optimizer.param_groups)
        if len(state["base"]["lr"]) != groups:
            raise ValueError(
                f"the optimizer must have the {len(state['base']['lr'])} param groups that were "
                f"saved, but has {groups} instead."
            )
