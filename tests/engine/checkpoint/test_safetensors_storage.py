import json
import struct
import tracemalloc

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import _TYPES, load_file

from engine.checkpoint.safetensors_storage import write_tensors


def build(dtype):
    if dtype.is_complex or dtype.is_floating_point:
        return torch.randn(3, 5).to(dtype)
    return torch.randint(0, 2, (3, 5)).to(dtype)


def test_write_tensors_every_dtype_is_read_by_safetensors(tmp_path):
    tensors = {name: build(dtype) for name, dtype in _TYPES.items()}
    tensors |= {
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "negative": torch.randn(3, dtype=torch.complex64).conj().imag,
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "ü @1,2": torch.ones(1),
    }
    tensors["tied"] = tensors["parameter"]
    write_tensors(tmp_path / "file", tensors, {"parts": "{}"})
    loaded = load_file(tmp_path / "file")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert loaded[name].tolist() == tensor.tolist()
    with safe_open(tmp_path / "file", framework="pt") as file:
        assert file.metadata() == {"parts": "{}"}


def test_write_tensors_data_of_each_tensor_is_aligned_to_its_items(tmp_path):
    tensors = {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(1, dtype=torch.float64)}
    tensors |= {"c": torch.ones(1, dtype=torch.bfloat16), "d": torch.ones(1)}
    write_tensors(tmp_path / "file", tensors)
    data = (tmp_path / "file").read_bytes()
    [length] = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    for name, tensor in tensors.items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.element_size() == 0


def test_write_tensors_unsupported_dtype_raises_before_the_file_exists(tmp_path):
    tensors = {"x": torch.ones(1), "y": torch.ones(1, dtype=torch.complex128)}
    with pytest.raises(ValueError, match=r"safetensors supports, got torch\.complex128"):
        write_tensors(tmp_path / "file", tensors)
    assert not (tmp_path / "file").exists()


def test_write_tensors_does_not_copy_tensors_on_the_cpu(tmp_path):
    tensors = {str(number): torch.ones(1 << 20) for number in range(4)}
    tracemalloc.start()
    try:
        write_tensors(tmp_path / "file", tensors)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_write_tensors_error_names_the_file(tmp_path):
    with pytest.raises(FileNotFoundError) as raised:
        write_tensors(tmp_path / "missing" / "file", {"x": torch.ones(1)})
    assert raised.value.filename == str(tmp_path / "missing" / "file")
