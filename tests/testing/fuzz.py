"""Fuzz everything that reads a config or a checkpoint, and report what no input may cause.

That is a traceback, more than 2 seconds of CPU time, an import of code that the config names, or
more than 500 MB of memory. Run ``python -m tests.testing.fuzz --seed 1 --mutations 10000``. Of
these mutations, 60% change a config, 25% the manifest of a checkpoint and 15% any of its files.
Each runs one of the readers, except that every config is also parsed.

To fuzz another reader of configs, add a function to `TARGETS`. It takes the text of a mutated
config, and may raise only the exceptions of `EXPECTED`. To fuzz a reader of other JSON files, pass
examples of these files and the reader to `fuzz`.
"""

import argparse
import contextlib
import copy
import importlib
import io
import json
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import schemas
from engine.checkpoint.manifest import MANIFEST
from engine.cli.main import main
from engine.config import ConfigError, load_config, load_document, validate
from engine.config.named_code import find_named_code
from engine.config.parser import parse
from engine.config.schema import OPTIMIZERS, SCHEMA, SECTION, walk
from engine.config.validate import check
from engine.display.problem_reports import FORMATS, Report
from schedules import SCHEDULES, ScheduleError, from_config
from schedules.core.durations import DurationError
from tests.testing.corpus import CLEAN, OTHER, path_of
from tests.testing.golden import FOLDER as GOLDEN

EXPECTED = (ConfigError, ScheduleError)
CANARY = "fuzz_canary"
MAX_SECONDS = 2.0
MAX_MEGABYTES = 500
_HANG_SECONDS = 20.0
_MEMORY_LIMIT = 6 * 2**30
_TORCH_SCHEDULERS = ("LambdaLR", "MultiplicativeLR")

VALUES = [
    *(None, True, False, 0, 1, 2, 3, 7, 100, 1e4, -1, -0.5, 0.5, 0.1, 0.9, 1.5, 10.0),
    *(1e308, -1e308, 5e-324, 1e-300, 1e-9, 2**31, 2**53, 2**53 + 1, 2**64, 10**300, 1e15, 1e12),
    *("", "auto", "cpu", "nvme", "log", "linear", "cosine", "SGD", "Rprop", "inductor", "1"),
    *("1dur", "0.5dur", "1e-9dur", "3dur", "1ep", "10ep", "1e400ep", "1e15ep", "0ep", "7sp"),
    *("1e300sp", "1ba", "500ba", "1e16ba", "1.5ep", "1.2.3ep", ".5dur", "5tok", "é1ep", "\u0661ep"),
    *(f"{CANARY}:run", f"{CANARY}.below:run", "os:_exit", "a:b:c", ":", "x:", "../x:y", "json"),
    *("::error::forged", "\x1b[2J\r\n::error::forged", "\u202e", "a" * 3000, "%s%n{}", "$x^$"),
    *([], {}, [0.1, 0.2], [0.1, 0.2, 0.3], [0, 0.999], [1, "2"], ["1ep", 3], [[]], [{}]),
    {"type": "StepLR", "params": {"step_size": 3}},
    {"type": "LambdaLR", "params": {"lr_lambda": f"{CANARY}:run"}},
]
"""Values that are put in place of others, or added under a key."""


