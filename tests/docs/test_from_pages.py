"""The pages for users of other libraries: their scripts have the same learning rates.

The scripts of fastai, Composer and timm need libraries that the development environment does not
contain. Only the syntax of their first scripts is checked. The learning rates of the others are
compared with values that Composer and timm have computed, and with fastai's formula.
"""

import ast
import itertools
import json
import math
import multiprocessing
import os
import runpy
import sys
from pathlib import Path

import pytest
import tqdm
from torch.optim.optimizer import register_optimizer_step_pre_hook

from engine.backends.deepspeed_import import import_deepspeed
from tests.docs.snippets import ROOT, find_file, read_blocks
from tests.testing import golden
from tests.testing.distributed import run_distributed_test

PAGES = ROOT / "docs" / "from"
INSTALLED = ["pytorch", "transformers", "accelerate", "lightning"]
NOT_INSTALLED = ["fastai", "composer", "timm"]


def run_scripts(page, names, directory):
    """Run scripts of a page in this process; return the hyperparameters of each one's steps."""
    os.chdir(directory)
    sys.path.insert(0, str(directory))
    blocks = [find_file("my_project.py", PAGES / "README.md"), *read_blocks(PAGES / f"{page}.md")]
    for block in blocks:
        if block.title:
            Path(directory, block.title).write_text(block.text)
    values = []

    def record(optimizer, *_):
        group = optimizer.param_groups[0]
        values[-1].append((group["lr"], group.get("momentum", group.get("betas", [None])[0])))

    handle = register_optimizer_step_pre_hook(record)
    try:
        for name in names:
            values.append([])
            runpy.run_path(name)
    finally:
        handle.remove()
        sys.path.remove(str(directory))
        for name in {"my_project", "before"} & sys.modules.keys():
            del sys.modules[name]
    return values


def find_scripts(page):
    """Return the names of a page's scripts, in the order of the page."""
    titles = [block.title for block in read_blocks(PAGES / f"{page}.md")]
    return [title for title in titles if title.endswith(".py")]


@pytest.mark.filterwarnings("ignore")  # many warnings of the libraries
@pytest.mark.parametrize(
    "page",
    [
        "pytorch",
        *(pytest.param(page, marks=pytest.mark.slow) for page in INSTALLED if page != "pytorch"),
    ],
)
def test_scripts_after_have_the_learning_rates_of_the_script_before(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tqdm.tqdm, "monitor_interval", 0)  # starts no thread
    scripts = find_scripts(page)
    assert scripts[0] == "before.py"
    before, *others = run_scripts(page, scripts, tmp_path)
    assert len(before) == 60
    assert len(set(before)) > 50, "the schedule changes the learning rate"
    for name, after in zip(scripts[1:], others, strict=True):
        own = after[-60:]  # `kept.py` imports the script before, and so runs it
        assert own == [pytest.approx(values, rel=1e-9, abs=1e-15) for values in before], name


def run_deepspeed_scripts(directory):
    import_deepspeed()
    multiprocessing.set_start_method("fork", force=True)  # for the workers of DeepSpeed's loader
    return run_scripts("deepspeed", find_scripts("deepspeed"), directory)


@pytest.mark.slow
def test_deepspeed_script_after_is_one_step_ahead_of_the_script_before(tmp_path):
    ((before, after, registered),) = run_distributed_test(run_deepspeed_scripts, 1, tmp_path)
    assert len(before) == len(after) == 60
    lag = [lr for lr, _ in after[:-1]]
    assert [lr for lr, _ in before[1:]] == pytest.approx(lag, rel=1e-9)
    assert before[0][0] == after[0][0] == 0.0
    assert registered == []  # it takes no step


def compute_fit_one_cycle(steps, lr_max, pct_start=0.25, div=25.0, div_final=1e5):
    """Return fastai's values, from `fit_one_cycle` and `combined_cos` of fastai 2."""

    def combine_cosines(position, start, middle, end):
        if position < pct_start:
            first, last, fraction = start, middle, position / pct_start
        else:
            first, last, fraction = middle, end, (position - pct_start) / (1 - pct_start)
        return first + (1 + math.cos(math.pi * (1 - fraction))) * (last - first) / 2

    for step in range(steps):
        lr = combine_cosines(step / steps, lr_max / div, lr_max, lr_max / div_final)
        yield lr, combine_cosines(step / steps, 0.95, 0.85, 0.95)


def test_fastai_script_after_has_the_values_of_fit_one_cycle(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (after,) = run_scripts("fastai", ["after.py"], tmp_path)
    expected = compute_fit_one_cycle(60, lr_max=0.01)
    assert after == [pytest.approx(values, rel=1e-6, abs=1e-12) for values in expected]


@pytest.mark.parametrize(
    ("page", "case", "key"),
    [
        ("composer", golden.cases("composer")["cosine_warmup_dur_ssr1"], "alpha"),
        ("timm", golden.cases("timm")["cosine_warmup_prefix"], "lr"),
    ],
    ids=["composer", "timm"],
)
def test_script_after_has_the_recorded_learning_rates(page, case, key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_script_has_the_parameters(page, case)
    (after,) = run_scripts(page, ["after.py"], tmp_path)
    unit = 0.1 if key == "alpha" else 1.0
    assert len(after) == {"composer": 60, "timm": 70}[page]
    expected = [unit * value for value in itertools.islice(case[key], len(after))]
    assert [lr for lr, _ in after] == pytest.approx(expected, rel=1e-9)


def check_script_has_the_parameters(page, case):
    """Check that the first script of a page has the parameters of a recorded case."""
    before = find_file("before.py", PAGES / f"{page}.md").text
    assert case["scheduler"] in before
    for name, value in case["params"].items():
        shown = json.dumps(value) if isinstance(value, str) else repr(value)
        assert f"{name}={shown}" in before


@pytest.mark.parametrize("page", NOT_INSTALLED)
def test_script_before_is_valid_python(page):
    """Not run: the development environment does not contain fastai, Composer and timm."""
    text = find_file("before.py", PAGES / f"{page}.md").text
    imported = {
        node.module.partition(".")[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom)
    }
    assert page in imported


def test_every_page_is_tested():
    pages = {path.stem for path in PAGES.glob("*.md")} - {"README"}
    assert pages == {*INSTALLED, *NOT_INSTALLED, "deepspeed"}
