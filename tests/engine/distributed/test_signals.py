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
