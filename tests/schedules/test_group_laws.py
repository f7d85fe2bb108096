"""Any schedule sets the values of `trace` in any kind of param groups, added and copied or not."""

import copy
import json
import pickle
import re
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schedules import SCHEDULES, Horizon, attach, from_config, trace
from schedules.core.fields import read_fields
from tests.testing.schedule_instances import instances

pytestmark = pytest.mark.filterwarnings("ignore:AutoWU's warmup of at most:UserWarning")

STEPS = 60
HORIZON = Horizon(total_steps=100, steps_per_epoch=10, samples_per_step=4)
LOSSES = [1 + (step % 7) / 10 for step in range(STEPS)]
MOMENTUM, WEIGHT_DECAY, BETA2 = 0.9, 0.01, 0.95
KINDS = {
    "momentum": {"momentum": MOMENTUM},
    "betas": {"betas": (MOMENTUM, BETA2)},
    "list of betas": {"betas": [MOMENTUM, BETA2]},
    "three betas": {"betas": (MOMENTUM, BETA2, 0.99)},
}
DTYPES = [None, torch.float64, torch.float32]


def halve(step):
    return 0.5 ** (step / 10)


def shrink(step):
    return 0.9 if step % 2 else 0.99


CUSTOM = {
    "a function": (f"{__name__}:halve", {}),
    "LambdaLR": ("LambdaLR", {"lr_lambda": f"{__name__}:halve"}),
    "MultiplicativeLR": ("MultiplicativeLR", {"lr_lambda": f"{__name__}:shrink"}),
    "torch's CyclicLR": (
        "torch.optim.lr_scheduler:CyclicLR",
        {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 15},
    ),
}
CASES = {name: (name, dict(cls.example)) for name, cls in SCHEDULES.items()} | CUSTOM


@dataclass
class Plan:
    """Param groups, and when some of them are added and the schedule is copied."""

    groups: list[tuple[str, torch.dtype | None]]
    """The keys of each group, and the dtype of its hyperparameters; None for numbers."""
    lrs: list[float] = field(default_factory=lambda: [0.1] * 3)
    initial: int = 3
    """Number of groups that are not added later."""
    add_at: int = 25
    copies: dict[int, str] = field(default_factory=dict)
    """Maps a step to how the schedule continues after it."""

    def build_group(self, index):
        keys, dtype = self.groups[index]

        def convert(value):
            if isinstance(value, tuple | list):
                return type(value)(map(convert, value))
            return value if dtype is None else torch.tensor(value, dtype=dtype)

        values = {"lr": self.lrs[index], "weight_decay": WEIGHT_DECAY, **KINDS[keys]}
        hyperparameters = {name: convert(value) for name, value in values.items()}
        return {"params": [torch.nn.Parameter(torch.ones(1))], **hyperparameters}

    def build_optimizer(self, count):
        return torch.optim.Optimizer([self.build_group(index) for index in range(count)], {})

    @property
    def base(self):
        count = len(self.groups)
        lrs = tuple(self.lrs[:count])
        return {"lr": lrs, "momentum": (MOMENTUM,) * count, "weight_decay": (WEIGHT_DECAY,) * count}


def check_values(optimizer, arrays, step, rel):
    for name, array in arrays.items():
        for index, group in enumerate(optimizer.param_groups):
            key = "betas" if name == "momentum" and "betas" in group else name
            value = float(group[key][0] if key == "betas" else group[key])
            expected = (
                pytest.approx(array[step, index], rel=rel, abs=1e-30) if rel else array[step, index]
            )
            assert value == expected, (name, step, index)
    for group in optimizer.param_groups:
        assert all(float(beta) == pytest.approx(BETA2) for beta in group.get("betas", ())[1:2])


def continue_elsewhere(plan, schedule, binder, way):
    """Return a binder that continues from a copy or a saved state of another one."""
    if way == "pickled":
        return pickle.loads(pickle.dumps(binder))
    if way == "copied":
        return copy.deepcopy(binder)
    optimizer = plan.build_optimizer(len(binder.optimizer.param_groups))
    if way == "loaded":
        other = attach(schedule, optimizer, horizon=HORIZON)
        optimizer.load_state_dict(copy.deepcopy(binder.optimizer.state_dict()))
        other.load_state_dict(json.loads(json.dumps(binder.state_dict())))
        return other
    assert way == "at the step"
    if schedule.feedback is not None:
        return binder
    return attach(schedule, optimizer, horizon=HORIZON, at=binder.last_epoch)


def check_run(plan, schedule, steps=STEPS):
    """Check the values of every step against `trace`, which has all groups from the start."""
    try:
        arrays = trace(schedule, steps, base=plan.base, horizon=HORIZON, losses=LOSSES)
    except ValueError as error:
        with pytest.raises(ValueError, match=re.escape(str(error))):
            attach(schedule, plan.build_optimizer(len(plan.groups)), horizon=HORIZON)
        return
    warmup = getattr(schedule.resolve(HORIZON), "warmup_steps", 0)
    rel = 1e-6 if any(dtype is torch.float32 for _, dtype in plan.groups) else 0
    optimizer = plan.build_optimizer(min(plan.initial, len(plan.groups)))
    binder = attach(schedule, optimizer, horizon=HORIZON)
    for step in range(steps):
        check_values(binder.optimizer, arrays, step, rel)
        if step == plan.add_at:
            for index in range(plan.initial, len(plan.groups)):
                group = plan.build_group(index)
                # After its warmup, such a schedule multiplies the current learning rate.
                if schedule.feedback == "metric" and step >= warmup:
                    group["lr"] = arrays["lr"][step, index]
                binder.optimizer.add_param_group(group)
                assert binder.get_last_lr()[index] == pytest.approx(float(group["lr"]))
        if step in plan.copies:
            binder = continue_elsewhere(plan, schedule, binder, plan.copies[step])
        if step + 1 < steps:
            binder.step(*([LOSSES[step]] if schedule.feedback else []))


