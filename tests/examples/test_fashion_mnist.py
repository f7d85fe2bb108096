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


def demo(tmp_path, *arguments, **environment):
    command = [sys.executable, DIRECTORY / "train.py", "--output", tmp_path / "run", *arguments]
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
    run = demo(tmp_path, "--steps", "4", FASHION_MNIST_DIR=str(tmp_path))
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
def test_example_reaches_its_accuracy(tmp_path):
    run = demo(tmp_path)
    assert run.returncode == 0, run.stderr
    accuracy = float(re.search(r"Test accuracy: ([\d.]+)", run.stdout)[1])
    assert accuracy >= (0.95 if "digits" in run.stdout else 0.88)
