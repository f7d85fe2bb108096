"""Scripts in the patterns of public ones train the same with onecycle in place of DeepSpeed."""

import gc
import multiprocessing
import os
import sys
import traceback
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import engine
from engine.backends.deepspeed_import import import_deepspeed
from tests.testing.distributed import run_distributed_test

SCRIPTS = Path(__file__).with_name("public_scripts")


def run_script(name, library, directory):
    """Run a script with ``import deepspeed`` replaced; return its final weights and numbers."""
    path = SCRIPTS / f"{name}.py"
    text = path.read_text(encoding="utf-8")
    line = "import deepspeed\n"
    assert text.count(line) == 1
    code = compile(text.replace(line, f"import {library} as deepspeed\n"), str(path), "exec")
    own = directory / library / name
    own.mkdir(parents=True, exist_ok=True)
    os.chdir(own)
    script = sys.modules[name] = types.ModuleType(name)  # so that its classes can be pickled
    exec(code, vars(script))
    result = script.main(["--local_rank", os.environ["LOCAL_RANK"]])
    model = result.pop("model")
    with import_deepspeed().zero.GatheredParameters(list(model.parameters())):
        result["weights"] = {
            key: (value.full_tensor() if isinstance(value, DTensor) else value).detach().float()
            for key, value in model.state_dict().items()
        }
    return result


def run_with_both(names, directory):
    import_deepspeed()
    multiprocessing.set_start_method("fork", force=True)  # for the workers of DeepSpeed's loader
    engine.register_with_deepspeed(replace=True)  # DeepSpeed's warmups lag one step behind
    results = {}
    for name in names:
        for library in ("deepspeed", "engine"):
            try:
                results[name, library] = run_script(name, library, directory)
            except Exception as error:  # noqa: BLE001  # the test reports it
                results[name, library] = f"{error!r}\n{traceback.format_exc()}"
            gc.collect()
            dist.barrier()
    return results


SPLIT = [
    "auto_tp",
    "pipeline",
]  # DeepSpeed keeps the process groups of split models until the process ends
NAMES = sorted(path.stem for path in SCRIPTS.glob("[a-z]*.py") if path.stem not in SPLIT)
NOT_ON_DEEPSPEED = {"gan": "engine: backward pass: the loss depends on another engine's output"}
"""Scripts that DeepSpeed 0.19.8 does not run, with the reason. With onecycle, they run."""


def check_equal(name, wanted, result):
    tolerance = result.get("tolerance", 1e-5)
    assert result["numbers"] == pytest.approx(wanted["numbers"], rel=tolerance), name
    assert result["weights"].keys() == wanted["weights"].keys()
    for key, value in wanted["weights"].items():
        own = result["weights"][key]
        torch.testing.assert_close(own, value, rtol=tolerance, atol=tolerance, msg=f"{name} {key}")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "names", [*(NAMES[start::4] for start in range(4)), *([name] for name in SPLIT)], ids="-".join
)
def test_public_scripts_train_the_same(names, ranks, tmp_path):
    outcomes = run_distributed_test(run_with_both, ranks, names, tmp_path, timeout=300)
    not_on_deepspeed = NOT_ON_DEEPSPEED.keys() & set(names)
    for results in outcomes:
        failed = {key: value for key, value in results.items() if isinstance(value, str)}
        assert failed.keys() == {(name, "deepspeed") for name in not_on_deepspeed}, failed
        for name in set(names) - not_on_deepspeed:
            check_equal(name, results[name, "deepspeed"], results[name, "engine"])
    for name in names:
        if "is_split" in outcomes[0][name, "engine"]:
            continue  # each rank has its own weights
        first, last = (
            results[name, "engine"]["weights"] for results in (outcomes[0], outcomes[-1])
        )
        trained = {key for key in first if "running_" not in key}  # each rank has its own
        assert all(torch.equal(first[key], last[key]) for key in trained), name
