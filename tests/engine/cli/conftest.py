import json

import pytest

from tests.testing.schedule_instances import TUTORIAL


@pytest.fixture
def tutorial(tmp_path):
    """A config with the schedule of DeepSpeed's 1Cycle tutorial."""
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps({"scheduler": TUTORIAL}))
    return path