def _read_seeds():
    """Return the configs to mutate: real configs, and one for each schedule and each optimizer."""
    documents = [load_document(path_of(entry)) for entry in (*CLEAN, *OTHER)]
    configs = [document.value for document in documents if isinstance(document.value, dict)]
    blocks = [{"type": name, "params": dict(cls.example)} for name, cls in SCHEDULES.items()]
    blocks += [{"type": "LambdaLR", "params": {"lr_lambda": f"{CANARY}:run"}}]
    blocks += [{"type": f"{CANARY}:run", "params": {"rate": 1}}]
    for path in sorted(GOLDEN.rglob("*.json")):
        case = json.loads(path.read_text())
        if not isinstance(case, dict):
            continue
        if isinstance(case.get("scheduler"), str) and isinstance(case.get("params"), dict):
            blocks.append({"type": case["scheduler"], "params": case["params"]})
    small = {"train_batch_size": 8, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    run = {"max_duration": 100, "scale_schedule_ratio": 1.0}
    configs += [{**small, "scheduler": block, "engine": run} for block in blocks]
    for name, schema in OPTIMIZERS.items():
        params = {key: each.get("default", 0.1) for key, each in schema["properties"].items()}
        optimizer = {"type": name, "params": params}
        configs.append({**small, "optimizer": optimizer, "scheduler": blocks[0], "engine": run})
    return configs, blocks


class Mutator:
    """Mutates configs or other JSON files at random. The mutations are reproducible for a seed."""

    def __init__(self, seed, examples=None):
        self.random = random.Random(seed)
        self.configs, self.blocks = _read_seeds()
        self.mutates_configs = examples is None
        self.configs = self.configs if examples is None else examples
        members = list(walk({}, schemas.read(SCHEMA), fill=lambda _: SECTION))
        self.keys = sorted({member.pointer.rpartition("/")[2] for member in members})
        self.keys += sorted({key for each in self.blocks for key in each.get("params", {})})

    def make_text(self):
        """Return the text of a config with one to four mutations."""
        config = copy.deepcopy(self.random.choice(self.configs))
        for _ in range(self.random.randint(1, 4)):
            self._mutate(config)
        text = json.dumps(config, ensure_ascii=self.random.random() < 0.5)
        return self._break(text) if self.random.random() < 0.1 else text

    def _mutate(self, config):
        choice = self.random.choice
        objects = [config]
        for around in objects:
            members = around.values() if isinstance(around, dict) else around
            objects += [each for each in members if isinstance(each, dict | list) and each]
        around = choice(objects[-choice((5, 20, 1000)) :])
        keys = list(around) if isinstance(around, dict) else range(len(around))
        if not keys:
            return
        key = choice(keys)
        match self.random.randrange(9 if self.mutates_configs else 6):
            case 0:
                del around[key]
            case 1 | 2 | 3:
                around[key] = self._make_value(around[key])
            case 4 if isinstance(around, dict):
                around[choice(self.keys)] = self._make_value(around[key])
            case 5 if isinstance(around, dict):
                around[choice((f"{key}s", key[1:], key.upper(), "\x1b[0m\n", ""))] = around[key]
            case 6:
                config["scheduler"] = copy.deepcopy(choice(self.blocks))
            case 7:
                self._nest(config)
            case _:
                run = config.get("engine")
                config["engine"] = run = run if isinstance(run, dict) else {}
                name = choice(("max_duration", "scale_schedule_ratio", "scale_warmup", "compile"))
                run[name] = choice(VALUES)

    def _make_value(self, old):
        if (
            isinstance(old, int | float)
            and not isinstance(old, bool)
            and self.random.random() < 0.4
        ):
            return self.random.choice((old * 2, old / 3, -old, old * 1e6, old + 1, [old, old]))
        return copy.deepcopy(self.random.choice(VALUES))

    def _nest(self, config):
        """Nest the schedule of a config in another schedule, such as SequentialLR."""
        blocks = [config.get("scheduler"), copy.deepcopy(self.random.choice(self.blocks))]
        params = {"schedulers": blocks}
        name = self.random.choice(("SequentialLR", "ChainedScheduler", "Combined"))
        if name == "SequentialLR":
            params["milestones"] = [self.random.choice((10, "1ep", "0.5dur", 2**53))]
        config["scheduler"] = {"type": name, "params": params}

    def _break(self, text):
        """Remove, repeat or replace a part of the text. The result is usually not valid JSON."""
        start = self.random.randrange(len(text))
        end = start + self.random.choice((1, 2, 10, 100))
        part = self.random.choice(
            ("", text[start:end] * 2, "NaN", "'", "\x00", "\u2028", "/*", "]")
        )
        return text[:start] + part + text[end:]


def _run_command(*arguments):
    """Return a function that runs a command on the current config and checks the exit status."""

    def run(text):
        del text
        out, err = io.StringIO(), io.StringIO()
        status = main([arguments[0], str(_PATH), *arguments[1:]], out, err)
        assert status in {0, 1, 2}
        printed = out.getvalue() + err.getvalue()
        printed.encode()
        assert "\x1b" not in printed
        assert not any(line.lstrip().startswith("::error::") for line in printed.splitlines())
        assert len(printed) < 1_000_000

    return run


def _run_formats(text):
    document = parse(text, "a,b:c.json")
    problems = check(document, 8, reject_auto=True)
    for form in FORMATS.values():
        assert "\x1b" not in "".join(form(Report(document, problems)))


def _run_load(text):
    value = parse(text, "f").value
    if not isinstance(value, dict) or any(find_named_code(value.get("scheduler"))):
        return  # training imports the code
    if any(name in text for name in _TORCH_SCHEDULERS):
        return  # training imports PyTorch, which takes more time and memory than allowed
    config = load_config(value)
    if config.schedule is not None:
        block = {"type": config.schedule.type_name, "params": config.schedule.params()}
        assert from_config(json.loads(json.dumps(block))) == config.schedule
        # Until the length of an epoch is known, no check can find that a run of epochs is too long.
        with contextlib.suppress(DurationError):
            config.horizon(steps_per_epoch=100)


def _run_validate(text):
    value = parse(text, "f").value
    validate(value if isinstance(value, dict) else {}, world_size=4)


TARGETS = {
    "parse": lambda text: parse(text, "f"),
    "validate": _run_validate,
    "formats": _run_formats,
    "load": _run_load,
    "config": _run_command("config"),
    "plot csv": _run_command("plot", "--csv", "-", "--steps", "300", "--steps-per-epoch", "10"),
    "plot": _run_command("plot", "--terminal", "--steps-per-epoch", "1000"),
}
FRACTIONS = {"configs": 0.6, "manifests": 0.25, "checkpoints": 0.15}
"""The fraction of the mutations for each kind of input."""
_COMMANDS = [f"checkpoint {action}" for action in ("ls", "verify", "show", "export")]
MANIFEST_READERS = [*_COMMANDS, *_COMMANDS, "checkpoint load"]
CHECKPOINT_READERS = [*["checkpoint load"] * 7, "checkpoint verify", "checkpoint export"]
"""The readers of checkpoints; the share of a reader is that of its repetitions."""
_PATH = Path()


def fuzz(seed, mutations, targets=None, examples=None):
    """Run the targets on mutated configs, and return a list of findings.

    Args:
        seed: seed of the mutations.
        mutations: number of mutated texts.
        targets: functions of the text, by name (default: `TARGETS`).
        examples: JSON values to mutate (default: configs).

    Returns:
        A list of findings: dicts with the keys ``target``, ``kind`` ("traceback", "slow", "import"
        or "memory"), ``detail`` and ``text``.
    """
    return _fuzz_texts(seed, mutations, targets, examples)["findings"]


class Record:
    """What the targets did: findings, the number of calls and the longest one of each target."""

    def __init__(self):
        self.findings, self.counts, self.slowest, self.executed = [], Counter(), Counter(), []
        sys.addaudithook(
            lambda event, details: (
                self.executed.append(details[0])
                if event == "import" and str(details[0]).startswith(CANARY)
                else None
            )
        )

    def run(self, name, target, arguments, text):
        """Run a target, and record what no input may cause; return whether it caused nothing."""
        kind, detail, seconds = _run_target(target, arguments)
        self.counts[name] += 1
        self.slowest[name] = max(self.slowest[name], seconds)
        if self.executed:
            kind, detail = "import", self.executed.pop()
        if kind:
            finding = {"target": name, "kind": kind, "detail": detail, "text": text[:5000]}
            self.findings.append(finding)
            sys.stderr.write(f"{json.dumps(finding)}\n")
        return not kind

    def summarize(self):
        """Return the results as a dict, with the peak memory of this process in MB."""
        # `getrusage` would include the memory of the process that started this one.
        status = Path("/proc/self/status").read_text()
        peak = int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) / 1024
        if peak > MAX_MEGABYTES:
            detail = f"{peak:.0f} MB"
            self.findings.append({"target": "", "kind": "memory", "detail": detail, "text": ""})
        return {
            "findings": self.findings,
            "counts": dict(self.counts),
            "slowest": dict(self.slowest),
            "peak": peak,
        }


