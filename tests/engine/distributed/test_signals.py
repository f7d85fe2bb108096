"""A second signal ends a process that does not reach the end of a step."""

import os
import signal
import time

import pytest

from engine.distributed import signals
from engine.distributed.ranks import Ranks
from engine.distributed.signals import Signals
from tests.testing.distributed import RankError, run_distributed_test

ALONE = Ranks(0, 0, 1, None)


def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


def receive_sigterm_twice(alive):
    signals._MAX_DUPLICATE_TIME = 0.2
    received = Signals()
    received.find_on_any_rank(ALONE)
    send(signal.SIGUSR1)
    time.sleep(0.3)
    send(signal.SIGTERM, signal.SIGTERM)  # a copy of the same signal
    time.sleep(0.3)
    assert received.find_on_any_rank(ALONE) == "SIGTERM"
    alive.touch()
    send(signal.SIGTERM)
    time.sleep(10)


def test_second_sigterm_kills_the_process(tmp_path):
    alive = tmp_path / "alive"
    with pytest.raises(RankError, match=f"died with exit code -{signal.SIGTERM:d}"):
        run_distributed_test(receive_sigterm_twice, 1, alive)
    assert alive.exists()


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ctrl_c_interrupts_the_process(first):
    received = Signals()
    try:
        received.find_on_any_rank(ALONE)
        send(signal.SIGUSR1, first)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    finally:
        received.restore_handlers()


def test_script_handler_is_called_only_when_asked():
    called = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: called.append(number))
    received = Signals()
    try:
        send(signal.SIGTERM)
        assert received.find_on_any_rank(ALONE) == "SIGTERM"
        assert called == []
        received.call_script_handler()
        assert called == [signal.SIGTERM]
    finally:
        received.restore_handlers()
        signal.signal(signal.SIGTERM, before)


def test_script_handler_below_another_engine_is_called():
    called = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: called.append(number))
    first, second = Signals(), Signals()
    try:
        send(signal.SIGTERM)
        second.call_script_handler()
        assert called == [signal.SIGTERM]
    finally:
        second.restore_handlers()
        first.restore_handlers()
        signal.signal(signal.SIGTERM, before)


def test_handler_that_the_script_replaces_is_a_warning(caplog):
    received = Signals()
    previous = received._previous_handlers[signal.SIGTERM]
    try:
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        received.find_on_any_rank(ALONE)
        received.find_on_any_rank(ALONE)
        (message,) = caplog.messages
        assert "replaced the run's handler for SIGTERM" in message
    finally:
        received.restore_handlers()
        signal.signal(signal.SIGTERM, previous)


def test_handlers_of_another_engine_and_of_jupyter_are_no_warning(caplog):
    first, second = Signals(), Signals()
    before = signal.getsignal(signal.SIGINT)
    try:
        first.find_on_any_rank(ALONE)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        second.find_on_any_rank(ALONE)
        assert caplog.messages == []
    finally:
        signal.signal(signal.SIGINT, before)
        second.restore_handlers()
        first.restore_handlers()
