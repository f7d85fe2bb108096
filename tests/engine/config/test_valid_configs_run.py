"""What `validate` calls valid, `initialize` accepts: configs made from the schemas."""

import random

import pytest
import torch

import engine
import schemas
from engine.config import load_document
from engine.config.schedule_context import list_possible_horizons
from engine.config.schema import OPTIMIZERS, SCHEMA, resolve_reference
from engine.config.validate import examine
from schedules import SCHEDULES

KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "steps_per_print",
    "dataloader_drop_last",
    "bf16",
    "prescale_gradients",
    "comms_logger",
    "dump_state",
    "flops_profiler",
    "timers",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
)
RUN = ("max_duration", "scale_schedule_ratio", "scale_warmup", "seed", "steps_this_run", "compile")
NUMBERS = (0, 1, 2, 8, 30, 100, 0.0, 0.1, 0.5, 0.9, 1.5, 1e-3)
TIMES = ("1dur", "0.1dur", "20ba", "64sp", "8sp", "3dur")


class Generator:
    """Draws values that a JSON schema accepts."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def draw(self, schema):
        schema = resolve_reference(schema)
        if "enum" in schema:
            return self.random.choice(schema["enum"])
        kinds = schema.get("type", [])
        kind = self.random.choice([kinds] if isinstance(kinds, str) else kinds)
        limits = schema.get("minimum", 0), schema.get("maximum", 1e9)
        match kind:
            case "boolean":
                return self.random.random() < 0.5
            case "null":
                return None
            case "string" if "pattern" in schema and "auto" not in schema["pattern"]:
                return self.random.choice(TIMES)
            case "integer":
                values = [each for each in NUMBERS if isinstance(each, int)]
            case "number" | "string":
                values = NUMBERS
            case "array":
                size = self.random.randint(schema.get("minItems", 1), schema.get("maxItems", 3))
                return [self.draw(schema["items"]) for _ in range(size)]
            case "object":
                return self.draw_object(schema)
        fitting = [each for each in values if limits[0] <= each <= limits[1]]
        return self.random.choice(fitting or [schema["minimum"]])

    def draw_object(self, schema, keys=None):
        properties = {
            key: each
            for key, each in schema.get("properties", {}).items()
            if "x-removed" not in each and (keys is None or key in keys)
        }
        required = schema.get("required", ())
        return {
            key: self.draw(each)
            for key, each in properties.items()
            if key in required or self.random.random() < 0.4
        }

    def draw_config(self):
        name = self.random.choice([name for name, each in OPTIMIZERS.items() if is_torch(each)])
        scheduler = self.random.choice(list(SCHEDULES))
        schema = schemas.read(f"schedulers/{scheduler}.json")
        config = self.draw_object(schemas.read(SCHEMA), KEYS)
        config |= {
            "optimizer": {"type": name, "params": self.draw_object(OPTIMIZERS[name])},
            "scheduler": {"type": scheduler, "params": self.draw_object(schema)},
            "engine": self.draw_object(schemas.read("sections/engine.json"), RUN),
        }
        config["engine"]["backend"] = "torch"
        if "schedulers" in schema["properties"] and self.random.random() < 0.9:
            blocks = [self.draw_config()["scheduler"] for _ in range(2)]
            config["scheduler"]["params"]["schedulers"] = blocks
        if self.random.random() < 0.5:
            config["train_batch_size"] = 8
        return config


def is_torch(schema):
    return schema.get("x-backend") != "deepspeed" and "x-removed" not in schema


def find_need(config, context):
    """Return what `validate` cannot know about the script, if the config depends on it."""
    schedule = context.schedule
    if schedule is not None and schedule.lists_per_group:
        return "the number of param groups"
    if schedule is not None and schedule.feedback is not None:
        return "the length of an epoch"
    if schedule is not None and len(list_possible_horizons(schedule, config, 1)) > 1:
        return "the length of an epoch"
    return None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [400, pytest.param(20_000, marks=pytest.mark.long)])
def test_initialize_accepts_every_config_that_validate_calls_valid(count):
    generator = Generator(seed=count)
    accepted = set()
    for _ in range(count):
        config = generator.draw_config()
        problems, context = examine(load_document(config), 1, reject_auto=True)
        serious = [problem for problem in problems if problem.severity == "error"]
        if serious or find_need(config, context):
            continue
        try:
            engine.initialize(config=config, model=torch.nn.Linear(2, 1, bias=False))
        except Exception as error:
            raise AssertionError(f"{config} is valid, but: {error}") from error
        accepted.add(config["scheduler"]["type"])
    assert len(accepted) > 12
