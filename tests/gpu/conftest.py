"""The device of the GPU tests."""

import pytest
import torch

from tests.testing.gpu import Machine


def pytest_collection_modifyitems(items):
    """Mark each test in this directory, so that `-m "not gpu"` leaves it out.

    Warnings are no errors here, because those of CUDA depend on the machine.
    """
    for item in items:
        if "tests/gpu/" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture
def machine(request):
    """A GPU or, with ``--dry-run``, the CPU."""
    is_dry = request.config.getoption("dry_run")
    if not is_dry and not torch.cuda.is_available():
        pytest.skip("PyTorch finds no GPU; to run on the CPU with smaller sizes, pass --dry-run")
    return Machine(is_dry)
