"""Rules that check combinations of config values. Each module contains the rules for one topic.

A rule is a function that receives a `RuleContext` and yields problems. The context contains only
individually valid values, so a rule checks only their combinations.
"""

from engine.config.rules.activation_checkpointing import RULES as _ACTIVATION_CHECKPOINTING
from engine.config.rules.backend import RULES as _BACKEND
from engine.config.rules.batch_sizes import RULES as _BATCH_SIZES
from engine.config.rules.checkpoint import RULES as _CHECKPOINT
from engine.config.rules.context import Rule, RuleContext
from engine.config.rules.dataloader import RULES as _DATALOADER
from engine.config.rules.optimizer import RULES as _OPTIMIZER
from engine.config.rules.param_groups import RULES as _PARAM_GROUPS
from engine.config.rules.precision import RULES as _PRECISION
from engine.config.rules.schedule import RULES as _SCHEDULE
from engine.config.rules.zero import RULES as _ZERO

__all__ = ["RULES", "Rule", "RuleContext"]

RULES: tuple[Rule, ...] = (
    *_BATCH_SIZES,
    *_PRECISION,
    *_OPTIMIZER,
    *_PARAM_GROUPS,
    *_SCHEDULE,
    *_ZERO,
    *_ACTIVATION_CHECKPOINTING,
    *_CHECKPOINT,
    *_DATALOADER,
    *_BACKEND,
)