def _fuzz_texts(seed, mutations, targets=None, examples=None, *, draws=False):
    """Fuzz the readers of configs; if ``draws`` is true, run only two of them on each text."""
    global _PATH  # noqa: PLW0603  # the file that the commands read
    mutator, record = Mutator(seed, examples), Record()
    targets = TARGETS if targets is None else targets
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / f"{CANARY}.py").write_text("def run(step):\n    return 1.0\n")
        sys.path.insert(0, directory)
        _PATH = Path(directory) / "c.json"
        for _ in range(mutations):
            text = mutator.make_text()
            _PATH.write_bytes(text.encode(errors="surrogatepass"))
            names = {"parse", mutator.random.choice(list(targets))} if draws else targets
            for name in sorted(names & targets.keys()) if draws else targets:
                record.run(name, targets[name], (text,), text)
        sys.path.remove(directory)
    return record.summarize()


def _fuzz_checkpoints(seed, mutations, names, *, only_manifests):
    """Fuzz the readers of checkpoints; run one of those with the given names on each checkpoint."""
    from tests.testing.fuzz_checkpoints import CheckpointMutator, build_targets  # imports torch

    record = Record()
    with tempfile.TemporaryDirectory() as directory:
        mutator = CheckpointMutator(seed, Path(directory))
        targets = build_targets(mutator)
        for number in range(mutations):
            with mutator.damage(MANIFEST if only_manifests else None) as (run, path):
                name = mutator.random.choice(names)
                text = f"mutation {number} of seed {seed}: {path} of the run {run!r}"
                is_clean = record.run(name, targets[name], (run, path), text)
                if mutator.bomb.exists():
                    mutator.bomb.rmdir()
                    record.findings.append(
                        {"target": name, "kind": "import", "detail": "os.mkdir", "text": text}
                    )
                if not is_clean:
                    mutator.restart(run)
    return record.summarize()


