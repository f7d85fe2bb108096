"""Load Fashion-MNIST if a copy is available, otherwise scikit-learn's digits."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torch.utils.data import TensorDataset

_FILES = {"train": "train", "test": "t10k"}
_DIRECTORIES = (
    Path("/usr/share/datasets/fashion-mnist"),  # Debian's package dataset-fashion-mnist
    Path.home() / ".cache" / "torchvision" / "FashionMNIST" / "raw",
    Path("data") / "FashionMNIST" / "raw",  # torchvision's download in the working directory
)


class Images(NamedTuple):
    """A training set and a test set of images, and the name of their source.

    Each image has shape (1, 28, 28) and values in [0, 1].
    """

    train: TensorDataset
    test: TensorDataset
    source: str


def load() -> Images:
    """Load Fashion-MNIST, or scikit-learn's digits if Fashion-MNIST is not available.

    Fashion-MNIST is read from the directory in the environment variable ``FASHION_MNIST_DIR`` or,
    if the variable is not set, from one of the default directories.

    Raises:
        FileNotFoundError: ``FASHION_MNIST_DIR`` is set, but Fashion-MNIST is not in that directory.
    """
    named = os.environ.get("FASHION_MNIST_DIR")
    for directory in [Path(named)] if named else _DIRECTORIES:
        files = {part: _find_files(directory, prefix) for part, prefix in _FILES.items()}
        if all(files.values()):
            train, test = (_build_dataset(*files[part]) for part in _FILES)
            return Images(train, test, f"Fashion-MNIST from {directory}")
    if named:
        raise FileNotFoundError(
            f"FASHION_MNIST_DIR is {named}, but this directory does not contain all four files of "
            "Fashion-MNIST, such as train-images-idx3-ubyte(.gz). Set the variable to another "
            "directory, or unset it to train on scikit-learn's digits."
        )
    return _load_digits()


def _find_files(directory: Path, prefix: str) -> tuple[Path, ...]:
    """Return the paths of the image file and the label file, or () if either is missing."""
    found = []
    for kind in ("images-idx3", "labels-idx1"):
        plain = directory / f"{prefix}-{kind}-ubyte"
        found += [path for path in (plain, plain.with_name(plain.name + ".gz")) if path.is_file()][
            :1
        ]
    return tuple(found) if len(found) == 2 else ()


def _build_dataset(images: Path, labels: Path) -> TensorDataset:
    pixels = _read_idx(images).astype(np.float32) / 255
    return TensorDataset(
        torch.from_numpy(pixels)[:, None], torch.from_numpy(_read_idx(labels)).long()
    )


def _read_idx(path: Path) -> np.ndarray:
    """Read an array of bytes from an IDX file, which may be compressed with gzip."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rank = data[3]
    shape = np.frombuffer(data, ">u4", count=rank, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape).copy()


def _load_digits() -> Images:
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = torch.from_numpy(digits.images).float()[:, None] / 16
    images: Tensor = pad(interpolate(small, scale_factor=3, mode="bilinear"), (2, 2, 2, 2))
    labels = torch.from_numpy(digits.target).long()
    # Every fifth image is a test image, because the data set is sorted by writer.
    test = torch.arange(len(labels)) % 5 == 0
    return Images(
        TensorDataset(images[~test], labels[~test]),
        TensorDataset(images[test], labels[test]),
        "the handwritten digits of scikit-learn (no copy of Fashion-MNIST found)",
    )
