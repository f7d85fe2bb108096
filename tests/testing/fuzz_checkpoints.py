"""Fuzz everything that reads a checkpoint: damage its files, and correct all hashes.

A load must raise `CheckpointError` that names the checkpoint and change nothing, or else the run
must be able to train and save after it. See `tests.testing.fuzz` for the command.
"""

import contextlib
import copy
import io
import json
import logging
import math
import os
import random
import shutil
import struct
import warnings
from collections.abc import Mapping

import numpy as np
import torch
from safetensors.torch import load_file, save
from xxhash import xxh3_128

from engine.checkpoint import storage
from engine.checkpoint.manifest import MANIFEST, _compute_checksum
from engine.cli.main import main
from engine.errors import CheckpointError
from engine.training.rng import get_rng_state, preserve_rng_state
from tests.testing.saved_runs import RUNS

__all__ = ["CheckpointMutator", "build_targets"]

_SCALARS = [
    *(None, True, False, 0, 1, 2, 5, -1, 3.5, -0.5, math.nan, math.inf, -math.inf, 1e308, 5e-324),
    *(2**31, 2**53, 2**63, -(2**63), 2**64, 10**30, 10**400, 10**5000),
    *("", "x", "a" * 3000, "\x1b[2J", "\0", "é\u202e", b"", b"x" * 100, 1j),
    *(torch.float32, torch.device("meta"), torch.Size([2])),
]
_KEYS = [
    0,
    -1,
    "0",
    "",
    "x",
    "step",
    "params",
    "state",
    None,
    (1, 2),
    2**70,
    math.nan,
    "_extra_state",
]