def _run_target(target, arguments):
    signal.signal(signal.SIGVTALRM, _interrupt)
    signal.setitimer(signal.ITIMER_VIRTUAL, _HANG_SECONDS)
    start, kind, detail = time.process_time(), "", ""
    try:
        target(*arguments)
    except EXPECTED:
        pass
    except BaseException:  # noqa: BLE001  # also SystemExit and RecursionError
        kind, detail = "traceback", traceback.format_exc(limit=-4)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    seconds = time.process_time() - start
    if not kind and seconds > MAX_SECONDS:
        kind, detail = "slow", f"{seconds:.1f} s"
    return kind, detail, seconds


def _interrupt(*_):
    raise TimeoutError(f"the target did not return within {_HANG_SECONDS} s")


def _main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mutations", type=int, default=1000)
    parser.add_argument("--parts", nargs="+", default=list(FRACTIONS), choices=list(FRACTIONS))
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT, _MEMORY_LIMIT))
    parts = {
        "configs": lambda count: _fuzz_texts(args.seed, count, draws=True),
        "manifests": lambda count: _fuzz_checkpoints(
            args.seed, count, MANIFEST_READERS, only_manifests=True
        ),
        "checkpoints": lambda count: _fuzz_checkpoints(
            args.seed, count, CHECKPOINT_READERS, only_manifests=False
        ),
    }
    results = {}
    for name in args.parts:
        if name != "configs":
            importlib.import_module("tests.testing.fuzz_checkpoints")  # once for both parts
        count = max(1, round(args.mutations * FRACTIONS[name]))
        results[name] = _run_in_child(parts[name], count)
        sys.stdout.write(f"{name}: {json.dumps(results[name], indent=2)}\n")
        sys.stdout.flush()
    return int(any(result["findings"] for result in results.values()))


def _run_in_child(run, count):
    """Run a part in its own process, so that the memory of each part can be measured."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        with os.fdopen(writer, "w") as pipe:
            json.dump({"mutations": count, **run(count)}, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if text:
        return json.loads(text)
    return {"findings": [{"kind": "crash", "detail": f"the process ended with status {status}"}]}


if __name__ == "__main__":
    sys.exit(_main())
