"""The exceptions keep their text and their attributes when they pass between processes."""

import pickle

import pytest

from engine import errors
from engine.config.batch_sizes import BatchError
from schedules import ScheduleError
from schedules.core.durations import DurationError
from schedules.core.schedule import ParameterProblem

PROBLEM = errors.Problem("unknown-key", "error", "/bad", 3, 5, "Unknown key.", fix=errors.Fix("x"))
PUBLIC = [
    each
    for name in errors.__all__
    if isinstance(each := getattr(errors, name), type) and issubclass(each, Exception)
]
ARGUMENTS = {
    errors.ConfigError: ("ds_config.json", [PROBLEM]),
    ScheduleError: ("OneCycle", [ParameterProblem("cycle_min_lr", "Must be > 0.")]),
    BatchError: ("train_batch_size", "Must be >= 1.", "Increase it."),
}


@pytest.mark.parametrize("cls", [*PUBLIC, ScheduleError, BatchError, DurationError])
def test_exception_keeps_its_text_and_attributes_when_pickled(cls):
    error = cls(*ARGUMENTS.get(cls, ("The text.",)))
    restored = pickle.loads(pickle.dumps(error))
    assert type(restored) is cls
    assert str(restored) == str(error) != ""
    assert vars(restored) == vars(error)
