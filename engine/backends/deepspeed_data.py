"""Connect the training data of a run to DeepSpeed's curriculum sampler and to ZenFlow."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from engine.backends.base import Backend
from engine.config import Config
from engine.distributed.ranks import Ranks
from engine.training.data import check_has_length
from engine.training.loader import RunLoader
from engine.training.own_loaders import is_loader

__all__ = ["connect_loader", "is_curriculum_enabled", "share_deepspeed_io"]

log = logging.getLogger("onecycle")


def is_curriculum_enabled(config: Config) -> bool:
    """Return whether DeepSpeed's curriculum sampler selects the samples of each batch."""
    return config.backend.name == "deepspeed" and _is_enabled(config, "curriculum_learning")


def _is_enabled(config: Config, name: str) -> bool:
    sampling = config.raw.get("data_efficiency", {}).get("data_sampling", {})
    return sampling.get(name, {}).get("enabled") is True


def connect_loader(
    loader: RunLoader | None,
    training_data: Any,
    config: Config,
    backend: Backend,
    collate_fn: Callable[[list[Any]], Any] | None,
) -> RunLoader | None:
    """Connect DeepSpeed to the training data, and return the run's data loader.

    If curriculum learning is enabled, DeepSpeed builds the loader. ZenFlow receives the length of
    an epoch. On the PyTorch backend, the function does nothing.

    Args:
        loader: the run's data loader; None if curriculum learning is enabled or there is no
            training data.
        training_data: dataset, or the user's own data loader; None if there is no training data.
        config: a validated config.
        backend: backend of the run.
        collate_fn: function that turns a list of samples of the dataset into a batch.

    Raises:
        ValueError: curriculum learning is enabled, but the training data has no length, or
            ``engine.dataloader`` is set; or ZenFlow's intervals do not fit the length of an epoch.
    """
    if config.backend.name != "deepspeed" or training_data is None:
        return loader
    from engine.backends.deepspeed import DeepSpeedBackend

    assert isinstance(backend, DeepSpeedBackend)
    if is_curriculum_enabled(config):
        loader = _build_curriculum_loader(training_data, config, backend, collate_fn)
    elif _is_enabled(config, "dynamic_batching") and backend.ranks.rank == 0:
        log.warning(
            "`dynamic_batching` has no effect on the returned data loader, as in DeepSpeed; build "
            "the loader with DeepSpeed's "
            "`get_dataloader_and_lr_scheduler_for_variable_batch_size_deepspeed`"
        )
    if getattr(backend.engine, "zenflow", False):
        _set_zenflow_epoch(backend.engine, loader)
    return loader


def share_deepspeed_io(trainer: Any, config: Config, backend: Backend) -> None:
    """Replace the engine's ``deepspeed_io`` with DeepSpeed's, if curriculum learning is enabled.

    Args:
        trainer: training engine of the run.
        config: a validated config.
        backend: backend of the run.
    """
    if is_curriculum_enabled(config):
        vars(trainer)["deepspeed_io"] = backend.get_attribute("deepspeed_io")


def _build_curriculum_loader(
    training_data: Any,
    config: Config,
    backend: Any,
    collate_fn: Callable[[list[Any]], Any] | None,
) -> RunLoader:
    if is_loader(training_data):
        raise ValueError(
            "With `curriculum_learning`, `training_data` must be a dataset, got the data loader "
            f"{type(training_data).__name__}. Pass the dataset, because DeepSpeed selects the "
            "samples of each batch."
        )
    check_has_length(training_data)
    if config.raw.get("engine", {}).get("dataloader"):
        raise ValueError(
            "`engine.dataloader` has no effect with `curriculum_learning`, because the data loader "
            "is DeepSpeed's. Remove the section, and set `data_efficiency.seed` and "
            "`data_efficiency.data_sampling.num_workers` instead."
        )
    built = backend.engine.deepspeed_io(training_data, collate_fn=collate_fn)
    # DeepSpeed reads this attribute to save the sampler and to set its functions.
    backend.engine.training_dataloader = built
    return RunLoader(_CurriculumLoader(built, backend.ranks), backend.ranks)


class _CurriculumLoader:
    """DeepSpeed's loader for curriculum learning, with a state dict.

    Args:
        loader: data loader that DeepSpeed built.
        ranks: rank and world size of this process.
    """

    def __init__(self, loader: Any, ranks: Ranks) -> None:
        self._loader = loader
        self._sampler = loader.data_sampler
        self._load_sampler = self._sampler.load_state_dict
        # DeepSpeed also loads the state from its own checkpoints.
        self._sampler.load_state_dict = self._load_sampler_once
        if loader.num_local_io_workers and ranks.rank == 0:
            log.warning(
                "a run that resumes from a checkpoint skips the samples that data-loading "
                "processes had loaded in advance; to prevent this, set "
                "`data_efficiency.data_sampling.num_workers` to 0"
            )

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loader)

    def __len__(self) -> int:
        # DeepSpeed's `len` counts the micro-batches of all ranks.
        samples: int = self._sampler.micro_batch_times_data_parallel_size
        return max(1, len(self._sampler) // samples)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # `copy` and `pickle` look for special methods
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._loader, name)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the sampler and its random number generator.

        DeepSpeed's own state lacks the generator, so a resumed run would draw other samples.
        """
        rng = self._sampler.np_rng.bit_generator.state
        return copy.deepcopy({"rng": rng, "sampler": self._sampler.state_dict()})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `state_dict` returned."""
        self._sampler.np_rng.bit_generator.state = state["rng"]
        self._sampler.load_state_dict(copy.deepcopy(state["sampler"]))

    def _load_sampler_once(self, state: Mapping[str, Any]) -> None:
        # DeepSpeed's method adds the clusters to those of the previous load.
        if self._sampler.global_rank == 0:
            self._sampler.data_clusters, self._sampler.data_cluster_sizes = [], []
        self._load_sampler(state)


def _set_zenflow_epoch(engine: Any, loader: RunLoader | None) -> None:
    """Set how often ZenFlow selects the important gradients, if the interval is in epochs.

    DeepSpeed reads the length of an epoch from the loader that its engine builds from
    ``training_data``, which onecycle does not pass on.
    """
    settings = engine.zenflow_config()
    if settings.select_strategy == "step" or loader is None:
        return
    try:
        length = len(loader)
    except (TypeError, NotImplementedError):  # the length of an iterable dataset is optional
        return
    interval = length * (1 if settings.select_strategy == "auto" else settings.select_interval)
    if not engine.auto_update and interval < engine.update_interval:
        raise ValueError(
            f"`zenflow.update_interval` must be <= {interval}, the number of micro-batches between "
            f"two selections of gradients, got {engine.update_interval}. Reduce it, or increase "
            "`zenflow.select_interval`."
        )
    engine.select_interval = engine.optimizer.select_interval = interval
