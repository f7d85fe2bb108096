"""The report of an LR range test."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.display.terminal_plots import choose_ticks
from engine.range_test.recorder import Run
from engine.range_test.refinement import Refinement, build_short_cycle, refine
from engine.range_test.suggestion import Suggestion, suggest
from engine.range_test.sweep import spread_over_groups
from schedules.core.extras import require_package
from schedules.plots import STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

__all__ = ["LRRangeReport"]

_COLUMNS_PER_TICK = 12  # of the axis of a plot in the terminal
_LOSS_TICKS = 5


@dataclass(frozen=True)
class LRRangeReport:
    """The result of an LR range test: recorded runs, suggested learning rates and refinement.

    >>> lrs = [10 ** (-5 + k / 25) for k in range(150)]
    >>> losses = [2.3 - 1.5 / (1 + (1e-3 / lr) ** 2) + (lr / 0.1) ** 2 for lr in lrs]
    >>> report = LRRangeReport((Run(lrs, losses, [None] * 150),))
    >>> report.block()["type"], report.suggestion.max_lr == report.block()["params"]["cycle_max_lr"]
    ('OneCycle', True)
    """

    runs: tuple[Run, ...]
    refinement: Refinement | None = None

    @property
    def max_lr(self) -> float | None:
        """The suggested maximum learning rate, refined if `refinement` is set.

        The value is None if the range test could not suggest a learning rate.
        """
        return self.refinement.max_lr if self.refinement else self.suggestion.max_lr

    @property
    def min_lr(self) -> float | None:
        """The suggested minimum learning rate of a cycle: a tenth of `max_lr`.

        The value is None if the range test could not suggest a learning rate.
        """
        return None if self.max_lr is None else float(f"{self.max_lr / 10:.2g}")

    def refine(
        self,
        train: Callable[[dict[str, Any], int], Run],
        *,
        steps: int,
        training_steps: int | None = None,
        known: Mapping[str, Any] | None = None,
    ) -> LRRangeReport:
        """Refine the suggestion with short 1Cycle runs, and return the refined report.

        If this report has no suggestion, return it unchanged without training.

        Args:
            train: function ``train(block, repeat)`` that trains with the scheduler block and
                returns the recorded run. ``repeat`` is the index of the run among those with the
                same block.
            steps: number of steps per cycle.
            training_steps: number of steps in the planned training run; None if it equals `steps`.
            known: OneCycle block whose momentum settings and ratio of phase lengths are used; None
                to use the defaults.
        """
        if self.suggestion.max_lr is None:
            return self
        block = self.block(known)
        found = refine(
            lambda max_lr, repeat: train(build_short_cycle(block, max_lr, steps), repeat),
            self.suggestion.max_lr,
            repeats=len(self.runs),
            steps=steps,
            training_steps=training_steps,
        )
        return replace(self, refinement=found)

    @cached_property
    def suggestion(self) -> Suggestion:
        """The suggestion from all runs. If ``max_lr`` is None, ``reason`` explains why.

        The suggestion is computed from the combined losses of all runs. However, if there are
        several runs and more than half of them yield a suggestion on their own, ``max_lr`` is the
        median of these suggestions. Thus, a single run that diverges early has little effect.
        """
        lrs, losses = (
            np.concatenate([np.asarray(part, float) for part in parts])
            for parts in zip(*(run.curve for run in self.runs), strict=True)
        )
        ends = [end for end in map(_find_divergence, self.runs) if end is not None]
        diverged_at = statistics.median(ends) if len(ends) == len(self.runs) else None
        found = suggest(lrs, losses, diverged_at=diverged_at)
        each = self.max_lrs
        max_lr = statistics.median(each) if 2 * len(each) > len(self.runs) > 1 else found.max_lr
        rounded = max_lr and float(f"{max_lr:.2g}")
        reason = "" if rounded else self._find_early_end(found.reason) or found.reason
        return Suggestion(rounded, reason, found.rules, found.smoothed)

    def _find_early_end(self, reason: str) -> str:
        """Return a message if the script ended too early for a suggestion; otherwise, return "".

        Args:
            reason: reason that `suggest` gives for the missing suggestion.
        """
        for run in self.runs:
            steps = run.facts.get("steps", 0)
            if steps is None:  # the learning rate increases until the script ends
                return (
                    f"{reason}. The script ended at a learning rate of {run.lrs[-1]:.3g}; let it "
                    "train for more steps, or increase `lr_range_test_step_rate`"
                )
            if not run.end and len(run.lrs) < steps:
                return (
                    f"the script ended after {len(run.lrs)} of {steps} steps, before it reached "
                    "the largest learning rates; let it train for more steps, or reduce `--steps`"
                )
        return ""

    @property
    def max_lrs(self) -> list[float]:
        """The maximum learning rate that each run suggests on its own.

        Runs without a suggestion are omitted. If there is only one run, the list is empty.
        """
        if len(self.runs) == 1:
            return []
        each = (_suggest_from(run).max_lr for run in self.runs)
        return [lr for lr in each if lr is not None]

    def block(self, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return a OneCycle scheduler block with the suggested range of learning rates.

        Args:
            known: OneCycle block from which to copy the other params; None to use their defaults.

        Raises:
            ValueError: if the range test could not suggest a learning rate.
        """
        if self.max_lr is None:
            raise ValueError(
                f"The range test could not suggest a learning rate: {self.suggestion.reason}. "
                "Repeat the test with more steps or a different range of learning rates."
            )
        params = dict(known.get("params", {})) if known and known["type"] == "OneCycle" else {}
        params["cycle_min_lr"], params["cycle_max_lr"] = self.min_lr, self.max_lr
        momenta = [value for run in self.runs for value in run.momenta if value is not None]
        if momenta and min(momenta) < max(momenta):
            params["cycle_min_mom"], params["cycle_max_mom"] = min(momenta), max(momenta)
        lrs = self.runs[0].facts.get("lrs") or [1.0]
        return spread_over_groups({"type": "OneCycle", "params": params}, lrs)

    def to_json(self) -> dict[str, Any]:
        """Return the report as a JSON-compatible dict. Losses that are not finite are None.

        ``suggestion["rules"]`` maps each rule to the learning rate that it selects. In
        ``suggestion["confidence"]``, ``"agree_within_factor"`` is the ratio of the largest to the
        smallest learning rate that the rules in ``"rules"`` select.
        """
        suggestion = self.suggestion
        return {
            "suggestion": {
                "max_lr": self.max_lr,
                "min_lr": self.min_lr,
                "reason": suggestion.reason,
                "rules": dict(suggestion.rules),
                "confidence": suggestion.band
                and {
                    "rules": list(suggestion.edge_rules),
                    "agree_within_factor": suggestion.band[1] / suggestion.band[0],
                },
                "of_each_run": self.max_lrs,
            },
            "refinement": self.refinement and self.refinement.to_json(),
            "scheduler": self.block() if self.max_lr is not None else None,
            "runs": [
                {
                    "facts": run.facts,
                    "end": run.end,
                    "lr": run.lrs,
                    "momentum": run.momenta,
                    "loss": [value if math.isfinite(value) else None for value in run.losses],
                }
                for run in self.runs
            ],
        }

    def table(self) -> Table:
        """Return a table with the suggested range and the learning rate that each rule selects."""
        from rich.table import Table

        suggestion = self.suggestion
        table = Table("rule", "learning rate", title="LR range test")
        for rule, value in suggestion.rules.items():
            table.add_row(rule, f"{value:.2g}")
        if suggestion.max_lr is None:
            table.add_row("no suggestion", suggestion.reason)
            return table
        if suggestion.band:
            low, high = suggestion.band
            rules = suggestion.edge_rules
            shown = f"{', '.join(rules)}: from {low:.2g} to {high:.2g}"
            table.add_row("confidence", shown if len(rules) > 1 else f"only {rules[0]} applies")
        if self.max_lrs:
            low, high = min(self.max_lrs), max(self.max_lrs)
            runs = f"suggestions of {len(self.max_lrs)} individual runs"
            middle = statistics.median(self.max_lrs)
            table.add_row(runs, f"{low:.2g} to {high:.2g}, median {middle:.2g}")
        if self.refinement:
            for row in self.refinement.to_rows():
                table.add_row(*row)
        table.add_row("suggested maximum", f"{self.max_lr:.2g}", style="bold")
        table.add_row("suggested minimum", f"{self.min_lr:.2g}", style="bold")
        return table

    def draw(self, path: Path) -> None:
        """Save a PNG plot of the loss against the learning rate, with the suggested range."""
        require_package("matplotlib", "A plot")
        import matplotlib as mpl
        from matplotlib.figure import Figure

        panels = 2 if self.refinement else 1
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=(7.2, 3.8 * panels), layout="constrained")
            axes = figure.subplots(panels, 1, squeeze=False)[:, 0]
            self._draw_sweep(axes[0])
            if self.refinement:
                self._draw_cycles(axes[1], self.refinement)
            figure.savefig(path, dpi=150)

    def _draw_sweep(self, axis: Axes) -> None:
        for run in self.runs:
            axis.plot(*run.curve, ".", markersize=4, color="tab:blue", alpha=0.35, label="loss")
            diverged_at = _find_divergence(run)
            if diverged_at is not None:
                axis.axvline(diverged_at, color="tab:red", linewidth=1, label="divergence")
        suggestion = self.suggestion
        if suggestion.smoothed is not None:
            smoothed = suggestion.smoothed
            axis.plot(10**smoothed.x, smoothed.loss, color="black", label="smoothed")
            below, above = float(smoothed.loss.min()), float(smoothed.loss.max())
            margin = 0.15 * (above - below) or 1.0
            losses = [value for run in self.runs for value in run.losses if math.isfinite(value)]
            above = min(float(np.percentile(losses, 98)), 2 * above - below)
            axis.set_ylim(below - margin, above + margin)
        title = f"no suggestion: {suggestion.reason}"
        if self.max_lr is not None and self.min_lr is not None:
            axis.axvspan(self.min_lr, self.max_lr, color="tab:green", alpha=0.15)
            # The table names the learning rate of each rule.
            for value in suggestion.rules.values():
                axis.axvline(value, color="gray", linestyle=":", linewidth=1, label="rules")
            title = f"suggested cycle: from {self.min_lr:.2g} to {self.max_lr:.2g}"
        axis.set(xscale="log", xlabel="learning rate", ylabel="loss", title=title)
        _add_legend(axis)

    def _draw_cycles(self, axis: Axes, refinement: Refinement) -> None:
        maxima = list(refinement.losses)
        for losses in np.array(list(refinement.losses.values())).T:
            axis.plot(maxima, losses, "o-", markersize=5, color="tab:blue", alpha=0.5)
        axis.axvline(refinement.lowest, color="black", linestyle=":", label="lowest")
        if refinement.shrinkage < 1:
            label = f"suggestion for {refinement.training_steps} steps"
            axis.axvline(refinement.max_lr, color="tab:green", label=label)
        title = f"cycles of {refinement.steps} steps"
        axis.set(xscale="log", xlabel="cycle_max_lr", ylabel="final loss", title=title)
        _add_legend(axis)

    def draw_in_terminal(self, width: int, *, color: bool = False) -> str:
        """Return a text plot of the smoothed loss against the learning rate.

        Args:
            width: width of the plot in characters.
            color: whether to use terminal colors.
        """
        require_package("plotext", "A plot in the terminal")
        import plotext

        smoothed = self.suggestion.smoothed
        if smoothed is None:
            return ""
        plotext.clear_figure()
        plotext.theme("pro" if color else "clear")
        plotext.plotsize(width, 15)
        losses = [float(f"{loss:.12g}") for loss in smoothed.loss]  # without rounding errors
        plotext.plot(smoothed.x.tolist(), losses, marker="braille")
        if self.max_lr is not None:
            plotext.vline(math.log10(self.max_lr))
        lrs = choose_ticks((10**smoothed.x).tolist(), width // _COLUMNS_PER_TICK, is_log=True)
        plotext.xticks([math.log10(lr) for lr in lrs], list(lrs.values()))
        ticks = choose_ticks(losses, _LOSS_TICKS)
        plotext.yticks(list(ticks), list(ticks.values()))
        plotext.title("loss at each learning rate")
        drawn = plotext.build()
        return str(drawn if color else plotext.uncolorize(drawn))

    def write(self, directory: Path) -> Sequence[Path]:
        """Write ``lr_range.png`` and ``report.json`` to a directory, and return their paths."""
        directory.mkdir(parents=True, exist_ok=True)
        picture, data = directory / "lr_range.png", directory / "report.json"
        data.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
        self.draw(picture)
        return picture, data


def _suggest_from(run: Run) -> Suggestion:
    return suggest(*run.curve, diverged_at=_find_divergence(run))


def _find_divergence(run: Run) -> float | None:
    lrs, _ = run.curve
    return lrs[-1] if run.end == "divergence" and lrs else None


def _add_legend(axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))  # one per label
    if entries:
        axis.legend(entries.values(), entries.keys())
