"""The report of an LR range test: the reason why there is no suggestion."""

import math
import re

import pytest

from engine.range_test.recorder import Run
from engine.range_test.report import LRRangeReport


def build_report(steps, planned, end):
    lrs = [10 ** (-6 + step / 40) for step in range(steps)]
    losses = [3 - step / 100 for step in range(steps)]
    run = Run(lrs, losses, [None] * steps, facts={"steps": planned}, end=end)
    return LRRangeReport((run,))


@pytest.mark.parametrize(
    ("planned", "end", "reason"),
    [
        (250, "", "the script ended after 60 of 250 steps"),
        (60, "steps", "the loss still falls at the largest learning rate"),
    ],
)
def test_report_without_a_suggestion_names_a_script_that_ended_early(planned, end, reason):
    report = build_report(60, planned, end)
    assert report.max_lr is None
    assert report.suggestion.reason.startswith(reason)


def test_report_of_a_schedule_in_a_config_names_the_last_step():
    """Such a test has no planned number of steps."""
    reason = build_report(60, None, "").suggestion.reason
    assert reason.startswith("the loss still falls at the largest learning rate, ")
    assert reason.endswith(
        "The script ended at a learning rate of 2.99e-05; let it train for more steps, or increase "
        "`lr_range_test_step_rate`"
    )


def test_report_states_how_closely_the_rules_agree():
    lrs = [10 ** (-6 + step / 40) for step in range(240)]
    losses = [2 - math.tanh(3 * (step / 120 - 1)) + 4 * (step > 200) for step in range(240)]
    report = LRRangeReport((Run(lrs, losses, [None] * 240, facts={"steps": 240}, end="steps"),))
    found = report.to_json()["suggestion"]
    confidence = found["confidence"]
    assert confidence["rules"] == ["end of descent", "minimum", "divergence / 10"]
    selected = [found["rules"][name] for name in confidence["rules"]]
    factor = confidence["agree_within_factor"]
    assert factor == max(selected) / min(selected)
    (row, *_), (value, *_) = (
        [cell for cell in column.cells if "confidence" in cell or "from" in cell]
        for column in report.table().columns
    )
    assert row == "confidence"
    low, high = min(selected), max(selected)
    assert value == f"end of descent, minimum, divergence / 10: from {low:.2g} to {high:.2g}"


def test_terminal_plot_of_a_constant_loss_that_diverges_has_short_labels():
    lrs = [10 ** (-6 + step / 40) for step in range(240)]
    losses = [2.296875 + max(0, step - 100) / 10 for step in range(240)]
    drawn = LRRangeReport((Run(lrs, losses, [None] * 240),)).draw_in_terminal(80)
    labels = re.findall(r"\d\.\d+(?=┤)", drawn)
    assert labels == ["2.3"]


def test_report_without_a_suggestion_has_no_confidence():
    assert build_report(60, 60, "steps").to_json()["suggestion"]["confidence"] is None
