"""A call that only some ranks make is named in a warning."""

import logging
import time

import pytest
import torch

import engine
from engine.distributed import waiting
from tests.testing.distributed import run_distributed_test
from tests.testing.small_model import build_config, build_model

CALLS = {
    "report": lambda trainer: trainer.report(loss=1.0),
    "mean": lambda trainer: trainer.mean(1.0),
    "gather": lambda trainer: trainer.gather(torch.ones(1)),
    "evaluate": lambda trainer: trainer.evaluate([torch.ones(2, 6)], lambda x: x.mean()),
}


def call_late(name, messages):
    waiting._PATIENCE, waiting._PERIOD = 0.5, 0.05
    config = build_config(zero_optimization={"stage": 0})
    trainer, *_ = engine.initialize(model=build_model(), config=config)
    handler = logging.FileHandler(f"{messages}{trainer.global_rank}")
    logging.getLogger("onecycle").addHandler(handler)
    for pause in (1.5, 0.0):  # a second call that does not wait adds no warning
        time.sleep(pause * trainer.global_rank)
        CALLS[name](trainer)


@pytest.mark.parametrize("name", CALLS)
def test_call_that_waits_for_another_rank_is_a_warning(name, tmp_path):
    run_distributed_test(call_late, 2, name, tmp_path / "log")
    of_ranks = [(tmp_path / f"log{rank}").read_text().splitlines() for rank in range(2)]
    warnings = [[line for line in lines if "waiting" in line] for lines in of_ranks]
    assert [len(lines) for lines in warnings] == [1, 0]
    assert warnings[0][0].startswith(f"`{name}` has been waiting for other ranks for 0.5 seconds")