PLANS = {
    "different keys": Plan([("momentum", None), ("betas", None), ("three betas", None)]),
    "tensors": Plan([("momentum", torch.float64), ("betas", torch.float64)]),
    "tensors of 32 bits": Plan([("momentum", torch.float32), ("list of betas", torch.float32)]),
    "tensors and numbers": Plan([("betas", torch.float32), ("betas", None)]),
    "added": Plan([("list of betas", None), ("betas", None)], initial=1),
    "added with other keys": Plan([("betas", None), ("momentum", torch.float64)], initial=1),
    "pickled": Plan([("betas", None), ("momentum", None)], copies={25: "pickled"}),
    "copied": Plan([("betas", torch.float64), ("momentum", None)], copies={25: "copied"}),
    "loaded": Plan([("betas", torch.float64), ("momentum", None)], copies={25: "loaded"}),
    "at a step": Plan([("betas", None), ("betas", None)], copies={25: "at the step"}),
    "added and pickled": Plan(
        [("betas", None), ("momentum", torch.float64), ("betas", None)],
        initial=1,
        add_at=20,
        copies={10: "pickled", 20: "loaded", 22: "pickled", 30: "copied"},
    ),
}


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("name", CASES)
def test_schedule_values_are_those_of_trace_in_any_kind_of_groups(name, kind):
    """Groups may have different keys, be tensors, be added later, or continue elsewhere."""
    type_name, params = CASES[name]
    check_run(PLANS[kind], from_config({"type": type_name, "params": params}))


TWO_GROUPS = Plan([("list of betas", None)] * 2)
LATE = {"lr": 0.4, "betas": [0.8, 0.95], "weight_decay": 0.02}


@pytest.mark.parametrize(
    "cls",
    [cls for cls in SCHEDULES.values() if cls.feedback is None],
    ids=lambda cls: cls.type_name,
)
def test_binder_group_added_later_has_the_values_of_its_own_base_or_is_rejected(cls):
    """A schedule of multiples continues with the group; one of absolute values names its index."""
    schedule = from_config({"type": cls.type_name, "params": dict(cls.example)})
    optimizer = TWO_GROUPS.build_optimizer(2)
    binder = attach(schedule, optimizer, horizon=HORIZON)
    for _ in range(25):
        binder.step()
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], **LATE})
    late = {"lr": 0.4, "momentum": 0.8, "weight_decay": 0.02}
    base = {name: (*values, late[name]) for name, values in TWO_GROUPS.base.items()}
    try:
        arrays = trace(schedule, 60, base=base, horizon=HORIZON)
    except ValueError:
        with pytest.raises(ValueError, match="Param group 2 was added after the schedule"):
            binder.step()
        return
    for step in range(26, 60):
        binder.step()
        check_values(optimizer, arrays, step, rel=0)


def list_values(cls):
    """Return the numbers of the example that may be lists, each as a list for two groups."""
    return {
        name: [cls.example[name]] * 2
        for name, field in read_fields(cls).items()
        if field.per_group and isinstance(cls.example.get(name), int | float)
    }


@pytest.mark.parametrize(
    "cls", [cls for cls in SCHEDULES.values() if list_values(cls)], ids=lambda cls: cls.type_name
)
def test_binder_group_added_to_lists_is_rejected_with_its_index(cls):
    schedule = from_config({"type": cls.type_name, "params": {**cls.example, **list_values(cls)}})
    optimizer = TWO_GROUPS.build_optimizer(2)
    binder = attach(schedule, optimizer, horizon=HORIZON)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], **LATE})
    with pytest.raises(ValueError, match=r"Param group 2 was added after .*\(3\), got a list of"):
        binder.step()


@st.composite
def plans(draw, schedule):
    count = draw(st.integers(1, 3))
    step = st.integers(0, 29)
    lrs = draw(st.lists(st.sampled_from([0.1, 0.025, 0.5]), min_size=count, max_size=count))
    ways = st.sampled_from(["pickled", "copied", "loaded", "at the step"])
    return Plan(
        groups=[
            (draw(st.sampled_from(sorted(KINDS))), draw(st.sampled_from(DTYPES)))
            for _ in range(count)
        ],
        lrs=lrs if draw(st.booleans()) else [lrs[0]] * count,
        initial=count if schedule.lists_per_group else draw(st.integers(1, count)),
        add_at=draw(step),
        copies=draw(st.dictionaries(step, ways, max_size=3)),
    )


@pytest.mark.parametrize("cls", SCHEDULES.values(), ids=SCHEDULES)
@settings(
    max_examples=settings.default.max_examples // 25,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
@given(data=st.data())
def test_schedule_with_any_parameters_has_the_values_of_trace_in_any_groups(cls, data):
    schedule = data.draw(instances(cls))
    check_run(data.draw(plans(schedule)), schedule, steps=30)
