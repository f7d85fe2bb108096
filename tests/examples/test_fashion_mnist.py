"""The Fashion-MNIST example, run as a script: it learns, prints its data set and plots."""

import gzip
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.config import validate

DIRECTORY = Path(__file__).parent.parent.parent / "examples" / "fashion_mnist"
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def demo(tmp_path, *arguments, script=DIRECTORY / "train.py", **environment):
    command = [sys.executable, script, "--output", tmp_path / "run", *arguments]
    return subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"HOME": str(tmp_path), "COLUMNS": "200"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    "path", sorted(DIRECTORY.parent.glob("*/*.json")), ids=lambda path: path.name
)
def test_example_config_is_valid(path):
    assert validate(path) == []


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


@pytest.mark.slow
def test_example_reads_images_from_fashion_mnist_dir(tmp_path):
    generator = np.random.default_rng(0)
    for part, count in (("train", 128), ("t10k", 32)):
        labels = generator.integers(0, 10, count)
        images = np.broadcast_to(25 * labels[:, None, None], (count, 28, 28))
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", labels)
    run = demo(tmp_path, "--max_steps", "4", FASHION_MNIST_DIR=str(tmp_path))
    assert run.returncode == 0, run.stderr
    assert (
        f"Training on Fashion-MNIST from {tmp_path}: 128 training images, 32 test images."
        in run.stdout
    )
    assert (tmp_path / "run" / "lr_momentum_loss.png").read_bytes().startswith(b"\x89PNG")


def test_example_without_images_in_fashion_mnist_dir_fails(tmp_path):
    run = demo(tmp_path, FASHION_MNIST_DIR=str(tmp_path))
    assert run.returncode != 0
    assert "FASHION_MNIST_DIR" in run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("has_images", [True, False], ids=["images", "digits"])
def test_example_reaches_its_accuracy_and_its_loss_is_still_falling(tmp_path, has_images):
    if has_images and not (FASHION_MNIST / "t10k-labels-idx1-ubyte.gz").is_file():
        pytest.skip(f"there is no Fashion-MNIST in {FASHION_MNIST}")
    code = "" if has_images else "import images; images._DIRECTORIES = ()\n"
    script = tmp_path / "run.py"
    script.write_text(
        f"import runpy, sys; sys.path.insert(0, {str(DIRECTORY)!r})\n{code}"
        f"runpy.run_path({str(DIRECTORY / 'train.py')!r}, run_name='__main__')\n"
    )
    run = demo(tmp_path, script=script)
    assert run.returncode == 0, run.stderr
    accuracy = float(re.search(r"Test accuracy: ([\d.]+)", run.stdout)[1])
    assert accuracy >= (0.88 if has_images else 0.95)
    losses = [float(loss) for loss in re.findall(r"step \d+: mean loss ([\d.]+)", run.stderr)]
    assert losses[-1] < 0.95 * losses[-2]
