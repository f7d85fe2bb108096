"""Durations: what a time string is in updates, what scales, and what cannot be resolved."""

import pytest

from schedules import Horizon, ScheduleError, from_config, trace
from schedules.core.durations import DurationError, steps_of

RUN = Horizon(total_steps=100, steps_per_epoch=10, samples_per_step=4)


@pytest.mark.parametrize(
    ("duration", "ratio", "expected"),
    [
        (30, 1.0, 30),
        (30, 0.5, 15),
        (7, 0.5, 3),
        ("3ep", 1.0, 30),
        ("3ep", 0.25, 7),
        ("20ba", 2.0, 40),
        ("20 BA", 1.0, 20),
        ("40sp", 1.0, 10),
        ("6sp", 1.0, 1.5),
        ("220sp", 0.5, 27.5),
        ("0.29dur", 1.0, 28),  # 0.29 * 100 falls short of 29; truncated, as in Composer
        ("0.29dur", 0.5, 14),
        ("1dur", 2.0, 200),
        ("1e2ba", 1.0, 100),
    ],
)
def test_durations_in_updates(duration, ratio, expected):
    horizon = Horizon(**vars(RUN) | {"scale_ratio": ratio})
    assert steps_of(duration, horizon, scaled=True) == expected


def test_an_unscaled_warmup_stays_but_for_a_share_of_the_run():
    half = Horizon(**vars(RUN) | {"scale_ratio": 0.5})
    assert steps_of("2ep", half, scaled=False) == 20
    assert steps_of("0.2dur", half, scaled=False) == 10


@pytest.mark.parametrize(
    ("duration", "message"),
    [
        ("10tok", "counts tokens, which vary from batch to batch"),
        ("1.5ep", "must be whole: only a share of the run (dur) is not."),
        ("10s", 'in ep, ba, sp or dur, as "10ep" or "0.1dur", but is \'10s\' instead.'),
        ("", "but is '' instead."),
        ("0.5dur", 'needs the length of the run: give it, as "engine": {"max_duration"'),
        ("2ep", "needs the length of an epoch: give `training_data` to initialize"),
        ("8sp", 'needs the number of samples in an update: give "train_batch_size"'),
    ],
)
def test_what_cannot_be_resolved(duration, message):
    with pytest.raises(DurationError) as error:
        steps_of(duration, Horizon(), scaled=True)
    assert message in str(error.value)


@pytest.mark.parametrize("ratio", [0, -1, float("nan"), float("inf")])
def test_a_ratio_that_is_not_positive(ratio):
    with pytest.raises(ValueError, match="`scale_ratio` must be a positive number"):
        Horizon(scale_ratio=ratio)


@pytest.mark.parametrize(
    ("block", "field", "message"),
    [
        (("LinearWithWarmupScheduler", {"t_warmup": "2dur"}), "t_warmup", "at most `t_max`"),
        (("MultiStepScheduler", {"milestones": ["5ep", "20ba"]}), "milestones", "got [50, 20]"),
        (("StepScheduler", {"step_size": "0.001dur"}), "step_size", "at least 1, but is 0"),
        (("CosineAnnealingLR", {"T_max": 0}), "T_max", "at least 1, but is 0"),
        (("Phases", {"lr": [{"to": 1.0, "duration": "0.001dur"}]}), "lr", "`lr[0].duration`"),
        (("Phases", {"momentum": [{"to": 1.0, "duration": 5}]}), "momentum", "`momentum[0]`"),
        (("Phases", {}), None, "`weight_decay` must be set"),
        (
            ("WarmupStableDecay", {"total_steps": 10, "decay_steps": 20}),
            "decay_steps",
            "`total_steps` (10)",
        ),
        (("OneCycleLR", {"max_lr": 0.1, "total_steps": 3}), "pct_start", "`pct_start`"),
        (("OneCycleLR", {"max_lr": 0.1}), "total_steps", "both `epochs` and `steps_per_epoch`"),
    ],
)
def test_durations_that_are_at_odds(block, field, message):
    type_name, params = block
    with pytest.raises(ScheduleError) as error:
        from_config({"type": type_name, "params": params}, horizon=RUN)
    assert [fault.field for fault in error.value.faults] == [field]
    assert message in error.value.faults[0].message


def halved_every_hundred(step):
    """SambaFlow's example of a schedule of one's own."""
    return 0.5 ** (step // 100)


def test_a_function_of_ones_own_by_its_path():
    block = {"type": f"{__name__}:halved_every_hundred"}
    values = trace(block, 300, base={"lr": (0.4, 0.2)})["lr"]
    assert values[[0, 99, 100, 250], 0].tolist() == [0.4, 0.4, 0.2, 0.1]
    assert values[250, 1] == 0.05
    scaled = trace(block, 300, base={"lr": (0.4,)}, horizon=Horizon(scale_ratio=0.5))["lr"]
    assert scaled[[49, 50], 0].tolist() == [0.4, 0.2]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module:f", "there is no module 'no_such_module'"),
        (f"{__name__}:nothing", "has no attribute 'nothing'"),
        (f"{__name__}:RUN", "`scheduler.type` must name a scheduler class"),
    ],
)
def test_a_path_that_names_no_schedule(path, message):
    with pytest.raises(ValueError) as error:
        from_config({"type": path})
    assert message in str(error.value)


def test_a_schedule_of_another_package_by_its_entry_point(monkeypatch):
    class Entry:
        def load(self):
            return halved_every_hundred

    def entry_points(*, group, name):
        return [Entry()] if (group, name) == ("onecycle.schedules", "halving") else []

    monkeypatch.setattr("importlib.metadata.entry_points", entry_points)
    assert trace({"type": "halving"}, 101)["lr"][100, 0] == 0.05
    with pytest.raises(ValueError, match="must name a known schedule, but is 'halvin'"):
        from_config({"type": "halvin"})
