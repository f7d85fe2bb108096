# Generated from the package's `__all__` by `make generate`.

from schedules.binding.binder import ScheduleBinder
from schedules.core.durations import Horizon
from schedules.core.registry import SCHEDULES
from schedules.core.registry import from_config
from schedules.core.registry import register
from schedules.core.schedule import Schedule
from schedules.core.schedule import ScheduleError
from schedules.core.trace import trace
from schedules.families.composer import ConstantScheduler
from schedules.families.composer import ConstantWithWarmupScheduler
from schedules.families.composer import CosineAnnealingScheduler
from schedules.families.composer import CosineAnnealingWarmRestartsScheduler
from schedules.families.composer import CosineAnnealingWithWarmupScheduler
from schedules.families.composer import ExponentialScheduler
from schedules.families.composer import LinearScheduler
from schedules.families.composer import LinearWithWarmupScheduler
from schedules.families.composer import MultiStepScheduler
from schedules.families.composer import MultiStepWithWarmupScheduler
from schedules.families.composer import PolynomialScheduler
from schedules.families.composer import PolynomialWithWarmupScheduler
from schedules.families.composer import StepScheduler
from schedules.families.composites import ChainedScheduler
from schedules.families.composites import Combined
from schedules.families.composites import SequentialLR
from schedules.families.d2l import CosineScheduler
from schedules.families.d2l import FactorScheduler
from schedules.families.d2l import MultiFactorScheduler
from schedules.families.d2l import PolyScheduler
from schedules.families.d2l import SquareRootScheduler
from schedules.families.deepspeed import LRRangeTest
from schedules.families.deepspeed import OneCycle
from schedules.families.deepspeed import WarmupCosineLR
from schedules.families.deepspeed import WarmupDecayLR
from schedules.families.deepspeed import WarmupLR
from schedules.families.general import InverseSquareRoot
from schedules.families.general import Phases
from schedules.families.general import WarmupStableDecay
from schedules.families.megatron import OptimizerParamScheduler
from schedules.families.pytorch import ConstantLR
from schedules.families.pytorch import CosineAnnealingLR
from schedules.families.pytorch import CosineAnnealingWarmRestarts
from schedules.families.pytorch import CyclicLR
from schedules.families.pytorch import ExponentialLR
from schedules.families.pytorch import LinearLR
from schedules.families.pytorch import MultiStepLR
from schedules.families.pytorch import OneCycleLR
from schedules.families.pytorch import PolynomialLR
from schedules.families.pytorch import StepLR
from schedules.families.sambaflow import CosineScheduleWithWarmup as cosine_schedule_with_warmup
from schedules.families.sambaflow import FixedLr as fixed_lr
from schedules.families.sambaflow import PolynomialDecayScheduleWithWarmup as polynomial_decay_schedule_with_warmup
from schedules.families.sambaflow import StepSchedule as step_schedule
from schedules.feedback.autowu import AutoWU
from schedules.feedback.base import FeedbackSchedule
from schedules.feedback.plateau import ReduceLROnPlateau
from schedules.plots import plot
from schedules.torch_scheduler import attach

__version__: str

__all__ = [
    "AutoWU",
    "ChainedScheduler",
    "Combined",
    "ConstantLR",
    "ConstantScheduler",
    "ConstantWithWarmupScheduler",
    "CosineAnnealingLR",
    "CosineAnnealingScheduler",
    "CosineAnnealingWarmRestarts",
    "CosineAnnealingWarmRestartsScheduler",
    "CosineAnnealingWithWarmupScheduler",
    "CosineScheduler",
    "CyclicLR",
    "ExponentialLR",
    "ExponentialScheduler",
    "FactorScheduler",
    "FeedbackSchedule",
    "Horizon",
    "InverseSquareRoot",
    "LRRangeTest",
    "LinearLR",
    "LinearScheduler",
    "LinearWithWarmupScheduler",
    "MultiFactorScheduler",
    "MultiStepLR",
    "MultiStepScheduler",
    "MultiStepWithWarmupScheduler",
    "OneCycle",
    "OneCycleLR",
    "OptimizerParamScheduler",
    "Phases",
    "PolyScheduler",
    "PolynomialLR",
    "PolynomialScheduler",
    "PolynomialWithWarmupScheduler",
    "ReduceLROnPlateau",
    "SCHEDULES",
    "Schedule",
    "ScheduleBinder",
    "ScheduleError",
    "SequentialLR",
    "SquareRootScheduler",
    "StepLR",
    "StepScheduler",
    "WarmupCosineLR",
    "WarmupDecayLR",
    "WarmupLR",
    "WarmupStableDecay",
    "__version__",
    "attach",
    "cosine_schedule_with_warmup",
    "fixed_lr",
    "from_config",
    "plot",
    "polynomial_decay_schedule_with_warmup",
    "register",
    "step_schedule",
    "trace",
]
