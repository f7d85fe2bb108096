"""Progress lines and the progress bar."""

import io
import logging
import sys

import pytest
import torch

import engine
from engine.distributed.ranks import Ranks
from tests.testing.fake_backend import FakeBackend, build_engine


class CountingBackend(FakeBackend):
    """Counts the collectives: each mean over the ranks."""

    means = 0

    def mean(self, value):
        self.means += 1
        return super().mean(value)


def train(trainer, steps, poison=()):
    for step in range(1, steps + 1):
        loss = trainer(torch.ones(2, 2)).mean()
        trainer.backward(loss * float("nan") if step in poison else loss)
        trainer.step()


def read_lines(caplog):
    """Return the number of each step that has a line."""
    messages = [record.getMessage() for record in caplog.records]
    return [int(each.split()[1].rstrip(":")) for each in messages if each.startswith("step ")]


@pytest.mark.parametrize(
    ("sections", "lines"),
    [
        ({}, [1, *range(10, 101, 10), 200, 300]),
        ({"steps_per_print": 75}, [75, 150, 225, 300]),
        ({"steps_per_print": None}, []),
        ({"steps_per_print": float("inf")}, []),  # written by Accelerate
    ],
    ids=str,
)
def test_log_has_a_line_at_equal_steps_on_every_rank(sections, lines, caplog):
    with caplog.at_level(logging.INFO, "onecycle"):
        for rank, expected in ((1, []), (0, lines)):
            backend = CountingBackend(others=(0.0,))
            backend.ranks = Ranks(rank, rank, 2, torch.device("cpu"))
            train(build_engine(backend, **sections), 300)
            assert read_lines(caplog) == expected
            assert backend.means == len(lines)


def test_log_after_a_resume_continues_to_count_the_steps(tmp_path, caplog):
    backend = FakeBackend()
    first = build_engine(backend)
    backend.overflows_next = True
    train(first, 16)
    first.save_checkpoint(tmp_path)
    resumed = build_engine()
    resumed.load_checkpoint(tmp_path)
    caplog.clear()
    with caplog.at_level(logging.INFO, "onecycle"):
        train(resumed, 5)
    assert read_lines(caplog) == [17, 20]
    assert [path.name for path in tmp_path.glob("global_step*")] == ["global_step16"]


def test_log_line_has_the_mean_loss_since_the_last_line(caplog):
    trainer = build_engine(steps_per_print=250)
    with caplog.at_level(logging.INFO, "onecycle"):
        for step in range(1, 501):
            loss = 0.0 * trainer(torch.ones(2, 2)).mean() + step
            trainer.backward(loss.reshape(1) if step % 2 else loss)
            trainer.step()
    assert [record.getMessage().split(",")[0] for record in caplog.records[-2:]] == [
        "step 250: mean loss 125.5000",
        "step 500: mean loss 375.5000",
    ]


def test_log_line_after_a_skipped_step_has_a_finite_loss(caplog):
    backend = FakeBackend()
    with caplog.at_level(logging.INFO, "onecycle"):
        trainer = build_engine(backend)
        train(trainer, 4)
        backend.overflows_next = True
        train(trainer, 1, poison=[1])
        train(trainer, 5)
    assert read_lines(caplog) == [1, 10]
    assert "skipped step 5 " in caplog.text
    assert "nan" not in caplog.text


class Terminal(io.StringIO):
    def isatty(self):
        return True


def open_terminal(monkeypatch):
    """Replace standard error. A fixture cannot do this: pytest sets it again after the setup."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "JPY_PARENT_PID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


BAR = {"engine": {"progress_bar": True, "max_duration": 12}}


def test_progress_bar_shows_steps_loss_and_log_lines_and_ends_with_the_run(monkeypatch, caplog):
    terminal = open_terminal(monkeypatch)
    handler = logging.StreamHandler()
    logging.getLogger("onecycle").addHandler(handler)
    try:
        with caplog.at_level(logging.INFO, "onecycle"):
            trainer, *_ = start_with_bar()
            train(trainer, 11)
            logging.getLogger("onecycle").warning("a warning")
            assert sys.stderr is not terminal
            train(trainer, 1)
    finally:
        logging.getLogger("onecycle").removeHandler(handler)
    shown = terminal.getvalue()
    assert "12/12" in shown
    assert "loss" in shown
    # The bar's line is erased before the warning.
    assert "\x1b[2K" in shown[: shown.index("a warning")].rpartition("/12")[2]
    assert read_lines(caplog) == []
    assert (sys.stderr, handler.stream) == (terminal, terminal)


def start_with_bar():
    config = {"train_batch_size": 2, "optimizer": {"type": "SGD"}, **BAR}
    return engine.initialize(config=config, model=torch.nn.Linear(2, 1))


def test_progress_bar_of_destroyed_and_replaced_engines_is_closed(monkeypatch):
    terminal = open_terminal(monkeypatch)
    replaced, *_ = start_with_bar()
    train(replaced, 1)
    trainer, *_ = start_with_bar()
    train(trainer, 1)
    assert sys.stderr is not terminal
    trainer.destroy()
    assert sys.stderr is terminal
    train(replaced, 1)
    assert sys.stderr is terminal


def test_progress_bar_without_a_terminal_becomes_lines(caplog, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with caplog.at_level(logging.INFO, "onecycle"):
        train(start_with_bar()[0], 12)
    assert read_lines(caplog) == [1, 10]
    assert sys.stderr.getvalue() == ""