class Bomb:
    """An object whose unpickling creates a directory."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)

    def __deepcopy__(self, memo):
        return self  # the default would call `__reduce__`


def _build_nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


class CheckpointMutator:
    """Makes damaged checkpoints, reproducibly for a seed.

    Args:
        seed: seed of the mutations.
        directory: directory for the checkpoints.
        runs: functions that start runs, by name.
    """

    def __init__(self, seed, directory, runs=RUNS):
        logging.getLogger("onecycle").setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
        self.random = random.Random(seed)
        self.bomb = directory / "exploded"
        self._starts = runs
        self.runs, self.saved, self.values = {}, {}, {}
        for name, start in runs.items():
            run = start()
            run.train(4)
            with preserve_rng_state():
                run.trainer.save_checkpoint(directory / name, "saved", client_state={"epoch": [1]})
            self.runs[name] = run
            checkpoint_dir = directory / name / "saved"
            files = {
                path.relative_to(checkpoint_dir).as_posix(): path.read_bytes()
                for path in checkpoint_dir.rglob("*")
                if path.is_file()
            }
            self.saved[name] = files
            for path in sorted(files):
                if path.endswith(".pt"):
                    loaded = torch.load(io.BytesIO(files[path]), weights_only=False)
                    self.values[name, path] = loaded
        self.directory = directory
        self.damaged = None  # name of the run whose checkpoint is damaged

    def restart(self, name):
        """Replace a run by a new one."""
        self.runs[name].trainer.destroy()
        self.runs[name] = self._starts[name]()

    @contextlib.contextmanager
    def damage(self, path=None):
        """Damage one checkpoint; yield the name of its run and the changed file.

        Args:
            path: file to change, ``manifest.json``; default: any file.
        """
        choice = self.random.choice
        name = choice(list(self.saved))
        files = dict(self.saved[name])
        content = json.loads(files.pop(MANIFEST))
        only_manifest = path is not None
        path = choice(sorted(files))
        kinds = (self._change_values, self._change_tensors, self._change_json)
        suffixes = (".pt", ".safetensors", ".json")
        change = next(c for c, s in zip(kinds, suffixes, strict=True) if path.endswith(s))
        match 3 if only_manifest else self.random.randrange(20):
            case 0 | 1:
                files[path] = self._change_bytes(files[path])
            case 2:
                path = self._change_files(files, path)
            case 3:
                path = MANIFEST
            case _:
                change(name, path, files)
        files[MANIFEST] = (
            self._change_manifest(content)
            if path == MANIFEST
            else self._describe(name, files, content)
        )
        changed = self._write(name, files)
        try:
            yield name, path
        finally:
            self._restore(name, changed)

    def _describe(self, name, files, content):
        """Return a manifest with the hashes of the damaged files."""
        content["files"] = {
            path: content["files"][path]
            if self.saved[name].get(path) == data
            else {"size": len(data), "xxh3_128": xxh3_128(data).hexdigest()}
            for path, data in files.items()
        }
        return json.dumps({**content, "checksum": _compute_checksum(content)}).encode()

    def _change_manifest(self, content):
        content = json.loads(self._change_object(content))
        if isinstance(content, dict) and self.random.random() < 0.9:
            content["checksum"] = _compute_checksum(content)
        return json.dumps(content).encode()

    def _change_object(self, content):
        """Return the text of a changed JSON value."""
        try:
            return json.dumps(self._mutate(content), default=str)
        except (TypeError, ValueError, RecursionError):
            return self.random.choice(("[]", "{}", "[" * 800 + "]" * 800, '{"format": 1e999}'))

    def _write(self, name, files):
        """Write a damaged checkpoint; return the names of the files that are different."""
        checkpoint_dir, old = self.directory / name / "saved", self.saved[name]
        changed = {path for path in {*files, *old} if files.get(path) != old.get(path)}
        for path in changed:
            if path in files:
                (checkpoint_dir / path).write_bytes(files[path])
            else:
                (checkpoint_dir / path).unlink()
        return changed

    def _restore(self, name, changed):
        checkpoint_dir = self.directory / name / "saved"
        for path in changed:
            if path in self.saved[name]:
                (checkpoint_dir / path).write_bytes(self.saved[name][path])
            else:
                (checkpoint_dir / path).unlink(missing_ok=True)
        for other in (self.directory / name).iterdir():
            if other.name not in {"saved", "latest"}:
                shutil.rmtree(other) if other.is_dir() else other.unlink()

    def _change_bytes(self, data):
        data = bytearray(data)
        for _ in range(self.random.choice((1, 1, 2, 10))):
            start = self.random.randrange(len(data)) if data else 0
            if self.random.random() < 0.5:
                start = min(start, self.random.randrange(300))  # headers
            end = start + self.random.choice((1, 1, 2, 8, 100))
            match self.random.randrange(5):
                case 0:
                    data[start:end] = b""
                case 1:
                    data[start:end] = data[start:end] * 2
                case 2:
                    data = data[:start]
                case 3:
                    data[start:end] = self.random.randbytes(end - start)
                case _:
                    data[start:end] = struct.pack(
                        "<Q", self.random.choice((0, 1, 2**31, 2**63, 2**64 - 1))
                    )
        return bytes(data)

    def _change_files(self, files, path):
        other = self.random.choice(sorted(files))
        match self.random.randrange(5):
            case 0:
                del files[path]
            case 1:
                files[path] = b""
            case 2:
                files[path], files[other] = files[other], files[path]
            case 3:
                files["shard.1.safetensors"] = files[path]
                path = "shard.1.safetensors"
            case _:
                run = self.random.choice(list(self.saved))
                files[path] = self.saved[run].get(path, b"PK")
        return path

    def _change_json(self, name, path, files):
        files[path] = self._change_object(json.loads(files[path])).encode()

    def _change_values(self, name, path, files):
        values = copy.deepcopy(self.values[name, path])
        for _ in range(self.random.choice((1, 1, 1, 2, 3))):
            values = self._mutate(values)
        buffer = io.BytesIO()
        try:
            torch.save(values, buffer)
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            return  # a value that no file can hold
        files[path] = buffer.getvalue()

    def _change_tensors(self, name, path, files):
        checkpoint = self.directory / "tensors.safetensors"
        checkpoint.write_bytes(files[path])
        tensors, metadata = load_file(checkpoint), {"parts": "{}"}
        choice = self.random.choice
        for _ in range(choice((1, 1, 2))):
            key = choice(sorted(tensors))
            match self.random.randrange(7):
                case 0:
                    tensors.pop(key)
                case 1:
                    tensors[
                        choice((f"{key}.0", f"{key}.x", key.upper(), key.rpartition(".")[0] or "y"))
                    ] = tensors.pop(key)
                case 2 | 3:
                    tensors[key] = self._change_tensor(tensors[key])
                case 4:
                    tensors[f"{key}@0"] = tensors.pop(key)
                    parts = {f"{key}@0": {"of": key, "shape": [4], "offsets": [0]}}
                    metadata = {"parts": self._change_object(parts)}
                case 5:
                    metadata = {
                        "parts": choice(("", "[]", "null", '{"x": 1}', "[" * 100_000, "NaN"))
                    }
                case _:
                    tensors[
                        choice(
                            (
                                "model.extra",
                                "optimizer.state.x.y",
                                "optimizer.param_groups.7.lr",
                                "optimizer.param_groups.x",
                                "outside.x",
                                "x",
                            )
                        )
                    ] = tensors[key].clone()
            if not tensors:
                break
        files[path] = save({k: v.contiguous() for k, v in tensors.items()}, metadata)

    def _change_tensor(self, tensor):
        try:
            return self._compute_tensor(tensor)
        except (RuntimeError, NotImplementedError):  # the dtype does not support the operation
            return torch.zeros(2)

    def _compute_tensor(self, tensor):
        tensor = tensor.to_dense() if tensor.is_sparse else tensor
        match self.random.randrange(8):
            case 0:
                return tensor.reshape(-1)[:-1].clone()
            case 1:
                return tensor.unsqueeze(0).clone()
            case 2:
                return tensor.to(
                    self.random.choice((torch.int64, torch.float16, torch.bool, torch.complex64))
                )
            case 3:
                return (
                    torch.full_like(tensor, math.nan) if tensor.is_floating_point() else tensor + 1
                )
            case 4:
                return torch.zeros(
                    self.random.choice(((), (0,), (2, 0), (1,), (7, 7), (1, 1, 1, 1)))
                )
            case 5:
                return -tensor if tensor.is_floating_point() else tensor * 2**62
            case 6:
                return tensor.reshape(-1).repeat(2)
            case _:
                return tensor.t().contiguous() if tensor.dim() == 2 else tensor.new_tensor(1)

    def _mutate(self, values):
        """Change nested values in place, and return them or what replaces them."""
        choice = self.random.choice
        holders = [values] if isinstance(values, dict | list | tuple) else []
        for around in holders:
            members = around.values() if isinstance(around, Mapping) else around
            holders += [each for each in members if isinstance(each, dict | list | tuple) and each]
        if not holders or self.random.random() < 0.03:
            return self._make_value(values)
        around = choice(holders[: choice((1, 10, 1000))])
        if isinstance(around, tuple) or not around:
            return self._replace(values, around, self._make_value(around))
        keys = list(around) if isinstance(around, dict) else range(min(len(around), 700))
        key = choice(keys)
        match self.random.randrange(8):
            case 0:
                del around[key]
            case 1 | 2 | 3 | 4:
                around[key] = self._make_value(around[key])
            case 5 if isinstance(around, dict):
                around[choice(_KEYS)] = self._make_value(around[key])
            case 6 if isinstance(around, dict):
                around[choice((f"{key}s", f"{key}.0", str(key), 0))] = around.pop(key)
            case _ if isinstance(around, list):
                around.append(self._make_value(around[key]))
            case _:
                around[key] = copy.deepcopy(choice(holders))  # a value from another place
        return values

    def _replace(self, values, old, new):
        """Replace a tuple, which cannot be changed in place."""
        if values is old:
            return new
        if isinstance(values, dict):
            return {key: self._replace(each, old, new) for key, each in values.items()}
        if isinstance(values, list | tuple):
            return type(values)(self._replace(each, old, new) for each in values)
        return values

    def _make_value(self, old):
        chance = self.random.random()
        if isinstance(old, torch.Tensor) and chance < 0.7:
            return self._change_tensor(old)
        if isinstance(old, tuple | list) and chance < 0.5:
            items = list(old)
            if items and self.random.random() < 0.7:
                index = self.random.randrange(len(items))
                items[index] = self._make_value(items[index])
            else:
                items = items[:-1]
            return type(old)(items) if type(old) in (tuple, list) else items
        if isinstance(old, int | float) and not isinstance(old, bool) and chance < 0.3:
            with contextlib.suppress(OverflowError):
                return self.random.choice((old * 2, -old, old + 1, float(old), [old], str(old)))
        if chance < 0.34:
            return self.random.choice(
                (
                    {}, [], (), [[]], {"x": 1}, {0: {}}, set(), [1, "2"], _build_nested(300),
                    torch.zeros(2), torch.tensor(math.nan), np.float64(1), np.zeros(3),
                    Bomb(str(self.bomb)), torch.zeros(2, 2).to_sparse(),
                )
            )  # fmt: skip
        return self.random.choice(_SCALARS)


def _flatten(value):
    if isinstance(value, torch.Tensor):
        data = value.detach().flatten().contiguous().view(torch.uint8).numpy().tobytes()
        return str(value.dtype), tuple(value.shape), data
    if isinstance(value, Mapping):
        return [(repr(key), _flatten(each)) for key, each in value.items()]
    if isinstance(value, list | tuple):
        return [_flatten(each) for each in value]
    return repr(value)


def read_state(run):
    """Return everything that a load changes, in a form that can be compared."""
    trainer = run.trainer
    scheduler = trainer.lr_scheduler
    scaler = getattr(trainer._backend, "_scaler", None)
    weights = trainer.module.state_dict()
    if trainer.zero_optimization_stage() == 3:
        weights = list(weights)  # the optimizer's state has the values
    return _flatten(
        [
            weights,
            trainer.optimizer.state_dict(),
            scheduler and scheduler.state_dict(),
            vars(run.state.counters),
            run.state.best and vars(run.state.best),
            _read_position(run.loader),
            scaler and scaler.state_dict(),
            get_rng_state(),
            run.state.rollback and repr(id(run.state.rollback.snapshot)),
        ]
    )


def _read_position(loader):
    """Return the position in the data. A loader that is not in use is not asked for its state."""
    return loader.position if loader.position[0] < 0 else loader.state_dict()


_OPTIONS = [
    *({},) * 6,
    {"load_module_only": True},
    {"load_module_strict": False},
    {"load_optimizer_states": False},
    {"load_lr_scheduler_states": False},
]


def build_targets(mutator):
    """Return functions of a damaged checkpoint's run and of the changed file, by name."""

    def load(name, path):
        run, directory = mutator.runs[name], mutator.directory / name
        before = read_state(run)
        options = mutator.random.choice(_OPTIONS)
        tag = mutator.random.choice(("saved", "saved", None))
        try:
            run.trainer.load_checkpoint(directory, tag, **options)
        except CheckpointError as error:
            problem = str(error)
        except FileNotFoundError as error:
            problem = str(error)
            assert tag is None, problem
        else:
            problem = ""
        if problem:
            assert "saved" in problem or not list(storage.list_checkpoints(directory)), problem
            assert len(problem) < 5000, problem
            assert read_state(run) == before, f"changed despite {problem}"
            return
        try:
            # Nothing is known about the states of the user's own optimizer and data loader.
            if name != "custom" and not path.startswith("loader"):
                run.train(1)
            run.trainer.save_checkpoint(directory, "after")
        except FloatingPointError:
            pass  # the loss scale is as low as it can be
        finally:
            mutator.restart(name)

    def run_command(action):
        def run(name, path):
            directory = mutator.directory / name
            output = mutator.directory / "exported.safetensors"
            output.unlink(missing_ok=True)
            out, err = io.StringIO(), io.StringIO()
            arguments = ["-o", str(output)] if action == "export" else []
            status = main(["checkpoint", action, str(directory), *arguments], out, err)
            assert status in {0, 1, 2}
            printed = out.getvalue() + err.getvalue()
            assert len(printed) < 5_000_000
            assert "\x1b" not in printed

        return run

    commands = {action: run_command(action) for action in ("ls", "verify", "show", "export")}
    return {"checkpoint load": load, **{f"checkpoint {k}": v for k, v in commands.items()}}
