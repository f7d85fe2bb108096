"""A progress bar for a training loop in a terminal or a notebook."""

from __future__ import annotations

import atexit
import importlib.util
import logging
import sys
import time
from collections.abc import Mapping
from typing import Any, ClassVar

__all__ = ["ProgressBar"]

_SECONDS = 0.1  # between two redraws


class ProgressBar:
    """A progress bar that shows the completed steps, a short text, the speed and the time left.

    `move_to` draws the bar on standard error. Until the bar is closed, all output of the script
    appears above it.

    Args:
        step: number of steps that have already been completed.
        total: number of steps of the whole run; None if it is unknown.
    """

    _shown: ClassVar[ProgressBar | None] = None

    def __init__(self, step: int, total: float | None) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        if ProgressBar._shown is not None:  # two bars would overwrite each other
            ProgressBar._shown.close()
        ProgressBar._shown, self.is_open = self, True
        self._next_redraw = 0.0
        self._progress = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=12),
            TextColumn("{task.fields[text]}"),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=Console(stderr=True),
            auto_refresh=False,
        )
        self._task = self._progress.add_task("", completed=step, total=total, text="", speed="")
        streams = sys.stdout, sys.stderr
        self._progress.start()  # replaces both streams
        self._handlers = _redirect_handlers(
            {id(old): new for old, new in zip(streams, (sys.stdout, sys.stderr), strict=True)}
        )
        atexit.register(self.close)

    @staticmethod
    def is_supported() -> bool:
        """Return whether standard error goes to a terminal or notebook that can show the bar."""
        from rich.console import Console

        console = Console(stderr=True)
        if console.is_jupyter:
            return importlib.util.find_spec("ipywidgets") is not None
        return sys.stderr.isatty() and not console.is_dumb_terminal

    def move_to(self, step: int, total: float | None, text: str) -> None:
        """Update the bar, and close it when ``step`` reaches ``total``.

        Args:
            step: number of completed steps.
            total: number of steps of the whole run; None if it is unknown.
            text: text to show beside the bar, such as the loss.
        """
        now = time.monotonic()
        is_due = now >= self._next_redraw
        if is_due:
            self._next_redraw = now + _SECONDS
        speed = self._progress.tasks[0].speed
        self._progress.update(
            self._task,
            completed=step,
            total=total,
            text=text,
            speed=f"{speed:.3g} steps/s" if speed else "",
            refresh=is_due,
        )
        if total is not None and step >= total:
            self.close()

    def close(self) -> None:
        """Stop updating the bar, and restore the output streams. The bar stays on the screen."""
        if not self.is_open:
            return
        ProgressBar._shown, self.is_open = None, False
        self._progress.stop()
        for handler, stream in self._handlers:
            handler.setStream(stream)
        atexit.unregister(self.close)


def _redirect_handlers(replaced: Mapping[int, Any]) -> list[tuple[Any, Any]]:
    """Redirect log handlers to the replacements of their output streams.

    Args:
        replaced: dict that maps the ``id`` of each original stream to its replacement.

    Returns:
        A (handler, original stream) pair for each handler that was redirected.
    """
    changed = []
    for handler in (*logging.getLogger().handlers, *logging.getLogger("onecycle").handlers):
        stream = getattr(handler, "stream", None)
        if isinstance(handler, logging.StreamHandler) and id(stream) in replaced:
            changed.append((handler, stream))
            handler.setStream(replaced[id(stream)])
    return changed
